"""What a run leaves behind: the log, the summary, seeds, comparisons; SMoE, dense twin and the mask phase."""

import json
import math

import pytest
import torch
import yaml

from dsmoe import DSMoEForCausalLM
from dsmoe.config.run import MaskPhaseSettings
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.loader import TrainLoader
from dsmoe.data.windows import evaluation_batches
from dsmoe.errors import UserError
from dsmoe.trainer.loop import TrainingRun
from dsmoe.trainer.mask_phase import ThresholdController
from dsmoe.trainer.seeds import compare
from dsmoe.trainer.step import Stepper

SMOE = {"model__kind": "smoe", "model__mlp_routing": {"policy": "top_k", "k": 2}}
DENSE = {"model__kind": "dense", "model__num_experts": 1}
SHORT = {"train__total_tokens": 3 * 128}


def steps(run):
    return [line for line in run.log() if "lm_loss" in line]


def test_log_lines(train):
    run = train("run", train__eval_every_tokens=4 * 128)
    assert [line["step"] for line in steps(run)] == list(range(1, 9))
    for line in steps(run):
        assert line["tokens"] == 128 * line["step"]
        assert math.isfinite(line["lm_loss"]) and line["grad_norm"] > 0
        router = line["router"]["mlp"]
        for layer in range(2):
            entropy, conditional = router["entropy"][layer], router["conditional_entropy"][layer]
            assert 0 <= conditional <= entropy <= math.log(4) + 1e-6
            assert router["mutual_information"][layer] == pytest.approx(conditional - entropy, abs=2e-6)
            assert sum(router["load"][layer]) == pytest.approx(1, abs=1e-5)
        assert len(line["active_experts"]) == 2 and all(1 <= value <= 4 for value in line["active_experts"])
    validated = {line["step"]: line for line in run.log() if "validation_loss" in line}
    assert sorted(validated) == [4, 8]
    summary = run.summary()
    assert summary["validation_loss"] == validated[8]["validation_loss"]
    assert summary["tokens"] == 1024 and summary["seed"] == 0 and summary["kind"] == "dsmoe"
    assert {"versions", "hardware", "kernel", "corpus"} <= set(summary["environment"])
    assert steps(run)[-1]["lm_loss"] < steps(run)[0]["lm_loss"]


def test_learning_rates_follow_the_schedule(train):
    run = train("run", **{**SHORT, "optim__router_lr_scale": 0.5, "optim__warmup_fraction": 0.67})
    assert [line["learning_rate"] for line in steps(run)] == pytest.approx([0.005, 0.01, 0.01])


def test_routers_have_a_learning_rate_of_their_own(train, monkeypatch):
    seen = []

    class Watched(TrainingRun):
        def _one_step(self, total):
            result = super()._one_step(total)
            groups = self.raw_optimizer.param_groups
            seen.append({name: group["lr"] for group in groups for name in group["names"]})
            return result

    monkeypatch.setattr("dsmoe.trainer.command.TrainingRun", Watched)
    assert (
        train("run", **{**SHORT, "optim__router_lr_scale": 0.25, "optim__warmup_fraction": 0.0}).status == 0
    )
    for rates in seen:
        routers = {rate for name, rate in rates.items() if ".router." in name}
        others = {rate for name, rate in rates.items() if ".router." not in name}
        assert routers == {0.25 * rate for rate in others} and len(others) == 1


@pytest.mark.parametrize("isolated", [False, True])
def test_validation_loss_is_that_of_the_final_model(train, corpus_dir, isolated):
    run = train(
        "run", **SHORT, train__eval_policy={"policy": "top_k", "k": 1}, data__isolate_documents=isolated
    )
    summary = run.summary()
    model = DSMoEForCausalLM.from_pretrained(run.folder / "final", dtype=torch.float64)
    for policy, name in (("dense", "validation_loss"), ("top_k", "validation_loss_sparse")):
        model.config.mlp_routing = [{"policy": policy, "k": 1}] * 2
        total = count = 0.0
        for batch in evaluation_batches(
            TokenCorpus(corpus_dir),
            split="validation",
            sequence_length=16,
            batch_size=1,
            max_tokens=300,
            isolate_documents=isolated,
        ):
            labels = batch["shift_labels"].flatten()
            # no mask: padding stands at the end, and positions that restart keep documents apart
            inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[labels != -100]
            total += torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum").item()
            count += int((labels != -100).sum())
        assert (count < 304) if isolated else (count == 304)  # 19 windows of 16
        assert summary[name] == pytest.approx(total / count, rel=1e-5)
    assert model.config.eos_token_id == TokenCorpus(corpus_dir).eos_token_id


