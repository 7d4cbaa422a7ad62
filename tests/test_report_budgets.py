"""Models of a study at several active shares: against losses worked out here, and with trained tiny models."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from dsmoe.errors import UserError
from dsmoe.records import write_record
from dsmoe.report import budgets
from dsmoe.report.budgets_pairs import summarise
from dsmoe.report.budgets_plot import budgets_plot, what_is_drawn
from dsmoe.report.budgets_table import table
from dsmoe.report.trained_policies import trained_policies
from dsmoe.study.launcher import identity
from dsmoe.study.spec import StudyRun, read_study


def row(arm, kind, budget, seed, loss, tokens=100, validation=None, total=1000):
    validation = loss if validation is None else validation
    return {
        "arm": arm, "group": arm.split("-")[0], "kind": kind, "budget": budget, "seed": seed, "tokens": tokens,
        "mlp_active_fraction": budget, "num_params_total": total, "training_flops": 1e9, "training_seconds": 60.0,
        "validation_loss": validation, "test_loss": loss,
    }  # fmt: skip


ROWS = [
    *(row("dense", "dense", 1.0, seed, 3.0 + seed) for seed in (0, 1)),
    *(row("small", "dense", 1.0, seed, 2.0 + seed, total=500) for seed in (0, 1)),
    # a is better on validation, b on test: a is taken
    *(row("dsmoe-a", "dsmoe", 0.25, seed, 3.1 + 1.02 * seed, validation=1) for seed in (0, 1)),
    *(row("dsmoe-b", "dsmoe", 0.25, seed, 2.5 + seed, validation=2) for seed in (0, 1)),
    *(row("dsmoe-a", "dsmoe", 1.0, seed, 2.9 + seed, validation=1) for seed in (0, 1)),
    row("dsmoe-a", "dsmoe", 0.5, 0, 3.05, validation=0),
    row("smoe-k4", "smoe", 0.25, 1, 4.0),
    row("smoe-k4", "smoe", 0.25, 0, 3.2),
    row("flops", "smoe", 0.25, 0, 3.0, tokens=200),
]


def test_differences_are_paired_by_seed():
    found = summarise(ROWS)
    assert found["arms"] == {"dense": "dense", "dsmoe": "dsmoe-a"}
    gap = found["dsmoe_gap_to_dense"]
    assert gap["mean"] == pytest.approx(0.11) and gap["stderr"] == pytest.approx(0.01)
    assert gap["mlp_active_fraction"] == 0.25 and gap["seeds"] == [0, 1]
    pair = found["dsmoe_minus_smoe"]["0.25"]
    assert pair["mean"] == pytest.approx((-0.1 + 0.12) / 2) and pair["stderr"] == pytest.approx(0.11)
    more = found["dsmoe_minus_smoe_of_more_tokens"]["0.25"]
    assert more["mean"] == pytest.approx(0.1) and more["stderr"] is None and more["seeds"] == [0]
    assert set(found["dsmoe_minus_smoe"]) == {"0.25"}
    shown = table({"runs": ROWS, "summary": found})
    assert "| dsmoe-a - smoe-k4, 25.0%" in shown and "| dsmoe-a - more tokens: flops, 25.0%" in shown
    assert "tie" in shown and "+0.1100 ± 0.0100" in shown


def test_without_partners():
    found = summarise([row("dsmoe", "dsmoe", 0.25, 0, 3.0)])
    assert found["dsmoe_gap_to_dense"] is None and found["dsmoe_minus_smoe"] == {}
    assert summarise([row("dense", "dense", 1.0, 0, 3.0)])["arms"] == {"dense": "dense", "dsmoe": None}


def test_arms_are_ranked_where_all_of_them_were_judged():
    rows = [
        *(row("dsmoe-a", "dsmoe", budget, 0, 3.0) for budget in (0.25, 0.35)),
        *(row("dsmoe-b", "dsmoe", budget, 0, 3.1) for budget in (0.25, 0.35)),
        # a loses more at a budget, and has a seed, that b was not judged at
        row("dsmoe-a", "dsmoe", 0.1, 0, 5.0),
        row("dsmoe-a", "dsmoe", 0.25, 1, 4.0),
    ]
    assert summarise(rows)["arms"]["dsmoe"] == "dsmoe-a"
    # nothing that all have: what most have decides
    assert summarise([*rows, row("dsmoe-c", "dsmoe", 0.3, 7, 1.0)])["arms"]["dsmoe"] == "dsmoe-a"


def test_only_models_of_equal_size_and_tokens_are_compared():
    rows = [
        row("large", "dense", 1.0, 0, 1.0, total=2000),
        row("long", "dense", 1.0, 0, 1.5, tokens=200),
        row("near", "dense", 1.0, 0, 2.5, total=985),
        row("twin", "dense", 1.0, 0, 2.8, total=1010),
        row("twin", "dense", 1.0, 1, 2.8, total=1010),
        row("twin-lr", "dense", 1.0, 0, 2.9, total=1010),
        row("dsmoe", "dsmoe", 0.25, 0, 3.0),
        row("smoe", "smoe", 0.25, 0, 3.2, total=1015),
        row("short", "smoe", 0.25, 0, 3.5, tokens=50),
        row("large-smoe", "smoe", 0.25, 0, 2.0, total=2000),
        row("large-smoe-long", "smoe", 0.25, 0, 1.9, total=2000, tokens=200),
    ]
    found = summarise(rows)
    assert found["arms"] == {"dense": "twin", "dsmoe": "dsmoe"}
    assert found["dsmoe_gap_to_dense"]["mean"] == pytest.approx(0.2)
    assert found["dsmoe_minus_smoe"]["0.25"]["mean"] == pytest.approx(-0.2)
    assert found["dsmoe_minus_smoe_of_more_tokens"] == {}
    # none of them is a twin: fewer tokens, another size
    alone = summarise(
        [one for one in rows if "twin" not in one["arm"] and one["arm"] not in ("near", "smoe")]
    )
    assert alone["arms"]["dense"] is None and alone["dsmoe_gap_to_dense"] is None
    assert alone["dsmoe_minus_smoe"] == {}


def test_models_for_several_budgets_stand_beside_the_best_at_each():
    def trained(*given):
        return {**row(*given), "trained": True}

    rows = [
        row("dense", "dense", 1.0, 0, 3.0),
        row("smoe-a", "smoe", 0.25, 0, 3.3),
        row("smoe-b", "smoe", 0.34, 0, 3.2),
        trained("quarter", "dsmoe", 0.25, 0, 3.1),
        trained("third", "dsmoe", 0.34, 0, 2.9),
        # of a share that it was not trained for
        row("third", "dsmoe", 0.25, 0, 3.5),
        trained("any", "dsmoe", 0.25, 0, 3.2),
        trained("any", "dsmoe", 0.34, 0, 3.1),
        trained("both", "dsmoe", 0.25, 0, 3.4),
        trained("both", "dsmoe", 0.34, 0, 3.3),
    ]
    found = summarise(rows)
    assert found["arms"] == {"dense": "dense", "dsmoe": "third"}
    assert found["dsmoe_gap_to_dense"]["mean"] == pytest.approx(-0.1)
    pairs = found["dsmoe_minus_smoe"]
    assert [pairs[budget]["arm"] for budget in ("0.25", "0.34")] == ["quarter", "third"]
    assert [pairs[budget]["mean"] for budget in ("0.25", "0.34")] == pytest.approx([-0.2, -0.3])
    assert {budget: pair["mean"] for budget, pair in found["dsmoe_minus_dense"].items()} == pytest.approx(
        {"0.25": 0.1, "0.34": -0.1}
    )
    assert list(found["several_budgets"]) == ["any", "both"]
    for arm, lost in (("any", 0.0), ("both", 0.2)):
        one = found["several_budgets"][arm]
        assert one["arms"]["dsmoe"] == arm and one["dsmoe_gap_to_dense"]["mean"] == pytest.approx(0.1 + lost)
        assert [one["dsmoe_minus_dense"][budget]["mean"] for budget in ("0.25", "0.34")] == pytest.approx(
            [0.2 + lost, 0.1 + lost]
        )
        assert [one["dsmoe_minus_smoe"][budget]["mean"] for budget in ("0.25", "0.34")] == pytest.approx(
            [-0.1 + lost, -0.1 + lost]
        )
    shown = table({"runs": rows, "summary": found})
    for name in ("any - dense, 34.0%", "third - dense, 34.0%", "any - smoe-a, 25.0%", "both - smoe-b, 34.0%"):
        assert shown.count(f"| {name} ") == 1
    # where it is the only DS-MoE it is that of the main part
    alone = summarise([one for one in rows if one["arm"] not in ("quarter", "third", "both")])
    assert alone["arms"]["dsmoe"] == "any" and "several_budgets" not in alone


def test_what_is_drawn_are_differences_to_the_dense_twin(tmp_path):
    """The best for each share are joined, models for several have lines of their own, all others are points."""
    rows = [
        *(row("dense", "dense", 1.0, seed, 3.0 + seed) for seed in (0, 1)),
        row("small", "dense", 1.0, 1, 4.5, total=500),
        # the better one on validation
        *(row("third", "dsmoe", 0.34, seed, 3.1 + 1.02 * seed, validation=1) for seed in (0, 1)),
        row("other", "dsmoe", 0.34, 0, 3.0, validation=2),
        row("half", "dsmoe", 0.5, 0, 2.9),
        *(row("any", "dsmoe", budget, 0, 3.3 - budget / 2) for budget in (0.5, 0.34, 1.0)),
        row("smoe", "smoe", 0.34, 1, 4.3),
        row("longer", "smoe", 0.34, 1, 3.7, tokens=2_000_000),
    ]
    found = what_is_drawn(rows)
    assert found["relative"]
    lines = {line["label"]: line for line in found["lines"]}
    assert set(lines) == {"DS-MoE, one for each share", "smoe", "any: one model"}
    each = lines["DS-MoE, one for each share"]["points"]
    assert [point["at"] for point in each] == [0.34, 0.5]
    assert [point["value"] for point in each] == pytest.approx([0.11, -0.1])
    assert each[0]["stderr"] == pytest.approx(0.01) and each[1]["stderr"] is None
    assert [point["value"] for point in lines["any: one model"]["points"]] == pytest.approx([0.13, 0.05])
    points = {point["label"]: point["value"] for point in found["points"]}
    assert points == pytest.approx({"other": 0.0, "longer (2M tokens)": -0.3})
    assert {level["label"]: level["value"] for level in found["levels"]} == pytest.approx(
        {"dense": 0.0, "small": 0.5}
    )
    budgets_plot({"runs": rows}, tmp_path / "a.png")
    # without twins they are losses
    alone = what_is_drawn([one for one in rows if one["arm"] != "dense"])
    assert not alone["relative"] and alone["levels"] == [{"label": "small", "value": 4.5}]
    assert {line["label"]: line["points"][0]["value"] for line in alone["lines"]}["smoe"] == 4.3
    budgets_plot({"runs": rows[:2]}, tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size for name in ("a.png", "b.png"))


def test_flops_in_the_table_are_means_over_seeds():
    rows = [
        {**row("dense", "dense", 1.0, seed, 3.0), "training_flops": flops}
        for seed, flops in enumerate([1e9, 2e9])
    ]
    shown = table({"runs": rows, "summary": summarise(rows)})
    assert "1.50e+09" in shown and shown.splitlines()[-1].startswith("FLOPs of dense are means")


def test_a_record_is_not_replaced_by_less_or_by_another_kind(tmp_path, capsys):
    """All of it before anything is measured: there is no text and no model here."""
    (tmp_path / "toy.yaml").write_text("groups: {dense: {seeds: [0, 1]}}")
    (tmp_path / "runs" / "dense-s0").mkdir(parents=True)
    (tmp_path / "runs" / "dense-s0" / "summary.json").write_text('{"seed": 0, "environment": {}}')
    record, results = tmp_path / "record", tmp_path / "results.json"
    words = [
        str(tmp_path / "toy.yaml"),
        "--output",
        str(tmp_path / "runs"),
        "--data",
        "x",
        "--record",
        str(record),
    ]
    both = {"runs": [row("dense", "dense", 1.0, seed, 3.0) for seed in (0, 1)]}
    for content, said in (
        (
            both,
            "holds 1 run(s) that are not finished in --output and not of the study's settings, the first seed 1 of",
        ),
        ({"name": "study", "runs": [{"name": "dense-s0"}]}, "not of this command"),
        ([], "not of this command"),
    ):
        results.write_text(json.dumps(content))
        write_record(record, title="t", command="c", conclusion="", files=[results], overwrite=True)
        assert budgets.main(words) == 2
        assert said in capsys.readouterr().err
        assert json.loads((record / "results.json").read_text()) == content
    (record / "precious").mkdir()
    assert budgets.main(words) == 2 and "is no record" in capsys.readouterr().err
    assert (record / "precious").is_dir()
    assert (
        budgets.main([*words[:-2], "--json", str(record)]) == 2 and "is a folder" in capsys.readouterr().err
    )


def test_a_record_keeps_the_runs_whose_folders_are_gone(train, held_out_corpus_dir, tmp_path, capsys):
    """Made from two folders in turn it is that of both together; with other samples or settings it stays as it is."""
    groups = {
        "dense": {"settings": {"model.kind": "dense", "model.num_experts": 1}},
        "dsmoe": {"seeds": [0, 1]},
    }
    study_file, record = tmp_path / "toy.yaml", tmp_path / "record"
    common = {"data.path": str(held_out_corpus_dir), "train.total_tokens": 512}
    study_file.write_text(yaml.safe_dump({"name": "toy", "settings": common, "groups": groups}))
    study = read_study(study_file)
    for run in study.runs:
        assert train(run.name, **run.settings, **{"train.seeds": [run.seed]}).status == 0
        (tmp_path / run.name / "study.json").write_text(json.dumps(identity(study, run)))

    def measure(output, *more):
        return budgets.main([str(study_file), "--output", str(output), "--data", str(held_out_corpus_dir), "--record",
                             str(record), "--calibration-tokens", "200", "--sequence-length", "16", "--shares", ".5",
                             "--tokens", *(more or ("200",))])  # fmt: skip

    assert measure(tmp_path) == 0
    whole = json.loads((record / "results.json").read_text())
    shutil.rmtree(record)
    for half, names in (("one", ["dense-s0", "dsmoe-s0"]), ("two", ["dsmoe-s1"])):
        for name in names:
            (tmp_path / half).mkdir(exist_ok=True)
            (tmp_path / name).rename(tmp_path / half / name)
    assert measure(tmp_path / "one") == 0
    assert "PARTIAL: 1 of 3 runs are missing" in (record / "README.md").read_text()
    capsys.readouterr()
    assert measure(tmp_path / "two", "150") == 2
    assert "holds 2 run(s) that are not finished in --output and were judged on other samples" in (
        capsys.readouterr().err
    )
    assert measure(tmp_path / "two") == 0
    joined = json.loads((record / "results.json").read_text())
    assert joined["runs"] == whole["runs"] and joined["summary"] == whole["summary"]
    assert "PARTIAL" not in (record / "README.md").read_text()
    # nothing here, all of it in the record
    assert measure(tmp_path / "none") == 0
    assert json.loads((record / "results.json").read_text())["runs"] == whole["runs"]
    # the study is another one now
    groups["dsmoe"]["settings"] = {"optim.learning_rate": 0.5}
    study_file.write_text(yaml.safe_dump({"name": "toy", "settings": common, "groups": groups}))
    capsys.readouterr()
    assert measure(tmp_path / "none") == 2
    assert "holds 2 run(s)" in capsys.readouterr().err
    assert json.loads((record / "results.json").read_text())["runs"] == whole["runs"]


def test_what_a_mask_phase_was_steered_to():
    config = {"model": {"num_experts": 8}, "mask_phase": {"target_active": 0.25}}
    assert trained_policies({"config": config}) == {}
    assert trained_policies({"config": config, "mask_phase_threshold": None}) == {}
    one = trained_policies({"config": config, "mask_phase_threshold": 1.5})
    assert one == {0.25: {"policy": "threshold", "threshold": 1.5}}
    several = {
        "config": config,
        "mask_phase_threshold": 1.5,
        "mask_phase_thresholds": {"1.0": 0.1, "0.5": 0.7, "0.25": 9.0},
    }
    assert trained_policies(several) == {
        0.25: {"policy": "threshold", "threshold": 8.0},  # more than N keeps none but the best, as N does
        0.5: {"policy": "threshold", "threshold": 0.7},
    }


def test_given_policies_are_no_thresholds():
    """Of earlier versions too, whose summaries name one that nothing used."""
    settings = {"policies": ["runs/sparse"], "target_active": 0.33}
    summary = {
        "mask_phase_threshold": 0.5,
        "config": {"mask_phase": settings, "model": {"num_experts": 32}},
    }
    assert trained_policies(summary) == {}


def test_shares_that_were_trained_run_as_they_were_trained(monkeypatch, tiny_model):
    model = tiny_model(num_experts=4, num_hidden_layers=2)
    monkeypatch.setattr(budgets, "calibrate", None)
    trained = {0.5: {"policy": "threshold", "threshold": 0.9}}
    found = budgets.budgets_of(model, None, [0.1, 0.5], trained)
    assert set(found) == {1.0, 0.5}
    assert found[0.5]["mlp"] == [trained[0.5]] * 2
    assert found[0.5]["attention"] == found[1.0]["attention"]


def test_shares_that_can_not_be_met_are_left_out(monkeypatch, tiny_model, capsys):
    """Such as those of routers that score all experts alike."""

    class Found:
        def at_share(self, share):
            if share == 0.3:
                raise UserError("an active share of 0.3 can't be met")
            return SimpleNamespace(policies={"mlp": share})

    monkeypatch.setattr(budgets, "calibrate", lambda *given, **options: Found())
    texts = SimpleNamespace(calibration=SimpleNamespace(batches=[]), sequence_length=8)
    found = budgets.budgets_of(tiny_model(), texts, [0.3, 0.5], {})
    assert set(found) == {1.0, 0.5}
    assert "left out: an active share of 0.3 can't be met" in capsys.readouterr().err


def test_the_share_of_an_smoe_is_that_of_its_layers(tiny_model, tmp_path):
    policies = [{"policy": "top_k", "k": 1}, {"policy": "top_k", "k": 2}]
    layers = tiny_model(num_experts=4, num_hidden_layers=2, kind="smoe", mlp_routing=policies)
    assert set(budgets.budgets_of(layers, None, [0.5], {})) == {1.5 / 4}
    (tmp_path / "a").mkdir()
    summary = {
        "config": {
            "model": {"kind": "smoe", "num_experts": 4, "num_hidden_layers": 2, "mlp_routing": policies}
        }
    }
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    assert budgets._trained_shares(tmp_path, [StudyRun("a", "a", {}, 0, {})]) == {4: {1.5 / 4}}
    threshold = tiny_model(num_experts=4, kind="smoe", mlp_routing={"policy": "threshold", "threshold": 0.5})
    with pytest.raises(UserError, match="keeps no fixed number of experts"):
        budgets.budgets_of(threshold, None, [0.5], {})
    # so that --only can leave its runs out
    summary["config"]["model"]["mlp_routing"] = {"policy": "threshold", "threshold": 0.5}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    assert budgets._trained_shares(tmp_path, [StudyRun("a", "a", {}, 0, {})]) == {}


def test_a_model_is_judged_where_it_was_trained(train, held_out_corpus_dir, tmp_path, capsys):
    """Without --shares: a mask phase's own shares; of a model without one, the usual ones and the SMoE's."""
    arms = {
        "steered": {"mask_phase.fraction": 0.5, "mask_phase.target_active": 0.75},
        "dense-only": {},
        "smoe": {"model.kind": "smoe", "model.mlp_routing": {"policy": "top_k", "k": 3}},
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"groups": {name: {} for name in arms}}))
    for name, settings in arms.items():
        given = {"data.path": str(held_out_corpus_dir), "train.total_tokens": 512, **settings}
        assert train(f"{name}-s0", **given).status == 0
    capsys.readouterr()
    words = [str(tmp_path / "toy.yaml"), "--output", str(tmp_path), "--data", str(held_out_corpus_dir), "--json", "-",
             "--tokens", "200", "--calibration-tokens", "200", "--sequence-length", "16"]  # fmt: skip
    assert budgets.main(words) == 0
    shares = {}
    for one in json.loads(capsys.readouterr().out)["runs"]:
        shares.setdefault(one["arm"], set()).add(one["budget"])
    assert shares == {"steered": {1.0, 0.75}, "dense-only": {1.0, 0.25, 0.35, 0.5, 0.75}, "smoe": {0.75}}


def test_a_study(train, held_out_corpus_dir, tmp_path, capsys, monkeypatch):
    """Three tiny models, measured once and then read back; a DS-MoE gets the shares of the SMoE too."""
    study = {
        "name": "toy",
        "groups": {
            "dense": {"settings": {"model.kind": "dense"}},
            "smoe": {"settings": {"model.kind": "smoe"}},
            "dsmoe": {},
        },
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(study))
    kinds = {
        "dense": {"model.kind": "dense", "model.num_experts": 1},
        "smoe": {"model.kind": "smoe", "model.mlp_routing": {"policy": "top_k", "k": 1}},
        "dsmoe": {},
    }
    for kind, settings in kinds.items():
        train(f"{kind}-s0", **{"data.path": str(held_out_corpus_dir), "train.total_tokens": 512, **settings})
    words = [str(tmp_path / "toy.yaml"), "--output", str(tmp_path), "--data", str(held_out_corpus_dir), "--shares", "0.6",
             "--tokens", "200", "--calibration-tokens", "200", "--sequence-length", "16"]  # fmt: skip
    capsys.readouterr()
    assert budgets.main([*words, "--record", str(tmp_path / "record"), "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    experts = json.loads((tmp_path / "dsmoe-s0" / "summary.json").read_text())["config"]["model"][
        "num_experts"
    ]
    measured = {(one["kind"], one["budget"]): one for one in results["runs"]}
    assert set(measured) == {
        ("dense", 1.0),
        ("smoe", 1 / experts),
        ("dsmoe", 1.0),
        ("dsmoe", 1 / experts),
        ("dsmoe", 0.6),
    }
    assert measured["smoe", 1 / experts]["mlp_active_fraction"] == pytest.approx(1 / experts)
    assert measured["dsmoe", 1.0]["mlp_active_fraction"] == 1.0
    assert list(results["summary"]["dsmoe_minus_smoe"]) == [f"{1 / experts:g}"]
    assert {"results.json", "budgets.png"} <= {path.name for path in (tmp_path / "record").iterdir()}
    # another share: what was measured before is taken as it is, and stays
    more = [
        *words[: words.index("--shares")],
        "--shares",
        "0.8",
        *words[words.index("--tokens") :],
        "--json",
        "-",
    ]
    calls = []
    judge = budgets.token_losses
    monkeypatch.setattr(budgets, "token_losses", lambda *given: calls.append(1) or judge(*given))
    assert budgets.main([*more, "--only", "dsmoe-*"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [one["budget"] for one in found] == [1.0, 1 / experts, 0.8] and len(calls) == 2  # two splits
    assert {**found[1]} in results["runs"]
    monkeypatch.setattr(budgets, "token_losses", None)
    assert budgets.main([*words, "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)["runs"]
    assert sorted(again, key=str) == sorted(results["runs"], key=str)


def test_bad_input(corpus_dir, tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text("groups: {dense: {}}")
    words = [str(tmp_path / "toy.yaml"), "--output", str(tmp_path / "none"), "--data", str(corpus_dir)]
    assert budgets.main(words) == 2 and "no finished run" in capsys.readouterr().err
    assert budgets.main([*words, "--only", "x*"]) == 2 and "'x*'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        budgets.main([*words, "--shares", "1.5"])
    assert "shares must be between 0 and 1" in capsys.readouterr().err
