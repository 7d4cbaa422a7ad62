"""Two runs in one folder: the second is refused; what a dead one has left is taken over, aloud."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsmoe import lock
from dsmoe.errors import UserError

# a process that holds the lock; the module alone, for torch takes seconds
HOLDER = f"""
import importlib.util, pathlib, sys, types
sys.modules["dsmoe"] = types.ModuleType("dsmoe")
sys.modules["dsmoe"].__path__ = [{str(Path(lock.__file__).parent)!r}]
spec = importlib.util.spec_from_file_location("lock", {lock.__file__!r})
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
if sys.argv[2] == "without flock":
    lock.fcntl = None
with lock.FolderLock(pathlib.Path(sys.argv[1]), "name another"):
    print("held", flush=True)
    sys.stdin.read()
"""


def lock_of(folder):
    return lock.FolderLock(folder, "name another --output")


FLOCK = pytest.mark.parametrize("flock", ["with flock", "without flock"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def hold(tmp_path):
    """hold("with flock") -> a process that holds the lock of tmp_path."""
    started = []

    def start(flock):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), flock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)


@FLOCK
def test_the_second_is_refused_and_the_dead_is_followed(tmp_path, hold, flock, monkeypatch, capsys):
    if flock == "without flock":
        monkeypatch.setattr(lock, "fcntl", None)
    process = hold(flock)
    with pytest.raises(
        UserError,
        match=f"another run is writing there .*process {process.pid} on .*, or name another --output$",
    ) as caught:
        lock_of(tmp_path).__enter__()
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    process.kill()
    process.wait()
    assert (tmp_path / "run.lock").exists()
    with lock_of(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    told = capsys.readouterr().err
    assert f"left by process {process.pid} on" in told and "taken over" in told
    assert not names(tmp_path)


@FLOCK
def test_released_at_a_good_end(tmp_path, hold, flock, capsys):
    process = hold(flock)
    process.communicate("")
    assert process.returncode == 0 and not names(tmp_path)
    with lock_of(tmp_path):
        pass
    assert not capsys.readouterr().err


def test_released_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock_of(tmp_path / "new"):
            raise ZeroDivisionError
    assert not names(tmp_path / "new")


def foreign(tmp_path, **changes):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({**lock._this_process(), **changes}))
    return path


def test_the_number_of_a_process_may_be_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    foreign(tmp_path)
    with pytest.raises(UserError):
        lock_of(tmp_path).__enter__()
    for changes in ({"start_time": "1"}, {"boot_id": "another"}, {"pid": 2**22 + 1}):
        foreign(tmp_path, **changes)
        with lock_of(tmp_path):
            pass


@FLOCK
def test_another_machine_is_waited_for(tmp_path, flock, monkeypatch, capsys):
    if flock == "without flock":
        monkeypatch.setattr(lock, "fcntl", None)
    path = foreign(tmp_path, host="elsewhere")
    with lock_of(tmp_path):
        pass
    assert "waiting" in capsys.readouterr().err
    path = foreign(tmp_path, host="elsewhere")
    sign = threading.Timer(0.05, lambda: os.utime(path, (time.time() + 5,) * 2))
    sign.start()
    with pytest.raises(UserError, match="on elsewhere"):
        lock_of(tmp_path).__enter__()


def test_a_sign_of_life_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    with lock_of(tmp_path):
        os.utime(tmp_path / "run.lock", (0, 0))
        deadline = time.monotonic() + 5
        while (tmp_path / "run.lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "run.lock").stat().st_mtime > 0


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_an_unreadable_lock(tmp_path, content, monkeypatch):
    (tmp_path / "run.lock").write_text(content)
    with lock_of(tmp_path):
        pass
    (tmp_path / "run.lock").write_text(content)
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(UserError, match="unknown"):
        lock_of(tmp_path).__enter__()


def test_training_is_refused(train, tmp_path, hold, capsys):
    """The run's folder itself, before anything in it is touched."""
    process = hold("with flock")
    assert train(".").status == 2
    assert f"process {process.pid}" in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path) == ["run.lock"]
