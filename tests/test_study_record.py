"""What a study takes for finished, and what its record may replace; with a stand-in trainer."""

import json
import shutil

import pytest
import yaml

from dsmoe.records import write_record
from dsmoe.study import launcher
from dsmoe.study.command import main
from dsmoe.study.curves import Curve
from dsmoe.study.spec import Study, StudyRun
from dsmoe.study.tabulate import collect, table

STUDY = {
    "name": "toy",
    "settings": {
        "data.path": "text",
        "data.sequence_length": 8,
        "train.global_batch_size": 1,
        "train.total_tokens": 1000,
    },
    "groups": {
        "dense": {"settings": {"model.kind": "dense", "model.num_experts": 1}, "seeds": [0, 1]},
        "dsmoe": {"seeds": [0, 1]},
    },
    "pairs": [["dsmoe", "dense"]],
}
NAMES = ["dense-s0", "dense-s1", "dsmoe-s0", "dsmoe-s1"]

# reads its text as the trainer does (from the setting, or else from the recipe), fails while a file says so
STAND_IN = """
import hashlib, json, pathlib, sys, yaml
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(options["--train.output_dir"])
if (folder.parent / ("fail-" + folder.name)).exists():
    print("error: a made-up problem"); sys.exit(2)
recipe = yaml.safe_load(open(options["--config"])) if "--config" in options else {}
meta = pathlib.Path(options.get("--data.path", recipe.get("data", {}).get("path", "nowhere")), "meta.json")
corpus = hashlib.sha256(meta.read_bytes()).hexdigest() if meta.exists() else None
kind, seed = options.get("--model.kind", "dsmoe"), json.loads(options["--train.seeds"])[0]
loss = 3.0 + seed + float(options.get("--optim.eps", 0))
(folder / "log.jsonl").write_text(json.dumps({"step": 1, "lm_loss": loss}) + "\\n")
(folder / "summary.json").write_text(json.dumps({
    "kind": kind, "seed": seed, "tokens": 1000, "validation_loss": loss, "test_loss": loss, "num_params_total": 10,
    "num_params_active": 5, "training_flops": 1e9, "environment": {"corpus": corpus}, "config": {"model": {}}}))
"""

# writes its GPU and waits until the run of the other seed has, so that two are sure to run at a time
MEETS = """
import os, pathlib, sys, time
folder = pathlib.Path(dict(zip(sys.argv[1::2], sys.argv[2::2]))["--train.output_dir"])
(folder / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
other = folder.with_name(folder.name[:-1] + str(1 - int(folder.name[-1]))) / "gpu"
for _ in range(600):
    if other.exists(): break
    time.sleep(0.1)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with toy.yaml and a text."""
    monkeypatch.setattr(launcher, "TRAINER", ["-c", STAND_IN])
    text(tmp_path / "text", 1)
    write_study(tmp_path)
    return tmp_path


def text(folder, content):
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(content))


def write_study(place, settings=None, **more):
    settings = {**STUDY["settings"], "data.path": str(place / "text"), **(settings or {})}
    (place / "toy.yaml").write_text(yaml.safe_dump({**STUDY, "settings": settings, **more}))


def run(place, *words, output="runs", record="record"):
    options = ["--record", str(place / record)] if record else []
    return main([str(place / "toy.yaml"), "--output", str(place / output), *options, *words])


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(place):
    return {row["name"]: row for row in json.loads((place / "record" / "results.json").read_text())["runs"]}


def last_line(capsys):
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("precious", "is no record (it holds a folder, sub)"),
        ("precious/sub", "is no record (it has no record.json)"),
        ("precious/sub/file", "is a file"),
        ("runs", "holds --output"),
        (".", "holds --output"),
    ],
)
def test_a_folder_that_is_no_record_is_never_replaced(place, capsys, record, words):
    (place / "precious" / "sub").mkdir(parents=True)
    (place / "precious" / "sub" / "file").write_text("precious")
    before = content(place)
    assert run(place, record=record) == 2
    assert words in last_line(capsys)
    assert content(place) == before  # nothing was trained either


@pytest.mark.parametrize(
    "results",
    [
        None,
        [],
        {},
        {"name": "toy", "runs": [{"arm": "a"}], "environment": {}},
        {"runs": [{"arm": "a"}], "summary": {}},
    ],
)
def test_a_record_of_another_kind_is_never_replaced(place, capsys, results):
    files = []
    if results is not None:
        (place / "results.json").write_text(json.dumps(results))
        files = [place / "results.json"]
    write_record(place / "record", title="t", command="c", conclusion="", files=files)
    before = content(place)
    assert run(place) == 2
    assert "not of a study" in last_line(capsys)
    assert content(place) == before


