"""Studies: reading, running with a stand-in trainer, resuming, tabulating."""

import copy
import datetime
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import yaml
from scipy import stats

from dsmoe.study import command, launcher
from dsmoe.study.command import main
from dsmoe.study.curves import fit_line
from dsmoe.study.launcher import STAGES, arguments, identity, shared_stage
from dsmoe.study.spec import read_study
from dsmoe.trainer.command import parse

STUDY = {
    "name": "toy",
    "settings": {
        "data.path": "somewhere",
        "data.sequence_length": 8,
        "train.global_batch_size": 1,
        "train.total_tokens": 1000,
    },
    "groups": {
        "dense": {
            "settings": {"model.kind": "dense", "model.num_experts": 1},
            "grid": {
                "size": {"small": {"model.hidden_size": 32}, "large": {"model.hidden_size": 64}},
                "tokens": {"1k": {}, "2k": {"train.total_tokens": 2000}},
            },
            "seeds": [0, 1],
        },
        "dsmoe": {
            "grid": {"size": {"small": {"model.hidden_size": 32}}, "tokens": {"1k": {}}},
            "seeds": [0, 1],
        },
    },
    "pairs": [["dsmoe", "dense"], ["dsmoe-small-1k", "dense-large-2k"]],
}

# writes a summary whose losses follow from the settings, fails for one run until a file appears
STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--train.output_dir"])
if "large-2k-s1" in folder.name and not (folder.parent / "mended").exists():
    print("error: a made-up problem"); sys.exit(2)
seed = json.loads(options["--train.seeds"])[0]
kind = options.get("--model.kind", "dsmoe")
loss = 3.0 + seed + (0.5 if kind == "dsmoe" else 0)
tokens = int(options["--train.total_tokens"])
summary = {"kind": kind, "seed": seed, "tokens": tokens, "validation_loss": loss, "test_loss": loss,
           "num_params_total": 10, "num_params_active": 5, "training_flops": 1e9, "environment": {},
           "config": {"model": {"hidden_size": int(options["--model.hidden_size"])}}}
if kind == "dsmoe":
    summary["validation_loss_sparse"] = loss - 0.25
    summary["test_loss_sparse"] = loss - 0.25 - 0.1 * len(str(tokens))
(folder / "log.jsonl").write_text(json.dumps({"step": 1, "lm_loss": loss, "router": {"mlp": {"load": [1, 2]}}}) + "\\n")
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "TRAINER", ["-c", STAND_IN])
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return path


def test_runs_are_the_product_of_axes_and_seeds(study):
    runs = read_study(study).runs
    assert len(runs) == 2 * 2 * 2 + 2
    assert runs[3].name == "dense-small-2k-s1"
    assert runs[3].settings["train.total_tokens"] == 2000
    assert runs[0].settings["train.total_tokens"] == 1000
    assert runs[-1].labels == {"size": "small", "tokens": "1k"}


def test_points_may_have_seeds_of_their_own(study):
    content = copy.deepcopy(STUDY)
    content["groups"]["dense"]["seeds"] = {"1k": [0, 1, 2], "2k": [5]}
    del content["pairs"][1]
    study.write_text(yaml.safe_dump(content, sort_keys=False))
    seeds = [run.seed for run in read_study(study).runs if run.group == "dense"]
    assert seeds == [0, 1, 2, 5] * 2  # small, then large


@pytest.mark.parametrize("seeds", [{"1k": [0]}, {"1k": [0], "2k": 1}, {"small": [0], "1k": [0], "2k": [0]}])
def test_seeds_that_leave_a_point_open_are_refused(study, tmp_path, capsys, seeds):
    content = copy.deepcopy(STUDY)
    content["groups"]["dense"]["seeds"] = seeds
    study.write_text(yaml.safe_dump(content))
    assert main([str(study), "--output", str(tmp_path / "runs"), "--list"]) == 2
    assert "groups.dense.seeds" in capsys.readouterr().err


def test_settings_are_understood_by_the_trainer(study, tmp_path):
    found = read_study(study)
    config, _, _ = parse(launcher.arguments(found, found.runs[3], tmp_path, threads=1))
    assert (config.model.kind, config.train.total_tokens, config.train.seeds) == ("dense", 2000, [1])
    assert (config.train.num_threads, config.train.resume, config.name) == (1, True, "dense-small-2k-s1")


