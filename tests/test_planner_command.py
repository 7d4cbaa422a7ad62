"""`dsmoe plan` as a command: output, files that it writes, error lines, what it imports; and the page of figures."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsmoe import DSMoEForCausalLM
from dsmoe.accounting import total_parameters
from dsmoe.errors import run_reporting_errors
from dsmoe.planner.command import add_parser
from dsmoe.planner.lawfile import read_law
from dsmoe.planner.limits import Limits
from dsmoe.planner.page import main as page
from dsmoe.planner.plan import candidate_families, make_plan
from dsmoe.planner.train_config import mask_phase_fraction, write_config
from dsmoe.trainer.command import parse
from dsmoe.trainer.mask_phase import make_controller

ROOT = Path(__file__).resolve().parents[1]
LAW = ROOT / "eval" / "records" / "scaling-law" / "law.json"


@pytest.fixture
def plan(capsys):
    """plan("--flops", "1e22") -> (exit status, stdout, stderr)."""

    def run(*words):
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["plan", *words])
        status = run_reporting_errors(lambda: args.run(args))
        return status, *capsys.readouterr()

    return run


def test_the_command_of_the_issue(plan):
    words = "--memory 24GB --flops 1e22 --inference-tokens 1e12 --context 16384 --batch 8 --dtype bf16 --max-tokens 5e11"
    status, out, _ = plan(*words.split(), "--json", "-")
    assert status == 0
    rows = json.loads(out)["rows"]
    assert len(rows) == 7
    assert all(row["memory_bytes"] <= 24e9 and row["tokens"] <= 5e11 for row in rows)
    assert all(row["binding"] for row in rows)


def test_the_table_says_what_is_doubtful(plan):
    status, out, _ = plan("--memory", "24GB", "--flops", "10 ZFLOP", "--context", "16384")
    assert status == 0
    assert out.splitlines()[2].split("|")[2].strip() == "SMoE E=4"
    for words in (
        "tie: within 0.006",
        "extrapolated: outside",
        "assumed loss",
        "1.64 x the fit's RMSE",
        "ALL experts",
    ):
        assert words in out
    assumed = [line for line in out.splitlines() if line.startswith("|") and "DS-MoE" in line]
    assert assumed and all(line.rstrip(" |").endswith("a") for line in assumed)


def test_hardware_gives_memory_and_operations(plan):
    _, out, _ = plan("--gpu", "h100:8", "--days", "30", "--memory", "100GB", "--json", "-")
    content = json.loads(out)
    assert content["limits"]["memory_bytes"] == 100e9
    assert content["limits"]["flops"] is None
    assert content["limits"]["training_flops"] == pytest.approx(8 * 989.4e12 * 0.4 * 30 * 86400)
    assert any("smaller of it and --memory" in note for note in content["assumptions"])
    _, out, _ = plan("--gpu", "rtx4090", "--flops", "1e20", "--json", "-")
    assert json.loads(out)["limits"]["memory_bytes"] == 24e9
    assert (
        json.loads(out)["limits"]["training_memory_bytes"] is None
    )  # it serves; nothing is said of training


def test_hardware_that_trains_limits_what_is_trained(plan):
    """30 days of 8 H100 without that gave a model of 234B parameters, 3.7 TB in training, for 640 GB."""
    words = ["--gpu", "h100:8", "--days", "30", "--json", "-"]
    content = json.loads(plan(*words)[1])
    assert content["limits"]["training_memory_bytes"] == 640e9
    assert all(row["training_memory_bytes"] <= 640e9 for row in content["rows"])
    assert any(note.startswith("training memory limit 640 GB") for note in content["assumptions"])
    lifted = json.loads(plan(*words, "--training-memory", "100TB")[1])
    assert lifted["limits"]["training_memory_bytes"] == 100e12
    assert lifted["rows"][0]["training_memory_bytes"] > 640e9
    assert not any("--training-memory sets" in note for note in lifted["assumptions"])


@pytest.mark.parametrize("days", [3.0, 3e4])
def test_days_and_operations_both_hold(plan, days):
    """With --days 3 the operations of --flops 1e25 were once taken, thousands of times what the days allow."""
    words = [
        "--gpu",
        "h100:8",
        "--days",
        str(days),
        "--flops",
        "1e24",
        "--inference-tokens",
        "1e12",
        "--json",
        "-",
    ]
    content = json.loads(plan(*words)[1])
    of_days = 8 * 989.4e12 * 0.4 * days * 86400
    for row in content["rows"]:
        together = row["training_flops"] + row["inference_flops"]
        assert row["training_flops"] <= of_days * (1 + 1e-9) and together <= 1e24 * (1 + 1e-9)
        # the one that the plan calls binding is used up; more tokens would always be better
        assert (
            row["binding"][0] == ("training_flops" if days == 3 else "flops")
            or "training_memory" in row["binding"]
        )
        assert (
            row["training_flops"] == pytest.approx(of_days) if days == 3 else together == pytest.approx(1e24)
        )
    assert any(
        "with inference 1e+24, by --flops: the smaller holds" in note for note in content["assumptions"]
    )


def test_days_train_and_don_t_serve(plan):
    """The operations of 1e13 inference tokens, charged to three days of training, once left a model of 29M."""
    words = ["--gpu", "h100:8", "--days", "3", "--json", "-"]
    alone, used = (json.loads(plan(*words, *more)[1]) for more in ([], ["--inference-tokens", "1e13"]))
    for one, other in zip(alone["rows"], used["rows"], strict=True):
        assert other["inference_flops"] > one["inference_flops"] == 0
        assert {**one, "inference_flops": 0} == {**other, "inference_flops": 0}
    assert any(note.endswith("and --days is for training alone") for note in used["assumptions"])


def test_what_one_device_cannot_serve_is_told(plan):
    words = ["--days", "3", "--training-memory", "100TB", "--num-experts", "32,64", "--json", "-"]
    content = json.loads(plan("--gpu", "h100:8", *words)[1])
    (note,) = [note for note in content["assumptions"] if "`dsmoe serve` uses one device" in note]
    too_large = [str(rank) for rank, row in enumerate(content["rows"], 1) if row["memory_bytes"] > 80e9]
    assert 0 < len(too_large) < len(content["rows"])
    assert note.startswith(f"rank {', '.join(too_large)}: ") and "80 GB of one h100" in note
    small = json.loads(plan("--gpu", "h100", *words)[1])
    assert not any("one device" in note for note in small["assumptions"])


def test_one_number_of_experts(plan):
    _, out, _ = plan("--flops", "1e20", "--num-experts", "8", "--json", "-")
    assert {(row["kind"], row["num_experts"]) for row in json.loads(out)["rows"]} == {
        ("dense", 1), ("smoe", 8), ("dsmoe", 8)}  # fmt: skip
    _, out, _ = plan("--flops", "1e20", "--num-experts", "1", "--json", "-")
    # a mixture of one expert is the dense model, and no configuration of one can be trained
    assert [row["kind"] for row in json.loads(out)["rows"]] == ["dense"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no limit is given"),
        ("--memory 24GB", "--max-tokens"),
        ("--memory 24 --flops 1e22", "--memory '24'"),
        ("--flops lots", "--flops 'lots'"),
        ("--gpu h1000", "'h100'"),
        ("--gpu 8h100", "a count stands after the name: h100:8"),
        ("--gpu 8xh100", "--gpu h100:8 --days 3"),
        ("--flops 1e22 --plot plan.foo", "--plot plan.foo: plots are PNG files"),
        ("--flops 1e22 --json - --write-config -", "--json and --write-config both name -"),
        ("--flops 1e22 --gpu h100 --mfu 2 --days 1", "--mfu 2"),
        ("--flops 1e22 --days 3", "--days needs --gpu"),
        ("--gpu h100 --days 0", "--days 0"),
        ("--gpu h100:8 --days inf", "--days inf"),
        ("--gpu h100:8 --days nan", "--days nan"),
        ("--gpu h100:8 --days 1e300", "--days 1e+300"),
        ("--flops 1e22 --dtype int3", "--dtype 'int3'"),
        ("--flops 1e22 --kv-dtype odd", "--kv-dtype 'odd'"),
        ("--flops 1e22 --num-experts 2.5", "--num-experts '2.5'"),
        ("--flops 1e22 --num-experts 3 --tabulated", "no entry for 3"),
        ("--flops 1e22 --law joint --tabulated", "two laws"),
        ("--flops 1e22 --eta 0", "--eta 0"),
        ("--flops 1e22 --eta inf", "--eta inf"),
        ("--flops 1e19 --total-params 1", "can't be built that small; the smallest, of d = 64, has 6.49M"),
        ("--flops 1e22 --active-share 1.5", "--active-share 1.5"),
        ("--flops 1e22 --num-experts 1e300", "smoe with 1e+300 experts"),
        ("--flops 1e22 --kinds dense,moe", "--kinds 'moe'"),
        ("--flops 1e22 --kinds smoe --num-experts 1", "no candidate"),
        ("--flops 1e22 --kinds dsmoe --num-experts 1", "need at least 2"),
        ("--flops 1e22 --row 9", "--row 9"),
        ("--flops 1e22 --law missing.json", "no such file"),
        ("--flops 1e6", "flops allows"),
    ],
)
def test_bad_input_is_one_line(plan, words, message):
    status, out, err = plan(*words.split())
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("kind", ["dense", "smoe", "dsmoe"])
def test_the_written_config_trains_what_was_planned(plan, tmp_path, kind):
    path = tmp_path / "plan.yaml"
    words = ["--flops", "1e18", "--kinds", kind, "--write-config", str(path)]
    words += ["--num-experts", "4"] if kind == "smoe" else []
    _, out, _ = plan(*words, "--json", "-")
    row = json.loads(out)["rows"][0]
    run, _, resolved = parse(["--config", str(path), "--data.path", "somewhere"])
    found, written = yaml.safe_load(resolved), yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in written.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            assert found[section][name] == value, f"{section}.{name}"
    run.check()
    config = run.model_config()
    with torch.device("meta"):
        model = DSMoEForCausalLM(config)
    assert model.num_parameters() == total_parameters(config)
    # the law counts neither norms nor routers, memory does
    assert model.num_parameters() == pytest.approx(row["num_params_total"], rel=0.003)
    assert row["memory"]["weights"] == 2 * model.num_parameters()
    assert run.train.total_tokens == round(row["tokens"])
    assert run.tokens_per_step == row["batch_tokens"]
    assert run.train.global_batch_size % run.train.micro_batch_size == 0
    assert run.optim.learning_rate == pytest.approx(row["learning_rate"], rel=0.01)
    assert config.kind == kind
    if kind == "smoe":
        assert config.routing("mlp", 0) == {"policy": "top_k", "k": 1}
        assert config.mlp_gate_scale == 1.0


def test_a_config_of_a_tiny_budget_can_be_trained_and_says_what_was_changed(plan, tmp_path):
    path = tmp_path / "plan.yaml"
    status, out, _ = plan("--flops", "1e13", "--write-config", str(path))
    assert status == 0
    text = path.read_text(encoding="utf-8")
    assert "# NOTE: learning rate clamped" in text and "# NOTE: batch reduced" in text
    assert "learning rate clamped" in out and "batch reduced" in out
    run, _, _ = parse(["--config", str(path), "--data.path", "somewhere"])
    run.check()
    assert run.optim.learning_rate < 0.01
    assert run.train.total_tokens >= 100 * run.tokens_per_step


@settings(max_examples=25, deadline=None, derandomize=True)
@given(num_experts=st.integers(2, 200), share=st.floats(1e-5, 1.0))
@example(num_experts=3, share=0.33)
@example(num_experts=32, share=0.03)
@example(num_experts=49, share=1e-5)
def test_every_written_config_passes_the_trainers_own_checks(num_experts, share):
    """Rounded to four digits, one of three experts was 0.3333 of them, which the trainer refuses."""
    law, limits = read_law(None), Limits(flops=1e21)
    for kind in ("smoe", "dsmoe"):
        found = make_plan(candidate_families(law, [num_experts], share, kinds=[kind]), limits, law)
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "plan.yaml"
            write_config(found, 1, path)
            run, _, _ = parse(["--config", str(path), "--data.path", "somewhere"])
        config = run.model_config()
        make_controller(run.mask_phase, config, run.total_steps)
        if kind == "dsmoe":
            wanted = max(share, 1 / num_experts)
            assert run.mask_phase.target_active == pytest.approx(wanted, abs=5.1e-5)


def test_files_are_written(plan, tmp_path):
    status, out, _ = plan("--flops", "1e20", "--memory", "5GB", "--json", str(tmp_path / "plan.json"), "--plot",
                          str(tmp_path / "plan.png"))  # fmt: skip
    assert status == 0 and "written to" in out
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["rows"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert plan("--flops", "1e20", "--total-params", "1B", "--plot", str(tmp_path / "points.png"))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.png", "points.png"}


def test_outputs_that_cannot_be_written_are_told_before_any_is(plan, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    config = str(tmp_path / "plan.yaml")
    for words, message in [
        (["--json", str(tmp_path / "folder")], "is a folder; name a file"),
        (["--json", str(tmp_path / "file" / "plan.json")], "is no folder that can be written to"),
        (["--json", config], "--json and --write-config both name"),
        (["--plot", str(tmp_path / "plot.pdf")], "plots are PNG files"),
    ]:
        status, out, err = plan("--flops", "1e20", "--write-config", config, *words)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dash_prints_the_configuration(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = plan("--flops", "1e18", "--write-config", "-")
    assert status == 0 and list(tmp_path.iterdir()) == []
    plan("--flops", "1e18", "--write-config", "plan.yaml")
    assert (tmp_path / "plan.yaml").read_text(encoding="utf-8") == out


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dsmoe.planner.figures.MAP_POINTS", 4)
    monkeypatch.setattr("dsmoe.planner.plots.POINTS", 8)
    assert page(["--output", str(tmp_path / "page"), "--flops", "1e22"]) == 0
    folder = tmp_path / "page"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "page.json", "loss_against_memory.png", "isoflop.png", "inference_demand.png"}  # fmt: skip
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "SMoE E=4 x (SMoE E=2, SMoE E=8)" in readme and "ASSUMED" in readme
    assert page(["--output", str(folder), "--flops", "1e22"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_no_torch():
    """The planner under a stand-in for the package, whose own __init__ may load what it likes."""
    code = (
        "import importlib, pathlib, sys, types\n"
        "package = sys.modules['dsmoe'] = types.ModuleType('dsmoe')\n"
        "package.__path__ = ['dsmoe']\n"
        "for path in sorted(pathlib.Path('dsmoe/planner').glob('*.py')):\n"
        "    importlib.import_module('dsmoe.planner' + ('' if path.stem == '__init__' else '.' + path.stem))\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_vocabulary_is_that_of_the_laws_runs(plan, tmp_path):
    """README's own-law example counted 50,257 entries for runs of 1,024, whose ranking that turned around."""
    law = json.loads(LAW.read_text(encoding="utf-8"))
    (tmp_path / "law.json").write_text(json.dumps({**law, "vocab_size": 1024}), encoding="utf-8")
    (tmp_path / "old.json").write_text(json.dumps({**law, "vocab_size": None}), encoding="utf-8")

    def ranked(*words):
        status, out, _ = plan("--flops", "1e15", *words, "--json", "-")
        assert status == 0
        found = json.loads(out)
        return [(row["kind"], row["num_params_total"]) for row in found["rows"]], " ".join(
            found["assumptions"]
        )

    own, notes = ranked("--law", str(tmp_path / "law.json"))
    assert own == ranked("--law", str(tmp_path / "old.json"), "--vocab-size", "1024")[0]
    assert "vocabulary" not in notes
    other, notes = ranked("--law", str(tmp_path / "law.json"), "--vocab-size", "50257")
    assert other != own and "vocabulary 50,257, and the law's runs had 1,024" in notes
    unknown, notes = ranked("--law", str(tmp_path / "old.json"))
    assert unknown == other and "does not say the vocabulary" in notes
    (tmp_path / "law.json").write_text(json.dumps({**law, "vocab_size": "1k"}), encoding="utf-8")
    status, _, err = plan("--flops", "1e15", "--law", str(tmp_path / "law.json"))
    assert status == 2 and "vocab_size is '1k'" in err and err.count("\n") == 1