def test_the_record_of_another_study_is_never_replaced(place, capsys):
    assert run(place) == 0
    write_study(place, name="other")
    assert run(place, output="others") == 2
    assert "record of the study 'toy'" in last_line(capsys)
    assert not (place / "others").exists()


def make_unknown(place):
    """The record as older versions wrote it: nothing says of what settings its runs are."""
    path = place / "record" / "results.json"
    results = json.loads(path.read_text())
    for row in results["runs"]:
        del row["digest"]
    path.write_text(json.dumps(results))


def test_a_whole_record_is_not_replaced_by_a_part(place, capsys):
    assert run(place) == 0
    make_unknown(place)
    before = content(place / "record")
    assert run(place, "--table-only", output="none") == 2
    assert "holds 4 finished run(s)" in last_line(capsys) and not (place / "none").exists()
    for name in NAMES[1:]:
        shutil.rmtree(place / "runs" / name)
    assert run(place, "--table-only") == 2
    assert "holds 3 finished run(s) that the new one would not, the first dense-s1" in last_line(capsys)
    # what this call would leave out it can't bring back either: refused before anything is trained
    assert run(place, "--only", "dsmoe-*") == 2
    assert "the first dense-s1" in last_line(capsys)
    assert not (place / "runs" / "dsmoe-s0").exists()
    # all of them are to come, and one doesn't: refused at the end, and what was trained stays
    (place / "runs" / "fail-dsmoe-s1").touch()
    assert run(place) == 2
    words = capsys.readouterr().err
    assert "note: " in words and "3 of its runs are of other settings" in words
    assert "1 run(s) failed" in words and "holds 1 finished run(s)" in words.strip().splitlines()[-1]
    assert content(place / "record") == before
    assert (place / "runs" / "dsmoe-s0" / "summary.json").exists()
    (place / "runs" / "fail-dsmoe-s1").unlink()
    assert run(place) == 0
    assert list(rows_of(place)) == NAMES and all("digest" in row for row in rows_of(place).values())


def test_runs_that_the_study_no_longer_names_give_way_to_as_many(place, capsys):
    assert run(place) == 0
    groups = {"dense": STUDY["groups"]["dense"], "ours": {"seeds": [0]}}
    write_study(place, groups=groups, pairs=[])
    assert run(place) == 2
    assert "holds 2 finished run(s)" in last_line(capsys)
    groups["ours"]["seeds"] = [0, 1]
    write_study(place, groups=groups, pairs=[])
    assert run(place) == 0
    assert list(rows_of(place)) == ["dense-s0", "dense-s1", "ours-s0", "ours-s1"]


def test_old_losses_are_never_given_new_settings(place, capsys):
    assert run(place) == 0
    before = content(place)
    write_study(place, {"optim.eps": 1.0})
    assert run(place, "--table-only") == 2
    assert f"{place / 'runs' / 'dense-s0'}: holds a run of other settings" in last_line(capsys)
    write_study(place)
    assert content(place) == before


def test_the_same_text_elsewhere_is_the_same_run_and_another_text_is_not(place, capsys):
    assert run(place) == 0
    shutil.copytree(place / "text", place / "moved")
    write_study(place, {"data.path": str(place / "moved")})
    assert run(place, "--table-only") == 0
    # the row says where the run read it
    assert rows_of(place)["dense-s0"]["settings"]["data.path"] == str(place / "text")
    text(place / "new", 2)
    write_study(place, {"data.path": str(place / "new")})
    assert run(place, "--table-only", record=None) == 2
    assert "holds a run of another text" in last_line(capsys)


def test_a_folder_that_no_study_began_is_taken_and_claims_no_settings(place):
    assert run(place, "--only", "dense-*") == 0
    (place / "runs" / "dense-s0" / "study.json").unlink()
    assert run(place, "--table-only") == 0
    assert "digest" not in rows_of(place)["dense-s0"] and "digest" in rows_of(place)["dense-s1"]


def test_the_text_of_a_recipe_is_compared_too(place, capsys):
    (place / "recipe.yaml").write_text(yaml.safe_dump({"data": {"path": str(place / "text")}}))
    settings = {name: value for name, value in STUDY["settings"].items() if name != "data.path"}
    study = {**STUDY, "settings": settings, "config": "recipe.yaml"}
    (place / "toy.yaml").write_text(yaml.safe_dump(study))
    assert run(place) == 0
    shutil.rmtree(place / "runs")
    assert run(place) == 0
    assert not (place / "runs" / "dense-s0").exists()  # kept
    (place / "text" / "meta.json").write_text("2")
    assert run(place) == 0
    assert "4 of its runs" in capsys.readouterr().err
    assert (place / "runs" / "dense-s0" / "summary.json").exists()


