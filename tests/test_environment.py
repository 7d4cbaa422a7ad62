"""What a record says of the code that made it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dsmoe
from dsmoe.environment import code, describe, machine_name

PACKAGE = Path(dsmoe.__file__).resolve().parent
ASK = "import sys, json; sys.path.insert(0, sys.argv[1]); from dsmoe.environment import code; print(json.dumps(code()))"


def ask(root):
    import json

    done = subprocess.run([sys.executable, "-c", ASK, str(root)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_code_is_told_by_its_files_and_its_commit(tmp_path):
    """In a copy: the same files are the same code, a changed one is not, and a commit is named where there is one."""
    copy = tmp_path / "dsmoe"
    copy.mkdir()
    for name in ("__init__.py", "environment.py", "errors.py"):
        shutil.copy(PACKAGE / name, copy / name)
    (copy / "__init__.py").write_text("")
    first = ask(tmp_path)
    assert first == ask(tmp_path) and first["commit"] is None and len(first["sha256"]) == 64
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    ).stdout.strip()
    assert ask(tmp_path) == {**first, "commit": head}
    (copy / "errors.py").write_text("changed = True\n")
    assert ask(tmp_path)["sha256"] != first["sha256"] and ask(tmp_path)["commit"] == head


def test_a_record_holds_it():
    assert describe()["code"] == code()


def test_a_machine_is_named_by_what_computes():
    cpu = {"cpu": "Some CPU", "cpu_capability": "AVX2", "accelerators": []}
    assert machine_name(cpu) == "Some CPU, AVX2"
    assert machine_name({**cpu, "accelerators": ["A", "A", "B"]}) == "2 A, 1 B"
    assert machine_name({}) == ""


def test_the_environment_is_of_the_constraints_at_hand(tmp_path):
    """Going back to earlier ones installs them again; other extras of the same ones stay installed."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "setup.py").write_text("")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    script = Path(__file__).parents[1] / "train" / "environment.sh"
    environment = {**os.environ, "DSMOE_VENV": "venv"}

    def installs(constraints, extras):
        (tmp_path / "configs" / "constraints.txt").write_text(constraints)
        (tmp_path / "calls").write_text("")
        command = ["bash", "-euc", f"source {script} '{extras}'"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        return (tmp_path / "calls").read_text().splitlines()

    assert len(installs("torch==1", "")) == 1
    (line,) = installs("torch==1", "[test]")
    assert line.endswith("-e .[test]")
    assert not installs("torch==1", "") and not installs("torch==1", "[test]")
    for constraints in ("torch==2", "torch==1"):
        assert len(installs(constraints, "")) == 1
        assert not installs(constraints, "")
    assert len(installs("torch==1", "[test]")) == 1