def test_run_fail_mend_and_tabulate(study, tmp_path, capsys):
    output = tmp_path / "runs"
    assert main([str(study), "--output", str(output), "--workers", "3"]) == 2
    words = capsys.readouterr().err
    assert "dense-large-2k-s1: error: a made-up problem" in words
    assert "Traceback" not in words
    (output / "mended").touch()
    before = (output / "dsmoe-small-1k-s0" / "summary.json").stat().st_mtime_ns
    assert main([str(study), "--output", str(output)]) == 0
    assert (output / "dsmoe-small-1k-s0" / "summary.json").stat().st_mtime_ns == before
    results = json.loads((output / "results.json").read_text())
    assert len(results["runs"]) == 10
    assert not results["missing"]
    pair, cross = results["pairs"]
    assert (cross["first"], cross["second"], cross["seeds"]) == ("dsmoe-small-1k", "dense-large-2k", [0, 1])
    assert pair["validation"]["differences"] == [
        0.25,
        0.25,
    ]  # sparse DS-MoE against the dense run of the same seed
    point = next(point for point in results["groups"] if point["group"] == "dsmoe")
    assert point["validation_loss"]["mean"] == pytest.approx(3.75)
    assert "dense-small-1k" in (output / "table.md").read_text()


def test_a_record_says_what_is_missing(study, tmp_path):
    study.write_text(yaml.safe_dump({**STUDY, "title": "Toys", "conclusion": "Nothing\n follows."}))
    options = [str(study), "--output", str(tmp_path / "runs"), "--record", str(tmp_path / "record")]
    assert main([*options, "--only", "dsmoe-*"]) == 0
    text = (tmp_path / "record" / "README.md").read_text()
    assert text.startswith("# Toys")
    assert "PARTIAL: 8 of 10 runs are missing. Nothing follows." in text
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    assert len(record["missing"]) == 8
    logs = [json.loads(line) for line in (tmp_path / "record" / "logs.jsonl").read_text().splitlines()]
    assert logs[0] == {"run": "dsmoe-small-1k-s0", "step": 1, "lm_loss": 3.5, "router": {"mlp": {}}}
    assert [line["run"] for line in logs] == ["dsmoe-small-1k-s0", "dsmoe-small-1k-s1"]
    assert (tmp_path / "record" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "record" / "pairs.png").exists()
    (tmp_path / "runs" / "mended").touch()
    assert main(options) == 0
    assert (tmp_path / "record" / "pairs.png").read_bytes().startswith(b"\x89PNG")
    assert "PARTIAL" not in (tmp_path / "record" / "README.md").read_text()


def test_what_a_record_holds_is_not_trained_again(study, tmp_path):
    output, record = tmp_path / "runs", tmp_path / "record"
    options = [str(study), "--output", str(output), "--record", str(record), "--only"]
    assert main([*options, "dsmoe-*"]) == 0
    before = json.loads((record / "results.json").read_text())
    shutil.rmtree(output)
    assert main([*options, "*-small-*"]) == 0
    assert not (output / "dsmoe-small-1k-s0").exists()
    after = json.loads((record / "results.json").read_text())
    assert [row for row in after["runs"] if row["kind"] == "dsmoe"] == before["runs"]
    assert len(after["runs"]) == 6 and len(after["missing"]) == 4
    logs = [json.loads(line)["run"] for line in (record / "logs.jsonl").read_text().splitlines()]
    assert logs == [row["name"] for row in after["runs"]]
    # the same text at another place is the same study; another setting, another seed's name or another text is not
    assert main([*options, "dsmoe-*", "--set", "data.path=elsewhere"]) == 0
    assert not (output / "dsmoe-small-1k-s0").exists()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "meta.json").write_text("{}")
    assert main([*options, "dsmoe-*", "--set", f"data.path={corpus}"]) == 0
    assert (output / "dsmoe-small-1k-s0").exists() and (output / "dsmoe-small-1k-s1").exists()
    shutil.rmtree(output)
    assert main([*options, "*-small-*", "--set", "optim.eps=1e-6"]) == 0
    assert len(list(output.glob("*/summary.json"))) == 6