def test_a_damaged_log_of_a_record_is_named(place, capsys):
    assert run(place) == 0
    with (place / "record" / "logs.jsonl").open("a") as handle:
        handle.write("torn\n")
    assert run(place) == 2
    assert "logs.jsonl: line 5 is no log line" in last_line(capsys)


def test_the_log_of_a_kept_run_is_the_record_s(place):
    assert run(place) == 0
    before = (place / "record" / "logs.jsonl").read_text()
    (place / "runs" / "dense-s0" / "summary.json").unlink()  # the folder of a run that has only begun
    (place / "runs" / "dense-s0" / "log.jsonl").write_text("")
    assert run(place, "--table-only") == 0
    assert (place / "record" / "logs.jsonl").read_text() == before


def finished(output, group, seed, corpus, flops=1e9):
    """A run that has ended, in its folder."""
    summary = {
        "kind": group, "seed": seed, "tokens": 1000, "validation_loss": 3.0, "test_loss": 3.0 + (group == "dense"),
        "num_params_total": 10, "num_params_active": 5, "training_flops": flops, "environment": {"corpus": corpus},
        "config": {"model": {}},
    }  # fmt: skip
    folder = output / f"{group}-1k-s{seed}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return StudyRun(folder.name, group, {"tokens": "1k"}, seed, {})


def test_runs_of_different_texts_are_not_compared(tmp_path):
    runs = [finished(tmp_path, "dsmoe", seed, corpus) for seed, corpus in enumerate(["a", "a", None])]
    runs += [finished(tmp_path, "dense", seed, corpus) for seed, corpus in enumerate(["a", "b", "b"])]
    curve = Curve(("dsmoe", "dense"), "tokens", ("1k",))
    results = collect(Study("toy", None, runs, pairs=[("dsmoe", "dense")], curves=[curve]), tmp_path)
    (pair,) = results["pairs"]
    assert pair["seeds"] == [0, 2] and pair["test"]["differences"] == [-1.0, -1.0]
    assert results["curves"][0]["points"][0]["seeds"] == [0, 2]
    note = "dsmoe-1k - dense-1k: seed 1 left out, since the two runs read different texts."
    assert results["notes"] == [note] and table(results).endswith(note)


def test_losses_of_different_parts_of_a_split_are_not_compared(tmp_path):
    runs = [finished(tmp_path, group, seed, "a") for group in ("dsmoe", "dense") for seed in (0, 1)]
    study = Study("toy", None, runs, pairs=[("dsmoe", "dense")])
    assert collect(study, tmp_path)["notes"] == []  # all of them alike
    for name in ("dsmoe-1k-s0", "dsmoe-1k-s1", "dense-1k-s1"):
        path = tmp_path / name / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "evaluation_windows": "spread"}))
    results = collect(study, tmp_path)
    assert results["pairs"][0]["seeds"] == [1]
    assert results["notes"] == [
        "dsmoe-1k - dense-1k: seed 0 left out, since the two runs were measured on different parts of a split.",
        "Measured by an older version on the first tokens of each source, which is another text: dense-1k-s0.",
    ]


def test_flops_are_means_and_a_difference_is_told(tmp_path):
    runs = [finished(tmp_path, "dsmoe", seed, None, flops) for seed, flops in enumerate([1e9, 1.2e9])]
    runs += [finished(tmp_path, "dense", seed, None, flops) for seed, flops in enumerate([1e9, 1.009e9])]
    shown = table(collect(Study("toy", None, runs), tmp_path))
    assert "1.10e+09" in shown and "1.00e+09" in shown
    assert shown.splitlines()[-1].startswith(
        "FLOPs of dsmoe-1k are means over seeds that differ by more than 1%"
    )
    runs = runs[2:]
    assert "FLOPs of" not in table(collect(Study("toy", None, runs), tmp_path))


def test_runs_at_a_time_have_gpus_of_their_own(place, monkeypatch):
    monkeypatch.setattr(launcher, "TRAINER", ["-c", MEETS + STAND_IN])
    monkeypatch.setattr(launcher, "gpus", lambda: ["3", "5"])
    assert main([str(place / "toy.yaml"), "--output", str(place / "out"), "--workers", "2"]) == 0
    given = {name: (place / "out" / name / "gpu").read_text() for name in NAMES}
    assert {given["dense-s0"], given["dense-s1"]} == {given["dsmoe-s0"], given["dsmoe-s1"]} == {"3", "5"}


