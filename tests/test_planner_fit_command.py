"""Reading runs, and `dsmoe fit` on the command line."""

import argparse
import csv
import gzip
import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_planner_fit_solver import sweep

from dsmoe.accounting import count_parameters, total_parameters
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.planner.fit import command
from dsmoe.planner.fit.fitting import Settings, fit_law
from dsmoe.planner.fit.folders import read_folder, read_study
from dsmoe.planner.fit.report import as_json
from dsmoe.planner.fit.tables import read_table

HEADER = ("kind", "num_experts", "num_params_active", "num_params_total", "tokens", "loss", "name", "seed")


def write_csv(path, rows, header=HEADER):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def fit(*words):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["fit", *map(str, words)])
    return run_reporting_errors(lambda: args.run(args))


def as_rows(runs):
    return [tuple(asdict(run)[name] for name in HEADER) for run in runs]


def test_command_writes_json_text_and_plot(tmp_path, capsys):
    source = write_csv(tmp_path / "runs.csv", as_rows(sweep(0.006, 0, 4, 4)))
    law, plot = tmp_path / "out" / "law.json", tmp_path / "plot.png"
    assert fit(source, "--output", law, "--plot", plot, "--bootstrap", 10, "--decide-flops", 1e19, 1e20) == 0
    text = capsys.readouterr().out
    assert "law joint, 96 runs" in text and "extrapolated" not in text.split("1e+19")[0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert fit(source, "--json", "-", "--bootstrap", 10, "--decide-flops", 1e19, 1e20) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(law.read_text())


def test_outputs_that_cannot_be_written_are_told_before_any_is(tmp_path, capsys):
    source = write_csv(tmp_path / "runs.csv", as_rows(sweep(0.006, 0, 4, 4)))
    for words, message in [
        (["--json", tmp_path], f"--json {tmp_path}: is a folder"),
        (["--output", source / "law.json"], "is no folder that can be written to"),
        (["--plot", tmp_path / "plot.svg"], "plots are PNG files"),
    ]:
        assert fit(source, "--plot", tmp_path / "plot.png", *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_the_joint_laws_report_is_printed_where_its_record_fails(tmp_path, capsys, monkeypatch):
    place = Path(__file__).resolve().parents[1] / "eval" / "fit_scaling.py"
    spec = importlib.util.spec_from_file_location("fit_scaling", place)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def fail(*given, **more):
        raise UserError("the disk is full")

    monkeypatch.setattr(script, "write_concluded_record", fail)
    source = write_csv(tmp_path / "runs.csv", as_rows(sweep(0.006, 0, 4, 4)))
    words = ["--runs", str(source), "--output", str(tmp_path / "record"), "--bootstrap", "2"]
    monkeypatch.setattr(sys, "argv", ["fit_scaling.py", *words])
    assert script.main() == 2
    said = capsys.readouterr()
    assert "law joint, 96 runs" in said.out and said.err == "error: the disk is full\n"


def test_the_planner_reads_the_law(tmp_path, capsys):
    lawfile = pytest.importorskip("dsmoe.planner.lawfile")
    source = write_csv(tmp_path / "runs.csv", as_rows(sweep(0.006, 0, 4, 4)))
    assert fit(source, "--output", tmp_path / "law.json", "--bootstrap", 12) == 0
    found = lawfile.read_law(tmp_path / "law.json")
    assert len(found.draws) == 12
    content = json.loads((tmp_path / "law.json").read_text())
    entry = content["residuals"][50]
    asked = (entry["num_params_active"], entry["tokens"], entry["num_experts"])
    assert found.fit.law.loss(*asked) == pytest.approx(entry["fitted"], abs=1e-9)


def test_columns_are_mapped(tmp_path):
    header = ("experts", "N", "step", "validation", "run", "router")
    rows = [
        (1, 1e7, 10, 3.5, "a", "x"),
        (1, 1e7, 20, 3.2, "a", "x"),
        (8, 1e7, 20, 3.0, "b", "x"),
        (8, 1, 1, 1, "c", "y"),
    ]
    path = write_csv(tmp_path / "curves.csv.gz", rows, header)
    mapping = {"num_experts": "experts", "num_params_active": "N", "num_params_total": "N*experts + 5",
               "loss": "validation", "tokens": "step*1000"}  # fmt: skip
    runs, notes = read_table(path, mapping, {"router": ["x"]}, "run")
    assert [(run.kind, run.tokens, run.loss, run.num_params_total) for run in runs] == [
        ("dense", 20_000, 3.2, 1e7 + 5), ("smoe", 20_000, 3.0, 8e7 + 5),
    ]  # fmt: skip
    assert notes == []


@pytest.mark.parametrize(
    "row,message",
    [
        (("dense", 1, 1e8, 1e8, 1e9, "nan", "", 0), r"runs.csv, row 3: loss \(loss\) is nan"),
        (
            ("dense", 1, 1e8, 1e8, -5, 3.0, "", 0),
            "runs.csv, row 3: tokens .* is -5; it must be a finite number above 0",
        ),
        (("dense", 1, 1e8, 1e8, 1e9, "", "", 0), "row 3: loss .* is ''"),
        (("dense", 4, 1e8, 1e8, 1e9, 3.0, "", 0), "row 3: a dense run has num_experts 4"),
        (("moe", 4, 1e8, 1e8, 1e9, 3.0, "", 0), "row 3: kind is 'moe'; it must be one of dense, smoe, dsmoe"),
        (("smoe", 4, 1e8, 1e7, 1e9, 3.0, "", 0), "row 3: num_params_total 1e.07 is below num_params_active"),
        (("smoe", "many", 1e8, 1e9, 1e9, 3.0, "", 0), "row 3: num_experts .* is 'many'"),
    ],
)
def test_bad_values_name_the_row(tmp_path, row, message):
    path = write_csv(tmp_path / "runs.csv", [("dense", 1, 1e8, 1e8, 1e9, 3.0, "", 0), row])
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_missing_columns_name_the_known_ones(tmp_path):
    path = write_csv(tmp_path / "runs.csv", [(1e8, 1e9, 3.0)], ("N", "D", "L"))
    with pytest.raises(
        UserError, match="no column 'num_params_active' for num_params_active; it has N, D, L"
    ):
        read_table(path)
    with pytest.raises(UserError, match="no column 'M' for num_params_active; it has N, D, L"):
        read_table(path, {"num_params_active": "M"})
    with pytest.raises(UserError, match="--map size=N: the fields are kind"):
        read_table(path, {"size": "N"})


@pytest.mark.parametrize(
    "words,message",
    [
        (["absent.csv"], "absent.csv: no such file or folder"),
        (["SOURCE", "--map", "loss"], "--map loss: it must have the form FIELD=COLUMN"),
        (["SOURCE", "--hold-out-largest", "1.5"], "--hold-out-largest is 1.5"),
        (["SOURCE", "--decide-flops", "-1"], "--decide-flops is -1"),
        (["SOURCE", "--where", "kind=none"], "no row fits --where"),
        (["SOURCE", "--bootstrap", "-3"], "--bootstrap is -3"),
        (["SOURCE", "--seed", "-1"], "--seed is -1"),
        (["FOLDER"], "no summary.json in it or below"),
        (["SOURCE"], "can't determine"),
    ],
)
def test_command_refuses_with_one_line(tmp_path, capsys, words, message):
    rows = [("dense", 1, n, n, 1e9 * d, 3.0 + d, "", 0) for n in (1e7, 1e8) for d in (1, 2)]
    source = write_csv(tmp_path / "runs.csv", rows)
    (tmp_path / "empty").mkdir()
    places = {"SOURCE": source, "FOLDER": tmp_path / "empty"}
    assert fit(*[places.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["--where", "kind=dense"], ["--map", "loss=loss"], ["--last-of", "name"], ["--skip-empty"]]
)
def test_options_of_tables_are_refused_for_other_sources(tmp_path, capsys, options):
    """A filter that filters nothing would be a fit of everything."""
    (tmp_path / "results.json").write_text("{}")
    table = write_csv(tmp_path / "runs.csv", as_rows(sweep(0.006, 0, 4, 4)))
    several = [] if options[0] == "--map" else [[table, tmp_path / "results.json"]]
    for sources in ([tmp_path / "results.json"], [tmp_path], *several):
        assert fit(*sources, *options) == 2
        error = capsys.readouterr().err
        assert f"{options[0]} is for tables, and {sources[-1]} is none" in error and error.count("\n") == 1


MODEL = {
    "kind": "dsmoe", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": None,
    "num_hidden_layers": 2, "num_experts": 4, "mlp_type": "swiglu", "num_attention_heads": 4,
    "num_key_value_heads": None, "head_dim": None, "num_attention_experts": 1, "qk_norm": "full",
    "router_type": "linear", "router_hidden_size": 0, "mlp_routing": None, "attention_routing": None,
    "tie_word_embeddings": True,
}  # fmt: skip


def write_run(folder, changes, log=(), **summary):
    folder.mkdir(parents=True)
    model = {**MODEL, **changes}
    content = {"name": folder.name, "kind": model["kind"], "seed": 3, "tokens": 1000, "validation_loss": 4.0,
               "config": {"model": model}, **summary}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(content))
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in log))
    return SimpleNamespace(**model)


