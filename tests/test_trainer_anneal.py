"""A mask phase whose wanted share falls over its steps (`mask_phase.anneal`)."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer_resume import interrupt_before

from dsmoe.config.run import MaskPhaseSettings
from dsmoe.errors import UserError
from dsmoe.trainer.mask_phase import ThresholdController

PHASE = {
    "mask_phase__fraction": 0.75,
    "mask_phase__target_active": 0.3,
    "mask_phase__anneal": 0.7,
    "mask_phase__gain": 1.0,
    "router_loss__router_mi_loss_coef_mlp": 0.05,
}


@given(
    fraction=st.floats(0.05, 1),
    anneal=st.floats(0.05, 1),
    target=st.floats(0.02, 1),
    total=st.integers(20, 4000),
)
def test_an_annealed_target_falls_to_its_end(fraction, anneal, target, total):
    settings = MaskPhaseSettings(fraction=fraction, target_active=target, anneal=anneal)
    settings.check()
    controller = ThresholdController(settings, total)
    first = next(step for step in range(total) if controller.active_at(step))
    wanted = [controller.target_at(step) for step in range(first, total)]
    assert wanted[0] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(wanted))
    length = anneal * (total - first)
    assert all(share == target for share in wanted[math.ceil(length) :])
    halfway = int(length / 2)
    assert wanted[halfway] == pytest.approx(target + (1 - target) * (1 - halfway / length) ** 3)


def test_an_annealed_phase_follows_its_target(train):
    run = train("run", **PHASE, train__total_tokens=80 * 128, train__log_every_steps=1)
    lines = [line for line in run.log() if "mask_phase" in line]
    shares = [sum(sum(load) / 4 for load in line["router"]["mlp"]["load"]) / 2 for line in lines]
    wanted = [line["mask_phase"]["target"] for line in lines]
    assert wanted[0] == 1.0 and wanted[-1] == 0.3
    for start in range(5, 60, 10):
        assert sum(shares[start : start + 5]) / 5 == pytest.approx(
            sum(wanted[start : start + 5]) / 5, abs=0.15
        )
    assert sum(shares[-5:]) / 5 == pytest.approx(0.3, abs=0.06)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"anneal": 1.5}, "mask_phase.anneal is 1.5; it must be"),
        ({"anneal": 0.5, "targets": [0.25, 0.5]}, "only one target_active can fall"),
        ({"anneal": 0.5, "fraction": 0.0}, "mask_phase.anneal is 0.5 and mask_phase.fraction 0"),
    ],
)
def test_annealing_that_cannot_be(changed, words):
    with pytest.raises(UserError, match=re.escape(words)):
        MaskPhaseSettings(**{"fraction": 0.5, **changed}).check()


def test_resumed_equals_uninterrupted(train, monkeypatch):
    whole = train("whole", **PHASE, train__save_every_steps=1)
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        assert train("run", **PHASE, train__save_every_steps=1).status == 130
    resumed = train("run", **PHASE, train__save_every_steps=1, train__resume=True)
    assert resumed.log() == whole.log()
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name