def test_the_folder_is_a_recipe(train, tmp_path):
    """The resolved config.yaml runs again, to the same numbers."""
    first = train("run", **SHORT, model__num_experts=8)
    resolved = yaml.safe_load((first.folder / "config.yaml").read_text())
    assert resolved["model"]["num_experts"] == 8 and resolved["optim"]["beta2"] == 0.95
    # the options of the fixture are the run's own; the file says the rest
    again = train(
        "again", "--config", str(first.folder / "config.yaml"), "--train.output_dir", str(tmp_path / "again")
    )
    assert again.log() == first.log()


def test_smoe_trains_sparsely(train):
    run = train("run", **SMOE, router_loss__router_mi_loss_coef_mlp=0.0, router_loss__load_balancing_coef=0.1)
    for line in steps(run):
        assert "active_experts" not in line
        for load in line["router"]["mlp"]["load"]:
            assert sum(load) == pytest.approx(2, abs=1e-5)
    assert steps(run)[-1]["lm_loss"] < steps(run)[0]["lm_loss"]
    summary = run.summary()
    assert "validation_loss_sparse" not in summary


def test_dense_twin_trains(train):
    run = train("run", **DENSE)
    assert all(line["router"] == {} and "active_experts" not in line for line in steps(run))
    assert steps(run)[-1]["lm_loss"] < steps(run)[0]["lm_loss"]


def test_both_routers_of_moa_are_logged(train):
    run = train("run", **SHORT, model__num_attention_experts=2, model__qk_norm="none")
    assert [len(load) for load in steps(run)[0]["router"]["attention"]["load"]] == [2, 2]


def test_mask_phase(train):
    settings = {"mask_phase__fraction": 0.5, "mask_phase__target_active": 0.5, "mask_phase__gain": 0.5}
    run = train("run", **settings, train__total_tokens=40 * 128, router_loss__router_mi_loss_coef_mlp=0.05)
    lines = steps(run)
    assert not any("mask_phase" in line for line in lines[:20])
    assert all("mask_phase" in line for line in lines[20:])
    shares = [sum(sum(load) / 4 for load in line["router"]["mlp"]["load"]) / 2 for line in lines]
    # the log rounds each load to 6 digits, so a mean share is up to 5e-7 off (and the float32 sums a little)
    assert all(share == pytest.approx(0.25, abs=1e-6) for share in shares[:20])
    assert sum(shares[-5:]) / 5 == pytest.approx(0.5, abs=0.1)
    # the policy of the phase is not part of the model: `dsmoe sparsify` decides that
    model = DSMoEForCausalLM.from_pretrained(run.folder / "final")
    assert model.config.mlp_routing == [{"policy": "dense"}] * 2
    summary = run.summary()
    assert summary["mask_phase_threshold"] > 0.5


def test_threshold_controller_reaches_its_target():
    """On experts whose N * p is spread evenly between 0 and 2."""
    for target in (0.1, 0.33, 0.9):
        controller = ThresholdController(MaskPhaseSettings(fraction=1.0, target_active=target, gain=0.1), 8)
        for _ in range(300):
            controller.update(min(1.0, max(0.0, 1 - controller.threshold / 2)), 0)
        assert 1 - controller.threshold / 2 == pytest.approx(target, abs=0.01)
    assert controller.steps == 300
    controller.threshold = 99.0
    assert controller.policy(4) == {"policy": "threshold", "threshold": 4.0}
    assert [ThresholdController(MaskPhaseSettings(fraction=0.25), 8).active_at(step) for step in (5, 6, 7)] == [
        False, True, True,
    ]  # fmt: skip
    assert not ThresholdController(MaskPhaseSettings(fraction=0.0), 8).active_at(7)