def test_run_folders_of_the_trainer(tmp_path):
    log = [{"step": 1, "active_experts": [4.0, 4.0]}, {"step": 2, "active_experts": [1.5, 2.5]}, {"step": 3}]
    dsmoe = write_run(tmp_path / "a" / "dsmoe", {}, log, validation_loss_sparse=4.1)
    top_k = {"policy": "top_k", "k": 2}
    smoe = write_run(tmp_path / "b" / "smoe", {"kind": "smoe", "mlp_routing": top_k})
    newer = write_run(tmp_path / "newer", {}, log, active_experts_sparse=[1.0, 3.0])
    write_run(tmp_path / "dense", {"kind": "dense", "num_experts": 1})
    runs, notes = read_folder(tmp_path)
    assert [(run.name, run.kind, run.seed) for run in runs] == [
        ("dsmoe", "dsmoe", 3),
        ("smoe", "smoe", 3),
        ("dense", "dense", 3),
        ("newer", "dsmoe", 3),
    ]
    first, second, third, fourth = runs
    assert first.loss == 4.1 and second.loss == 4.0  # the sparse one where it was measured
    assert first.num_params_total == total_parameters(dsmoe)
    assert first.num_params_active == count_parameters(dsmoe, {"mlp": [1.5, 2.5]}).active
    assert second.num_params_active == count_parameters(smoe).active
    assert second.num_experts == 2  # two of four run: half the size each, so the law's E is 2
    assert any("E = 2" in note for note in notes)
    assert fourth.num_params_active == count_parameters(newer, {"mlp": [1.0, 3.0]}).active
    assert third.num_params_active == third.num_params_total
    assert [run.active_share for run in runs] == [0.5, None, None, 0.5]
    assert {run.vocab_size for run in runs} == {97}