def test_a_set_value_is_the_one_that_a_yaml_would_have(study, tmp_path, monkeypatch):
    """As a string a fraction of the mask phase kept runs from sharing their dense stage."""
    seen = []
    monkeypatch.setattr(command, "_carry_out", lambda args, study, chosen: seen.extend(chosen))
    words = [word for value in ("mask_phase.fraction=0.7", "train.compile=true", "data.path=a/b", "name=[") for word in
             ("--set", value)]  # fmt: skip
    monkeypatch.setattr(command, "check_runs", lambda *args: None)
    assert main([str(study), "--output", str(tmp_path / "runs"), *words]) == 0
    found = seen[0].settings
    assert (found["mask_phase.fraction"], found["train.compile"], found["data.path"]) == (0.7, True, "a/b")
    assert found["name"] == "["


def test_what_starts_from_another_run_is_left_to_the_trainer(study, tmp_path):
    content = copy.deepcopy(STUDY)
    content["groups"]["dsmoe"]["settings"] = {"train.init_from": "yet/to/come", "model.num_experts": 7}
    study.write_text(yaml.safe_dump(content))
    assert main([str(study), "--output", str(tmp_path / "runs"), "--list"]) == 0


def test_a_run_of_another_seed_is_not_taken(study, tmp_path, capsys):
    output = tmp_path / "runs"
    assert main([str(study), "--output", str(output), "--only", "dsmoe-*-s0"]) == 0
    shutil.copytree(output / "dsmoe-small-1k-s0", output / "dsmoe-small-1k-s1")
    (output / "dsmoe-small-1k-s1" / "study.json").unlink()
    assert main([str(study), "--output", str(output), "--table-only"]) == 2
    assert "dsmoe-small-1k-s1: holds a run of seed 0, not 1" in capsys.readouterr().err


def test_runs_that_were_measured_otherwise_are_not_compared(study, tmp_path, capsys):
    output = tmp_path / "runs"
    assert main([str(study), "--output", str(output), "--only", "*-small-1k-*"]) == 0
    path = output / "dsmoe-small-1k-s0" / "summary.json"
    summary = json.loads(path.read_text())
    summary["config"]["train"] = {"eval_tokens": 300}
    path.write_text(json.dumps(summary))
    capsys.readouterr()
    assert main([str(study), "--output", str(output), "--table-only"]) == 0
    table = capsys.readouterr().out
    assert "seed 0 left out, since the two runs were measured with train.eval_tokens 300 and 100000." in table
    pair = json.loads((output / "results.json").read_text())["pairs"][0]
    assert pair["seeds"] == [1]