def test_an_optimum_below_the_smallest_shape_is_told(plan):
    assert "below the smallest shape (d = 64), which is taken" in plan("--flops", "1e13")[1]
    assert "below the smallest shape" not in plan("--flops", "1e22")[1]


def test_a_written_ds_moe_is_of_the_recipe(plan):
    recipe = yaml.safe_load((ROOT / "configs" / "recipe" / "dsmoe.yaml").read_text(encoding="utf-8"))
    written = yaml.safe_load(plan("--flops", "1e19", "--kinds", "dsmoe", "--write-config", "-")[1])
    assert written["router_loss"] == recipe["router_loss"]
    # without a limit of memory a plan has few tokens a parameter, as that recipe; a small model reads many, as that of 1B
    assert written["mask_phase"]["fraction"] == recipe["mask_phase"]["fraction"] == mask_phase_fraction(2.9)
    largest = yaml.safe_load((ROOT / "configs" / "recipe_1b" / "dsmoe.yaml").read_text(encoding="utf-8"))
    small = plan("--flops", "1e19", "--kinds", "dsmoe", "--memory", "0.4GB", "--write-config", "-")[1]
    of_small = yaml.safe_load(small)["mask_phase"]["fraction"]
    assert (
        of_small == largest["mask_phase"]["fraction"] == mask_phase_fraction(20) == mask_phase_fraction(500)
    )
    assert mask_phase_fraction(7) < mask_phase_fraction(8)
    for name in ("gate_normalization", "router_initializer_range"):
        assert written["model"][name] == recipe["model"][name]
    text = plan("--flops", "1e19", "--kinds", "dsmoe", "--context", "16384", "--write-config", "-")[1]
    assert "# NOTE: L2 gates" in text and "up to the 16,384 of --context, are not trained" in text


def test_a_page_of_small_budgets(tmp_path, monkeypatch, capsys):
    """Budgets that round alike are told apart, and one that nothing fits is one line."""
    monkeypatch.setattr("dsmoe.planner.figures.MAP_POINTS", 3)
    monkeypatch.setattr("dsmoe.planner.plots.POINTS", 8)
    assert page(["--output", str(tmp_path / "page"), "--flops", "1.1e22,1.4e22"]) == 0
    content = json.loads((tmp_path / "page" / "page.json").read_text(encoding="utf-8"))
    assert set(content["memory"]) == {"1.1e+22", "1.4e+22"}
    assert page(["--output", str(tmp_path / "small"), "--flops", "1e11"]) == 2
    err = capsys.readouterr().err
    assert "1e+11 training FLOPs: no model" in err and err.count("\n") == 1
    assert not (tmp_path / "small").exists()