def test_gpus_are_those_that_are_visible(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launcher.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert launcher.gpus() == ["4", "7"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert launcher.gpus() == []


OTHER = {
    "name": "other",
    "groups": {
        "twin": {"settings": {"model.kind": "dense", "model.num_experts": 1}, "seeds": [1, 2]},
        "odd": {"settings": {"optim.eps": 0.5}, "seeds": [0]},
    },
    "pairs": [],
}


def run_other(place, **changed):
    settings = {**STUDY["settings"], "data.path": str(place / "text")}
    also = [str(place / "record")]
    (place / "other.yaml").write_text(
        yaml.safe_dump({**OTHER, "settings": settings, "also": also, **changed})
    )
    options = ["--output", str(place / "other-runs"), "--record", str(place / "other-record")]
    return main([str(place / "other.yaml"), *options])


def test_runs_that_another_study_trained_are_taken(place):
    assert run(place) == 0
    assert run_other(place) == 0
    # of another seed, and of other settings
    assert {path.name for path in (place / "other-runs").iterdir() if path.is_dir()} == {"twin-s2", "odd-s0"}
    results = json.loads((place / "other-record" / "results.json").read_text())
    rows = {row["name"]: row for row in results["runs"]}
    assert set(rows) == {"twin-s1", "twin-s2", "odd-s0"}
    taken, theirs = rows["twin-s1"], rows_of(place)["dense-s1"]
    assert taken["from"] == {"study": "toy", "run": "dense-s1"} and taken["group"] == "twin"
    assert taken["validation_loss"] == theirs["validation_loss"] and taken["digest"] != theirs["digest"]
    assert "from" not in rows["twin-s2"]
    assert any("twin-s1 (toy)" in note for note in results["notes"])
    lines = [json.loads(line) for line in (place / "other-record" / "logs.jsonl").read_text().splitlines()]
    assert {line["run"]: line["lm_loss"] for line in lines} == {
        "twin-s1": 4.0,
        "twin-s2": 5.0,
        "odd-s0": 3.5,
    }
    # and from then on they are its own record's
    shutil.rmtree(place / "other-runs")
    shutil.rmtree(place / "runs")
    assert run_other(place, title="again") == 0
    assert not any(path.is_dir() for path in (place / "other-runs").iterdir())
    assert json.loads((place / "other-record" / "results.json").read_text())["runs"] == results["runs"]


def test_one_run_of_another_study_may_be_several_of_this(place):
    """Such as the group that a grid varies and the point of the grid that varies nothing."""
    assert run(place) == 0
    twin = OTHER["groups"]["twin"]
    assert run_other(place, groups={"twin": twin, "again": twin}) == 0
    lines = [json.loads(line) for line in (place / "other-record" / "logs.jsonl").read_text().splitlines()]
    found = {line["run"]: line["lm_loss"] for line in lines}
    assert found["twin-s1"] == found["again-s1"] == 4.0
    results = json.loads((place / "other-record" / "results.json").read_text())
    assert {row["name"] for row in results["runs"]} == {"twin-s1", "twin-s2", "again-s1", "again-s2"}


def test_of_another_text_nothing_is_taken(place):
    assert run(place) == 0
    (place / "text" / "meta.json").write_text("2")
    assert run_other(place) == 0
    assert (place / "other-runs" / "twin-s1").is_dir()


def test_what_also_names_must_be_a_record_of_a_study(place, capsys):
    assert run_other(place) == 2
    assert f"also names {str(place / 'record')!r}, which holds no results.json" in last_line(capsys)
    (place / "record").mkdir()
    (place / "record" / "results.json").write_text("{}")
    assert run_other(place) == 2
    assert "holds a record, but not of a study" in last_line(capsys)


def test_runs_of_several_machines_are_told(tmp_path):
    runs = [finished(tmp_path, "dense", seed, None) for seed in range(4)]
    new, old = {"cpu": "New", "cpu_capability": "AVX512"}, {"cpu": "Old", "accelerators": []}
    for run, hardware in zip(runs, (new, new, old, None), strict=True):
        path = tmp_path / run.name / "summary.json"
        summary = json.loads(path.read_text())
        if hardware:
            summary["environment"]["hardware"] = hardware
        path.write_text(json.dumps(summary))
    results = collect(Study("toy", None, runs), tmp_path)
    assert [row["machine"] for row in results["runs"]] == ["New, AVX512", "New, AVX512", "Old", ""]
    assert results["notes"] == [
        "Trained on New, AVX512, but for runs on Old: dense-1k-s2; on an unrecorded machine: dense-1k-s3."
    ]
    assert collect(Study("toy", None, runs[:2]), tmp_path)["notes"] == []