def test_a_finished_run_of_other_settings_is_not_taken(study, tmp_path, capsys):
    output = tmp_path / "runs"
    assert main([str(study), "--output", str(output), "--only", "dsmoe-*"]) == 0
    assert main([str(study), "--output", str(output), "--only", "dsmoe-*", "--set", "optim.eps=1e-6"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_changed_recipe_is_not_taken(study, tmp_path, capsys):
    study.write_text(yaml.safe_dump({**STUDY, "config": "recipe.yaml"}))
    (tmp_path / "recipe.yaml").write_text("optim: {learning_rate: 0.001}")
    options = [str(study), "--output", str(tmp_path / "runs"), "--only", "dsmoe-*"]
    assert main(options) == 0
    assert main(options) == 0
    (tmp_path / "recipe.yaml").write_text("optim: {learning_rate: 0.002}")
    assert main(options) == 2
    assert "other settings" in capsys.readouterr().err


def test_sigterm_stops_the_workers(study, tmp_path, monkeypatch):
    sleeper = "import os, time; open(os.environ['PID_FILE'], 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(launcher, "TRAINER", ["-c", sleeper])
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    found = read_study(study)
    before = signal.getsignal(signal.SIGTERM)

    def kill_when_begun():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill_when_begun, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        launcher.launch(found, found.runs[:2], tmp_path / "runs")
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_deadline_leaves_the_rest(study, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "TRAINER", ["-c", "import time; time.sleep(60)"])
    found = read_study(study)
    ended = launcher.launch(found, found.runs[:3], tmp_path, workers=2, minutes=0.005)
    assert ended["left"] == [run.name for run in found.runs[:3]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nonsense": 1}, "unknown key 'nonsense'"),
        ({"groups": {}}, "groups is empty"),
        ({"groups": {"a": {"seeds": "0"}}}, "seeds is '0'"),
        ({"groups": {"a": {"grid": {"size": [1]}}}}, "must be a mapping"),
        ({"pairs": [["dense", "smoe"]]}, "'smoe', which is neither"),
        ({"pairs": [["dense", "dsmoe-small-1k"]]}, "one of each"),
        ({"config": "missing.yaml"}, "'missing.yaml' is no file"),
        ({"config": 5}, "config is 5; it must be the path"),
        ({"config": ["x"]}, "config is ['x']; it must be the path"),
        ({"pairs": 5}, "pairs is 5; it must be a list"),
        ({"curves": 5}, "curves is 5; it must be a list"),
        ({5: 1, "zz": 2}, "unknown key 5"),
        ({"settings": {5: 1}}, "5 is no dotted name"),
        ({"settings": {"name": datetime.date(2024, 1, 2)}}, "settings.name is datetime.date(2024, 1, 2)"),
        ({"groups": {"a": {"seeds": [True]}}}, "groups.a.seeds is [True]; it must be a list of different"),
        ({"groups": {"a": {"seeds": [-1]}}}, "integers from 0"),
        ({"groups": {"a": {"seeds": [1, 1]}}}, "groups.a.seeds is [1, 1]"),
        ({"groups": {"a": {"seeds": [2**32]}}}, "integers from 0 to 2**32 - 1"),
        (
            {"groups": {"a": {"seeds": {"9M": [1]}}}},
            "groups.a.seeds names '9M', which is no point of the grid",
        ),
        ({"groups": {"a": {"grid": {"size": {}}}}}, "groups.a.grid.size has no points"),
        (
            {"settings": {"train.seeds": [0, 1]}},
            "settings: train.seeds is set by the study itself; give the group's `seeds`",
        ),
        (
            {"groups": {"a": {"settings": {"train.output_dir": "x"}}}},
            "train.output_dir is set by the study itself",
        ),
        (
            {
                "pairs": [["dsmoe-small-1k", "dense-large-1k"]],
                "groups": {**STUDY["groups"], "dsmoe": {**STUDY["groups"]["dsmoe"], "seeds": [5]}},
            },
            "have no point and seed in common",
        ),
        (
            {"pairs": [["dsmoe", "a"]], "groups": {**STUDY["groups"], "a": {}}},
            "have no point and seed in common",
        ),
        (
            {"settings": {**STUDY["settings"], "model.num_expert": 3}},
            "dense-large-1k-s0: unrecognized arguments: --model.num_expert",
        ),
        ({"settings": {**STUDY["settings"], "optim.learning_rate": "fast"}}, "dense-large-1k-s0: "),
        (
            {
                "settings": {**STUDY["settings"], "model.intermediate_size": 7},
                "groups": {"a": {}},
                "pairs": [],
            },
            "a-s0: model.intermediate_size 7 is not divisible by num_experts",
        ),
        ({"groups": {"../a": {}}}, "'../a-s0', which is no name of a folder"),
    ],
)
def test_bad_studies_get_one_clear_line(study, tmp_path, capsys, change, words):
    study.write_text(yaml.safe_dump({**STUDY, **change}))
    assert main([str(study), "--output", str(tmp_path / "runs"), "--list"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"groups: {dense: {}, dense: {seeds: [1]}}", "line 1: the key 'dense' stands twice"),
        (b"title: \xff", "YAML file in UTF-8"),
        (b"groups: [", "line 1: "),
        (None, "No such file"),
    ],
)
def test_what_is_no_yaml_gets_one_clear_line(study, tmp_path, capsys, content, words):
    study.unlink() if content is None else study.write_bytes(content)
    assert main([str(study), "--output", str(tmp_path / "runs"), "--list"]) == 2
    error = capsys.readouterr().err
    assert words in error and str(study) in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("recipe", ["day: 2024-01-02", "a: 1\na: 2"])