def test_runs_that_started_from_another_model_are_left_out_and_told_of(tmp_path, capsys):
    dense = {"kind": "dense", "num_experts": 1}
    model = vars(
        write_run(
            tmp_path / "scratch", dense, config={"model": {**MODEL, **dense}, "train": {"init_from": ""}}
        )
    )
    for name in ("polished", "upcycled"):
        write_run(tmp_path / name, dense, config={"model": model, "train": {"init_from": "scratch"}})
    runs, notes = read_folder(tmp_path)
    assert [run.name for run in runs] == ["scratch"]
    assert notes == [
        f"{tmp_path}: left out, as they started from another model (train.init_from): 2 runs, the first "
        f"{tmp_path / 'polished'}"
    ]
    rows = [
        {
            "name": name,
            "kind": "dense",
            "seed": 0,
            "tokens": 1000,
            "validation_loss": 4.0,
            "model": model,
            **more,
        }
        for name, more in (
            ("a", {"settings": {"train.init_from": "scratch"}}),
            ("b", {"settings": {}}),
            ("c", {}),
        )
    ]
    (tmp_path / "results.json").write_text(json.dumps({"runs": rows}))
    runs, notes = read_study(tmp_path / "results.json")
    assert [run.name for run in runs] == ["b", "c"] and "1 run, the first a" in notes[0]
    assert fit(tmp_path / "polished", tmp_path / "upcycled") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "1 run, the first" in error and "no such run is left" in error


def test_the_results_of_a_study_give_the_runs_of_its_folders(tmp_path):
    write_run(tmp_path / "runs" / "dsmoe", {}, validation_loss_sparse=4.1, active_experts_sparse=[1.5, 2.5])
    write_run(tmp_path / "runs" / "dense", {"kind": "dense", "num_experts": 1})
    rows = []
    for name in ("dense", "dsmoe"):
        summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        rows.append({**summary, "model": summary.pop("config")["model"]})
        del rows[-1]["config"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"name": "study", "runs": rows}))
    assert read_study(path) == read_folder(tmp_path / "runs")
    path.write_text(json.dumps({"runs": [{**rows[0], "model": 3}]}))
    with pytest.raises(UserError, match=r"results\.json: model is 3"):
        read_study(path)
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(UserError, match="no entry 'runs'"):
        read_study(path)


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        (
            {"environment": {"corpus": "b" * 64}, "evaluation_windows": "spread"},
            "different text (aaaaaaaaaaaa, bbbb",
        ),
        ({"environment": {"corpus": "a" * 64}}, "different windows of the text (spread, first)"),
        ({"evaluation_windows": "spread"}, None),  # of an unknown text
    ],
)
def test_losses_of_different_texts_are_not_fitted_together(tmp_path, summary, words):
    write_run(tmp_path / "a", {}, environment={"corpus": "a" * 64}, evaluation_windows="spread")
    write_run(tmp_path / "b", {}, **summary)
    table = write_csv(tmp_path / "runs.csv", [("dense", 1, 1e8, 1e8, 1e9, 3.0, "c", 0)])
    sources = [tmp_path / "a", table, tmp_path / "b"]
    if words is None:
        assert len(command.read_sources(sources)[0]) == 3
        return
    with pytest.raises(UserError) as caught:
        command.read_sources(sources)
    assert words in str(caught.value) and "a and b" in str(caught.value)


