"""SIGTERM and Ctrl-C end a run after the step, with a checkpoint, in every process; a second signal ends it at once."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsmoe.trainer import signals
from dsmoe.trainer.loop import TrainingRun
from dsmoe.trainer.signals import StopSignals

ROOT = Path(__file__).resolve().parents[1]
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def signal_in(monkeypatch, step, number):
    """The process gets a signal in the middle of its step number `step` (from 0)."""
    batches = TrainingRun._batches

    def signalled(self):
        if self.step == step:
            os.kill(os.getpid(), number)
        return batches(self)

    monkeypatch.setattr(TrainingRun, "_batches", signalled)


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("step", [0, 4, 7])
def test_a_signal_ends_with_a_checkpoint(train, monkeypatch, capsys, number, step):
    whole = train("whole")
    handlers = [signal.getsignal(each) for each in STATUS]
    with monkeypatch.context() as patch:
        signal_in(patch, step, number)
        run = train("run")
    assert run.status == STATUS[number]
    told = capsys.readouterr().err
    assert (
        f"{number.name}: stopped after step {step + 1}, with a checkpoint" in told and "Traceback" not in told
    )
    assert [signal.getsignal(each) for each in STATUS] == handlers
    assert [line["step"] for line in run.log()] == list(range(1, step + 2))
    assert [path.name for path in (run.folder / "checkpoints").glob("step-*")] == [f"step-{step + 1:08d}"]
    assert not (run.folder / "run.lock").exists() and not (run.folder / "final").exists()
    assert train("run", train__resume=True).status == 0
    assert run.log() == whole.log()


def test_a_full_disk_while_stopping(train, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        signal_in(patch, 4, signal.SIGTERM)
        patch.setattr("dsmoe.checkpoint.folder.save_file", full)
        assert train("run").status == 2
    assert "disk is full" in capsys.readouterr().err.splitlines()[-1]


def test_the_same_signal_twice_at_once_is_one():
    """A launcher passes on what the terminal has sent to everyone."""
    with StopSignals(speak=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT


@pytest.mark.parametrize("number", STATUS)
def test_a_second_signal_ends_at_once(number):
    script = f"""
import runpy, time
names = runpy.run_path({signals.__file__!r})
with names["StopSignals"]() as stop:
    print("ready", flush=True)
    time.sleep(0.1)
    while True:
        time.sleep(0.01)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    # it counts from when the process has heard, which may take a busy machine a while
    told = process.stderr.readline() + process.stderr.readline()
    assert f"{number.name}: finishing the step" in told
    time.sleep(signals._SAME_SIGNAL_SECONDS + 0.3)
    assert process.poll() is None
    process.send_signal(number)
    _, rest = process.communicate(timeout=10)
    assert process.returncode == -number
    assert "Traceback" not in rest


# one of two processes gets the signal, in the middle of a step
DRIVER = """
import faulthandler, os, runpy, signal, sys
faulthandler.dump_traceback_later(100)
from dsmoe.trainer.loop import TrainingRun
batches = TrainingRun._batches
def signalled(self):
    if self.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return batches(self)
TrainingRun._batches = signalled
import gc
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
end_training = Accelerator.end_training
def checked(self):
    # one that outlives the process group may hang when it is freed
    alive = [each for each in gc.get_objects() if isinstance(each, DistributedDataParallel)]
    open(sys.argv[2] + ".alive." + os.environ["RANK"], "w").write(str(len(alive)))
    del alive
    end_training(self)
Accelerator.end_training = checked
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as stopped:
    open(sys.argv[2] + "." + os.environ["RANK"], "w").write(str(stopped.code))
"""


def finished(words, environment, seconds):
    """The completed process; after so many seconds it and its children are killed, and the status is -9."""
    with subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for child in descendants(process.pid):
                os.kill(child, signal.SIGKILL)
            out, err = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, out, err)


def descendants(pid):
    """The process and all below it (torchrun's workers are in sessions of their own)."""
    found = [pid]
    for parent in found:
        listed = Path(f"/proc/{parent}/task/{parent}/children")
        found += [int(word) for word in listed.read_text().split()] if listed.exists() else []
    return found


def test_all_processes_stop_together(train_arguments, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(script=str(ROOT / "train" / "pretrain.py")))
    arguments = train_arguments(tmp_path / "run", train__num_processes=2)
    place = arguments.index("--train.output_dir")
    arguments = [*arguments[place : place + 2], *arguments[:place], *arguments[place + 2 :]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    words = [*launcher, str(tmp_path / "driver.py"), *arguments]
    # where a process is left waiting, the driver prints where
    done = finished(words, {**environment, "OMP_NUM_THREADS": "1"}, 120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"run.{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert [(tmp_path / f"run.alive.{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["step"] == 4 and done.stderr.count("stopped after step 4") == 1