def test_a_recipe_that_no_run_can_be_known_by_is_refused(study, tmp_path, capsys, recipe):
    study.write_text(yaml.safe_dump({**STUDY, "config": "recipe.yaml"}))
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main([str(study), "--output", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml: " in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_keys_of_numbers_are_the_same_settings_when_read_back(study, tmp_path):
    content = copy.deepcopy(STUDY)
    content["settings"]["data.weights"] = {2020: 0.5, "b": 0.5}
    study.write_text(yaml.safe_dump(content))
    options = [str(study), "--output", str(tmp_path / "runs"), "--only", "dsmoe-*"]
    assert main(options) == 0
    assert main(options) == 0


@pytest.mark.parametrize(("output", "words"), [("file", "File exists"), ("file/runs", "Not a directory")])
def test_an_impossible_output_is_refused(study, tmp_path, capsys, output, words):
    (tmp_path / "file").touch()
    assert main([str(study), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert f"error: --output {tmp_path / output}: {words}" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "results.json"),
            "results.json: Permission denied",
        ),
    ],
)
def test_a_disk_that_takes_nothing_ends_in_one_line(study, tmp_path, capsys, monkeypatch, problem, words):
    def refuse(*given):
        raise problem

    monkeypatch.setattr(command, "write_json", refuse)
    assert main([str(study), "--output", str(tmp_path / "runs"), "--only", "dsmoe-*"]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert main([str(study), "--output", str(tmp_path / "runs"), "--table-only"]) == 0


def test_list_and_bad_options(study, tmp_path, capsys):
    assert main([str(study), "--output", str(tmp_path), "--list", "--only", "dsmoe*"]) == 0
    assert capsys.readouterr().out.split() == ["dsmoe-small-1k-s0", "dsmoe-small-1k-s1"]
    for options in (["--only", "zzz"], ["--workers", "0"], ["--set", "nothing"]):
        assert main([str(study), "--output", str(tmp_path), *options]) == 2
    assert sys.exc_info() == (None, None, None)


def test_a_curve_follows_a_pair_along_tokens(study, tmp_path, capsys):
    content = {
        **copy.deepcopy(STUDY),
        "curves": [{"pair": ["dsmoe", "dense"], "against": "tokens", "points": ["1k", "100k"]}],
    }
    content["groups"]["dense"]["grid"]["tokens"]["100k"] = {"train.total_tokens": 100_000}
    content["groups"]["dsmoe"]["grid"]["tokens"]["100k"] = {"train.total_tokens": 100_000}
    study.write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mended").touch()
    assert main([str(study), "--output", str(tmp_path / "runs"), "--record", str(tmp_path / "record")]) == 0
    (curve,) = json.loads((tmp_path / "runs" / "results.json").read_text())["curves"]
    assert [(point["label"], point["at"], point["seeds"]) for point in curve["points"]] == [
        ("1k", 1000, [0, 1]),
        ("100k", 100_000, [0, 1]),
    ]
    assert np.allclose([point["differences"] for point in curve["points"]], [[-0.15, -0.15], [-0.35, -0.35]])
    assert curve["line"]["slope"] == pytest.approx(-0.1)  # 0.2 nats in two tenfolds
    assert [ahead["difference"] for ahead in curve["line"]["ahead"]][::2] == pytest.approx([-0.35, -0.45])
    assert (
        "dsmoe - dense against tokens: -0.1000 nats per tenfold"
        in (tmp_path / "runs" / "table.md").read_text()
    )
    assert "![curves](curves.png)" in (tmp_path / "record" / "README.md").read_text()


def test_curves_without_points_are_not_drawn_yet(study, tmp_path):
    content = copy.deepcopy(STUDY)
    content["curves"] = [
        {"pair": ["dsmoe", "dense"], "against": "tokens", "points": ["1k"]},
        {"pair": ["dsmoe", "dense"], "against": "parameters", "points": ["2k"]},
    ]
    content["groups"]["dsmoe"]["grid"]["tokens"]["2k"] = {"train.total_tokens": 2000}
    study.write_text(yaml.safe_dump(content, sort_keys=False))
    options = [str(study), "--output", str(tmp_path / "runs"), "--record", str(tmp_path / "record"), "--only"]
    assert main([*options, "dsmoe-small-1k-*"]) == 0
    assert not (tmp_path / "record" / "curves.png").exists()
    assert main([*options, "dense-small-1k-*"]) == 0
    assert (tmp_path / "record" / "curves.png").exists()


def test_a_line_through_the_means_of_places_and_its_intervals_are_those_of_scipy():
    generator = np.random.default_rng(0)
    places = np.array([2e6, 5e6, 8e6, 3e7])
    at = np.repeat(places, [3, 3, 2, 1])  # a place of one seed counts as much as one of three
    differences = 0.02 - 0.03 * np.log10(at / 2e6) + generator.normal(0, 0.01, at.size)
    found = fit_line(at, differences)
    means = [differences[at == place].mean() for place in places]
    expected = stats.linregress(np.log10(places), means)
    half = stats.t.ppf(0.975, 2) * expected.stderr
    assert found["slope"] == pytest.approx(expected.slope)
    assert found["slope_interval"] == pytest.approx([expected.slope - half, expected.slope + half])
    assert (found["num_places"], found["num_differences"]) == (4, 9)
    assert found["ahead"][1]["at"] == 9e7
    assert found["ahead"][1]["difference"] == pytest.approx(
        expected.intercept + expected.slope * np.log10(9e7)
    )


def test_seeds_that_agree_do_not_hide_that_a_line_does_not_fit():
    at = np.repeat([1e6, 1e7, 1e8], 20)
    bent = fit_line(at, np.repeat([0.0, 0.05, 0.04], 20))
    assert bent["slope_interval"][0] < 0 < bent["slope_interval"][1]


def test_the_mean_of_a_new_place_falls_into_the_interval_ahead_as_often_as_it_says():
    generator = np.random.default_rng(1)
    at = np.repeat([2e6, 5e6, 8e6, 3e7], 2)
    inside = 0
    for _ in range(2000):
        noise, new = generator.normal(0, 0.01, at.size), generator.normal(0, 0.01, 2).mean()
        ahead = fit_line(at, 0.03 * np.log10(at) + noise)["ahead"][2]
        inside += ahead["interval"][0] < 0.03 * np.log10(ahead["at"]) + new < ahead["interval"][1]
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_two_places_make_a_line_without_intervals():
    found = fit_line([1e6, 1e6, 1e7], [0.1, 0.3, 0.3])
    assert found["slope"] == pytest.approx(0.1)
    assert found["slope_interval"] is None and found["ahead"][0]["interval"] is None


@pytest.mark.parametrize(("at", "differences"), [([1e6] * 3, [0.1, 0.2, 0.3]), ([], [])])
def test_one_place_makes_no_line(at, differences):
    assert fit_line(at, differences) is None


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ({"pair": ["dsmoe", "smoe"], "against": "tokens", "points": ["1k"]}, "two groups"),
        ({"pair": ["dsmoe", "dense"], "against": "time", "points": ["1k"]}, "tokens, parameters"),
        ({"pair": ["dsmoe", "dense"], "against": "tokens", "points": ["3k"]}, "'3k'"),
        ({"pair": ["dsmoe", "dense"], "against": "tokens"}, "points"),
        ({"pair": ["dsmoe", "dense"], "against": ["tokens"], "points": ["1k"]}, "against is ['tokens']"),
    ],
)
def test_a_curve_that_names_nothing_is_refused(study, tmp_path, capsys, curve, words):
    study.write_text(yaml.safe_dump({**STUDY, "curves": [curve]}))
    assert main([str(study), "--output", str(tmp_path / "runs"), "--list"]) == 2
    error = capsys.readouterr().err
    assert "curves: " in error
    assert words in error


