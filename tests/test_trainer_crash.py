"""The crash test finds what it is made for, and finds nothing where there is nothing."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe.trainer.crash_check import Faults, Reference, WatchedRun
from dsmoe.trainer.crash_child import digests
from dsmoe.trainer.crash_test import main

ROOT = Path(__file__).resolve().parents[1]
LOG = [{"step": step, "lm_loss": 1 / step} for step in range(1, 9)]


@pytest.fixture
def watched(tmp_path):
    """A run that was killed after step 6, with checkpoints 2, 4 and 6."""
    run = WatchedRun(
        tmp_path / "run",
        tmp_path / "run.journal",
        Reference(LOG, hashlib.sha256(b"weights").hexdigest(), 1.0, 100, []),
        Faults(),
    )
    (tmp_path / "run.output").write_text("")
    for step in (2, 4, 6):
        write(run, step)
    write_log(run, 6)
    run.check()
    assert not run.faults.count() and sorted(run.complete) == [2, 4, 6]
    return run


def note(run, **line):
    with run.journal.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def write(run, step, noted=True):
    path = run.folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    for name in ("model", "state"):
        (path / name).write_text(f"{name} of step {step}")
    files = {name: {"sha256": digest} for name, digest in digests(path).items() if name != "manifest.json"}
    (path / "manifest.json").write_text(json.dumps({"files": files}))
    path.with_name("latest.json").write_text(json.dumps({"checkpoint": path.name}))
    if noted:
        note(run, saved=step, digests=digests(path))


def write_log(run, steps, change=None):
    lines = [{**line, "tokens_per_second": random.random(), **(change or {})} for line in LOG[:steps]]
    (run.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')


def counts(run):
    run.check()
    return [len(found) for found in vars(run.faults).values()]


def test_what_should_be(watched):
    note(watched, begun=6)
    assert counts(watched) == [0, 0, 0]


def test_an_older_one_is_loss(watched):
    note(watched, begun=4)
    assert counts(watched) == [1, 0, 0]


def test_starting_afresh_is_loss(watched):
    note(watched, begun=0)
    assert counts(watched) == [1, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_damage(watched, seed):
    assert "step-00000006" in watched.damage(random.Random(seed))
    name, _ = watched.damaged[6]
    assert counts(watched) == [0, 0, 0]
    if seed % 4 == 0:
        note(watched, begun=6)
        assert counts(watched) == [0, 1, 0]
    elif seed % 4 == 1:
        note(watched, begun=4)  # without a word
        assert counts(watched) == [0, 1, 0]
    else:
        output = watched.folder.with_name("run.output")
        output.write_text(f"warning: {watched.folder / name}: changed")
        note(watched, begun=4)
        write(watched, 6, noted=seed % 4 == 2)
        assert counts(watched) == [0, 0, 0]
        note(watched, begun=6)
        assert counts(watched) == [0, 0, 0]


@pytest.mark.parametrize("seed", range(12))
def test_a_folder_that_nothing_names_is_not_removed(watched, seed):
    """Killed before the pointer moved: no warning could be asked for."""
    pointer = watched.folder / "checkpoints" / "latest.json"
    pointer.write_text(json.dumps({"checkpoint": "step-00000004"}))
    assert watched.damage(random.Random(seed))
    assert (watched.folder / "checkpoints" / "step-00000006").is_dir()


def test_the_last_intact_one_is_spared(watched):
    draws = random.Random(0)
    assert watched.damage(draws) and watched.damage(draws)
    assert watched.damage(draws) is None


@pytest.mark.parametrize("content", ['{"checkpoint": "step-00000007"}', "{", "{}"])
def test_a_wrong_pointer(watched, content):
    (watched.folder / "checkpoints" / "latest.json").write_text(content)
    assert counts(watched) == [0, 1, 0]


def test_a_change_that_nobody_made(watched):
    (watched.folder / "checkpoints" / "step-00000006" / "state").write_text("other")
    assert counts(watched) == [0, 1, 0]


def test_other_losses(watched):
    write_log(watched, 6, {"lm_loss": 0.5})
    assert counts(watched) == [0, 0, 1]


def test_the_end(watched):
    (watched.folder / "final").mkdir()
    (watched.folder / "final" / "model.safetensors").write_bytes(b"weights")
    write_log(watched, 8)
    watched.check_end()
    assert not watched.faults.count()
    write_log(watched, 7)
    watched.check_end()
    (watched.folder / "final" / "model.safetensors").write_bytes(b"weightt")
    watched.check_end()
    assert len(watched.faults.resume_mismatches) == 3


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--kills", "0"], "--kills is 0"), (["--keep", "."], "--keep .")]
)
def test_refusals(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_three_kills():
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval" / "crash_test.py"), "--kills", "3", "--json", "-"],
        env={**os.environ, "DSMOE_KERNEL": "eager"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [found[name] for name in ("kills", "lost", "corrupt", "resume_mismatches")] == [3, 0, 0, 0]