def test_seeds_and_comparison(train, capsys):
    dense = train("dense", **SHORT, **DENSE, train__seeds=[0, 1, 2])
    # of earlier settings and of a seed that this run hasn't: no part of the comparison
    train("ours", **SHORT, train__seeds=[1, 2], optim__learning_rate=1e-3)
    ours = train(
        "ours", "--compare_to", str(dense.folder), **SHORT, train__seeds=[0, 2], train__overwrite=True
    )
    assert ours.status == dense.status == 0

    def summary(run, seed, mode=""):
        return json.loads((run.folder / f"seed-{seed}" / "summary.json").read_text())[
            f"validation_loss{mode}"
        ]

    seeds = json.loads((ours.folder / "seeds.json").read_text())
    assert seeds["seeds"] == [0, 2]
    a, b = summary(ours, 0), summary(ours, 2)
    assert a != b
    assert seeds["validation_loss"]["mean"] == pytest.approx((a + b) / 2)
    assert seeds["validation_loss"]["std"] == pytest.approx(abs(a - b) / 2**0.5)
    comparison = json.loads((ours.folder / "comparison.json").read_text())
    assert comparison["seeds"] == [0, 2]
    # each in the mode that it is run in
    differences = [summary(ours, seed, "_sparse") - summary(dense, seed) for seed in (0, 2)]
    assert comparison["differences"] == pytest.approx(differences)
    assert "tokens" not in comparison and "test" not in comparison
    # with two seeds 12.7 standard errors either way
    assert comparison["tie"] == (abs(comparison["mean"]) < 12.7 * comparison["stderr"])
    # losses of another part of the split, as older versions measured, are not compared
    path = dense.folder / "seed-1" / "summary.json"
    older = json.loads(path.read_text())
    assert older.pop("evaluation_windows") == "spread"
    path.write_text(json.dumps(older))
    capsys.readouterr()
    words = ["--compare_to", str(dense.folder)]
    assert train("other", *words, **SHORT, train__seeds=[1]).status == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        "seed 1 can't be compared with, since the two runs were measured on different parts of a split"
        in told
    )
    assert not (dense.folder.parent / "other").exists()
    with pytest.raises(UserError, match="seed 1 can't be compared with"):
        compare([{**older, "evaluation_windows": "spread"}], dense.folder)
    # a seed among others is the run of that seed alone
    alone = train("alone", **SHORT, train__seeds=[2])
    assert json.loads((alone.folder / "summary.json").read_text())["validation_loss"] == b


def test_all_arms_see_the_same_text(train, monkeypatch):
    """The order of the text depends on data.order_seed, or on the seed, alone: not on the arm or the micro-batches."""
    seen, step = [], Stepper.step

    def recorded(self, micro_batches, mi_factor):
        seen.append(torch.cat([batch["input_ids"] for batch in micro_batches]))
        return step(self, micro_batches, mi_factor)

    monkeypatch.setattr(Stepper, "step", recorded)

    def text(name, **settings):
        seen.clear()
        train(name, **SHORT, **settings)
        return torch.stack(seen)

    first = text("first")
    assert torch.equal(first, text("dense", **DENSE, train__seeds=[1], train__micro_batch_size=2))
    other = text("other", data__order_seed=1)
    assert not torch.equal(first, other)
    assert torch.equal(other, text("own", **DENSE, train__seeds=[1], data__order_seed=None))
    rows = [tuple(row) for row in first.flatten(0, 1).tolist()]
    assert len(set(rows)) == len(rows) == 24


def test_what_cannot_be_compared_is_refused_before_training(train, capsys, held_out_corpus_dir):
    dense = train("dense", **SHORT, **DENSE, train__seeds=[0, 1])
    words = ["--compare_to", str(dense.folder)]

    def refused(**settings):
        capsys.readouterr()
        assert train("ours", *words, **{**SHORT, **settings}).status == 2
        assert not (dense.folder.parent / "ours").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "has no finished run of seed 5, but of 0, 1" in refused(train__seeds=[5])
    assert "data.sequence_length 32 and 16" in refused(data__sequence_length=32)
    assert "train.eval_tokens 200 and 300" in refused(train__eval_tokens=200)
    assert "read different texts" in refused(data__path=str(held_out_corpus_dir))
    # more tokens are a comparison, and it says so
    longer = train("longer", *words, **{**SHORT, "train__total_tokens": 4 * 128})
    assert longer.status == 0
    assert json.loads((longer.folder / "comparison.json").read_text())["tokens"] == [4 * 128, 3 * 128]


def test_the_test_split_is_compared_too(train, held_out_corpus_dir):
    text = {"data__path": str(held_out_corpus_dir)}
    dense = train("dense", **SHORT, **DENSE, **text)
    ours = train("ours", "--compare_to", str(dense.folder), **SHORT, **text)
    comparison = json.loads((ours.folder / "comparison.json").read_text())
    expected = ours.summary()["test_loss_sparse"] - dense.summary()["test_loss"]
    assert comparison["test"]["differences"] == [pytest.approx(expected)]


def test_epochs_are_told(train, capsys, corpus_dir):
    summary = train("run", **SHORT, data__first_sample=5).summary()
    windows = TrainLoader(TokenCorpus(corpus_dir), sequence_length=16, seed=0).num_windows["tiny"]
    assert summary["epochs"] == {"tiny": pytest.approx(3 * 8 / windows, abs=1e-4)}
    assert f"epochs: tiny {summary['epochs']['tiny']:.2f}" in capsys.readouterr().out


def test_a_mask_phase_that_does_not_get_there_says_so(train, capsys):
    train("short", mask_phase__fraction=0.25, mask_phase__target_active=0.25)
    assert (
        "of the experts are active at the end of the mask phase, and 25% were wanted"
        in capsys.readouterr().out
    )
    train("long", mask_phase__fraction=0.8, mask_phase__target_active=0.9, mask_phase__gain=0.5)
    assert "were wanted" not in capsys.readouterr().out