@pytest.mark.parametrize("name", ["runs.csv", "runs.csv.gz"])
def test_a_byte_order_mark_is_not_part_of_a_column(tmp_path, name):
    """As Excel writes CSV: the mark became part of `kind`, and DS-MoEs were fitted as SMoEs."""
    rows = [("dense", 1, 1e8, 1e8, 1e9, 3.0, "a", 0), ("dsmoe", 16, 5e7, 1e8, 1e9, 3.1, "b", 0)]
    path = write_csv(tmp_path / name, rows)
    plain, _ = read_table(path)
    marked = write_csv(tmp_path / f"marked-{name}", rows, ("\ufeffkind", *HEADER[1:]))
    assert read_table(marked)[0] == plain
    assert [run.kind for run in plain] == ["dense", "dsmoe"]


def test_a_kind_that_is_misnamed_or_missing_is_not_passed_over(tmp_path, capsys):
    path = write_csv(tmp_path / "runs.csv", [("dsmoe", 16, 5e7, 1e8, 1e9, 3.1)], (" Kind", *HEADER[1:6]))
    with pytest.raises(UserError, match="column ' Kind' must be named 'kind'"):
        read_table(path)
    path = write_csv(tmp_path / "bare.csv", [(1e7, 1e9, 3.1)], ("num_params_active", "tokens", "loss"))
    assert read_table(path)[1] == ["bare.csv has neither kind nor num_experts: all its runs count as dense"]
    path = write_csv(tmp_path / "sweep.csv", [row[1:] for row in as_rows(sweep())], HEADER[1:])
    assert fit(path, "--dsmoe-form", "eta") == 2
    error = capsys.readouterr().err
    assert "no run is a DS-MoE, their kinds are dense, smoe" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda s: s.pop("tokens"), "no entry tokens"),
        (lambda s: s.pop("config"), "no entry config"),
        (lambda s: s["config"]["model"].pop("vocab_size"), "config.model has no 'vocab_size'"),
        (lambda s: s["config"].update(model=3), "model is 3; it must be the model's configuration"),
        (lambda s: s["config"]["model"].update(hidden_size="wide"), "of run 'run' can't be counted"),
        (lambda s: s["config"]["model"].update(num_attention_heads=0), "of run 'run' can't be counted"),
        (lambda s: s["config"]["model"].update(qk_norm="some"), "of run 'run' can't be counted"),
        (lambda s: s.update(seed=None), "seed is None; it must be a whole number"),
        (lambda s: s.update(validation_loss=None), "validation_loss is None"),
        (lambda s: s.update(validation_loss=-1.0), "loss is -1"),
    ],
)
def test_incomplete_summaries_are_named(tmp_path, spoil, message):
    write_run(tmp_path / "run", {"kind": "dense", "num_experts": 1})
    path = tmp_path / "run" / "summary.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_folder(tmp_path)
    assert "summary.json" in str(caught.value)


def test_neither_torch_nor_transformers_is_loaded():
    script = (
        "import sys; sys.argv = ['dsmoe']\n"
        "import dsmoe.planner.fit.command, dsmoe.planner.fit.folders, dsmoe.planner.fit.routed\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_law_says_the_vocabulary_of_its_runs():
    runs = [replace(run, vocab_size=1024) for run in sweep()]
    assert as_json(fit_law(runs, Settings(draws=0)))["vocab_size"] == 1024
    mixed = [replace(runs[0], vocab_size=512), *runs[1:]]
    assert as_json(fit_law(mixed, Settings(draws=0)))["vocab_size"] is None
    assert as_json(fit_law(sweep(), Settings(draws=0)))["vocab_size"] is None
