"""Runs that differ in their mask phase alone share the steps before it, and end as if each had trained them."""

from copy import deepcopy
from dataclasses import asdict

import pytest
import torch

from dsmoe.config.run import RunConfig
from dsmoe.lock import FolderLock
from dsmoe.trainer import checkpointer
from dsmoe.trainer.differences import changed
from dsmoe.trainer.loop import TrainingRun
from dsmoe.trainer.mask_phase import first_masked_step

# 8 steps, of which the last 4 are sparse
PHASE = {"mask_phase__fraction": 0.5, "mask_phase__gain": 0.5}
ARMS = {"half": {"mask_phase__target_active": 0.5}, "several": {"mask_phase__targets": [0.25, 0.5, 1.0]}}


@pytest.fixture
def steps(monkeypatch):
    """The steps that runs take, in order."""
    taken = []
    one_step = TrainingRun._one_step

    def noted(self, total):
        taken.append(self.step)
        return one_step(self, total)

    monkeypatch.setattr(TrainingRun, "_one_step", noted)
    return taken


@pytest.fixture
def stage(tmp_path):
    return {**PHASE, "mask_phase__dense_stage": str(tmp_path / "stage"), "train__micro_batch_size": 4}


@pytest.mark.parametrize("statistics", ["exact", "running"])
def test_a_run_from_a_stage_is_the_run_alone_to_the_bit(train, steps, stage, capsys, statistics):
    own = {"router_loss__mi_statistics": statistics}
    alone = {
        name: train(f"{name}-alone", **PHASE, **arm, **own, train__micro_batch_size=4)
        for name, arm in ARMS.items()
    }
    steps.clear()
    shared = {name: train(name, **stage, **arm, **own) for name, arm in ARMS.items()}
    assert steps == [*range(8), *range(4, 8)]
    assert "starting from" in capsys.readouterr().out
    for name, run in shared.items():
        assert run.status == alone[name].status == 0
        assert run.log() == alone[name].log()
        theirs = alone[name].weights()
        for key, tensor in run.weights().items():
            assert torch.equal(tensor, theirs[key]), key
        cost = [one.summary()["training_flops"] for one in (run, alone[name])]
        assert cost[0] == cost[1]
    assert not torch.equal(*(run.weights()["model.embed_tokens.weight"] for run in shared.values()))


def test_a_run_that_broke_off_goes_on_where_it_was(train, steps, stage, monkeypatch):
    train("first", **stage, **ARMS["half"])
    one_step = TrainingRun._one_step

    def interrupted(self, total):
        if self.step == 6:
            raise KeyboardInterrupt
        return one_step(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_one_step", interrupted)
        assert train("second", **stage, **ARMS["several"], train__save_every_steps=5).status == 130
    steps.clear()
    resumed = train("second", **stage, **ARMS["several"], train__resume=True)
    assert (resumed.status, steps) == (0, [5, 6, 7])
    assert len(resumed.losses()) == 8


def test_seeds_have_stages_of_their_own(train, steps, stage):
    train("first", **stage, train__seeds=[0])
    steps.clear()
    train("second", **stage, train__seeds=[1])
    assert steps == list(range(8))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optim__learning_rate": 7e-4}, "optim.learning_rate was"),
        ({"mask_phase__fraction": 0.25}, "it ends with step 4, and here the mask phase begins after 6"),
    ],
)
def test_a_stage_of_another_run_is_refused(train, steps, stage, capsys, changed, words):
    kept = train("first", **stage)
    before = kept.log()
    steps.clear()
    run = train("second", **{**stage, **changed})
    assert (run.status, steps) == (2, [])
    error = capsys.readouterr().err
    assert words in error and "name another folder" in error
    assert not (run.folder / "log.jsonl").exists()
    # nor is a run lost that stood where the refused one was to stand
    assert train("first", **{**stage, **changed}, train__overwrite=True).status == 2
    assert kept.log() == before


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_without_dense_steps_and_masked_ones_there_is_no_stage(train, stage, capsys, fraction):
    assert train("run", **{**stage, "mask_phase__fraction": fraction}).status == 2
    assert f"mask_phase.fraction {fraction:g}" in capsys.readouterr().err


def test_the_phase_begins_where_its_share_of_the_steps_does():
    assert [first_masked_step(fraction, 10) for fraction in (0.0, 0.05, 0.1, 0.25, 0.4, 1.0)] == [
        10,
        10,
        9,
        8,
        6,
        0,
    ]
    # 1 - 0.7 is a little above 0.3
    assert [first_masked_step(0.7, steps) for steps in (10, 1000, 1126)] == [3, 300, 338]


def test_micro_batches_of_another_size_are_another_run_where_means_run():
    """Running means move once a micro-batch; exact statistics are those of the whole batch."""
    exact, running = RunConfig(), RunConfig()
    running.router_loss.mi_statistics = "running"
    for config, words in ((exact, []), (running, ["train.micro_batch_size was"])):
        other = deepcopy(config)
        other.train.micro_batch_size += 1
        found = changed(asdict(config), asdict(other))
        assert len(found) == len(words) and all(map(str.startswith, found, words))


def test_a_stage_has_its_log_before_it_can_be_found(train, stage, monkeypatch):
    """A run that is killed in between must not leave a stage whose log begins with the mask phase."""
    logged, save = [], checkpointer.save_checkpoint

    def noted(folder, *rest, **named):
        logged.append((folder / "log.jsonl").read_text(encoding="utf-8").count("lm_loss"))
        return save(folder, *rest, **named)

    monkeypatch.setattr(checkpointer, "save_checkpoint", noted)
    assert train("run", **stage, **ARMS["half"]).status == 0
    assert logged == [4]


def test_what_a_killed_writer_left_of_a_stage_goes(train, stage, tmp_path):
    folder = tmp_path / "stage" / "seed-0"
    half = folder / "checkpoints" / ".step-00000004.0123abcd.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert train("run", **stage, **ARMS["half"]).status == 0
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "log.jsonl"]
    assert sorted(path.name for path in half.parent.iterdir()) == ["latest.json", "step-00000004"]


def test_a_stage_that_another_run_is_writing_is_left_to_it(train, stage, tmp_path, capsys):
    folder = tmp_path / "stage" / "seed-0"
    half = folder / "checkpoints" / ".step-00000004.0123abcd.tmp"
    half.mkdir(parents=True)
    with FolderLock(folder, "wait"):
        assert train("run", **stage, **ARMS["half"]).status == 0
        assert half.is_dir() and not (folder / "log.jsonl").exists()
    assert "left to another run" in capsys.readouterr().err


def test_a_damaged_stage_says_what_helps(train, stage, tmp_path, capsys):
    train("first", **stage, **ARMS["half"])
    weights = next((tmp_path / "stage").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    capsys.readouterr()
    assert train("second", **stage, **ARMS["several"], train__overwrite=True).status == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith("remove that folder, or name another mask_phase.dense_stage")
    assert "train.output_dir" not in line


def test_a_stage_of_a_run_with_all_experts_among_its_targets(train, stage):
    """Its threshold is 0, from which no other moves away."""
    targets = {"mask_phase__targets": [1.0, 0.5], "mask_phase__target_active": 0.9}
    one = {"mask_phase__target_active": 0.5}
    alone = train("alone", **PHASE, **one, train__micro_batch_size=4)
    assert train("first", **stage, **targets).status == 0
    assert train("second", **stage, **one).log() == alone.log()