def test_runs_that_differ_in_their_mask_phase_share_the_steps_before_it(tmp_path):
    phase = {"mask_phase.fraction": 0.4}
    groups = {
        "third": {"settings": {**phase, "mask_phase.target_active": 0.33}, "seeds": [0, 1]},
        "half": {"settings": {**phase, "mask_phase.target_active": 0.5}},
        "other-rate": {"settings": {**phase, "optim.learning_rate": 0.1}},
        "longer": {"settings": {"mask_phase.fraction": 0.5}},
        "all-sparse": {"settings": {"mask_phase.fraction": 1.0}},
        "dense": {"settings": {}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "phases", "groups": groups}), encoding="utf-8")
    found = read_study(path)
    stages = {run.name: shared_stage(found, run) for run in found.runs}
    assert stages["third-s0"] == stages["half-s0"]
    assert {name for name, stage in stages.items() if stage} == {"third-s0", "half-s0"}
    run = next(run for run in found.runs if run.name == "third-s0")
    words = arguments(found, run, tmp_path / "runs", threads=0)
    assert words[words.index("--mask_phase.dense_stage") + 1] == str(
        tmp_path / "runs" / STAGES / stages["third-s0"]
    )
    # a run's record doesn't depend on who else is in the study
    assert not any("dense_stage" in name for name in identity(found, run)["settings"])


def test_a_recipe_may_say_where_the_mask_phase_begins(tmp_path):
    (tmp_path / "recipe.yaml").write_text("mask_phase: {fraction: 0.4}", encoding="utf-8")
    groups = {str(target): {"settings": {"mask_phase.target_active": target}} for target in (0.25, 0.5)}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"config": "recipe.yaml", "groups": groups}), encoding="utf-8")
    found = read_study(path)
    first, second = (shared_stage(found, run) for run in found.runs)
    assert first == second is not None
