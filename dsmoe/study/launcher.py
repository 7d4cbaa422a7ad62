"""Runs the runs of a study, several at a time, and picks up where it was broken off."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from dsmoe.data.corpus import META
from dsmoe.errors import UserError
from dsmoe.files import load_yaml, read_json, sha256, write_json
from dsmoe.study.spec import Study, StudyRun

# a study starts the trainer without the entry script, so that it also works from an installed package
TRAINER = ["-c", "import sys; from dsmoe.trainer import main; sys.exit(main(sys.argv[1:]))"]
# where the text lies differs between machines; the corpus itself is compared by its fingerprint
PLACES = ("data.path",)
# in the output folder, beside the runs
STAGES = "dense-stages"


def arguments(study: Study, run: StudyRun, output: Path, threads: int) -> list[str]:
    """The trainer's command line of one run."""
    found = ["--config", str(study.config)] if study.config else []
    settings = {"name": run.name, **run.settings, "train.seeds": [run.seed]}
    settings |= {"train.output_dir": str(output / run.name), "train.resume": True}
    if threads:
        settings["train.num_threads"] = threads
    stage = shared_stage(study, run)
    if stage:
        settings["mask_phase.dense_stage"] = str(output / STAGES / stage)
    for name, value in settings.items():
        found += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return found


def shared_stage(study: Study, run: StudyRun) -> str | None:
    """Name of the folder of the dense stage that other runs of the study have in common with this one.

    They differ in nothing but what their mask phase, which all begin at the same step, does. None: there are none.
    """
    own = _before_mask_phase(study, run)
    if own is None:
        return None
    sharing = [
        other for other in study.runs if other.seed == run.seed and _before_mask_phase(study, other) == own
    ]
    return hashlib.sha256(own.encode()).hexdigest()[:16] if len(sharing) > 1 else None


def _before_mask_phase(study: Study, run: StudyRun) -> str | None:
    """All that the steps before a run's mask phase depend on, but for its seed; None: it has no such steps."""
    own = identity(study, run)
    recipe = own["recipe"] if isinstance(own["recipe"], Mapping) else {}
    phase = recipe.get("mask_phase")
    fraction = own["settings"].get(
        "mask_phase.fraction", phase.get("fraction") if isinstance(phase, Mapping) else None
    )
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        return None
    settings = {name: value for name, value in own["settings"].items() if not name.startswith("mask_phase.")}
    recipe = {name: value for name, value in recipe.items() if name != "mask_phase"}
    return json.dumps([settings, recipe, fraction], sort_keys=True)


def identity(study: Study, run: StudyRun) -> dict[str, Any]:
    """What a run's result depends on, as study.json holds it: its settings and the recipe under them."""
    recipe = load_yaml(study.config) if study.config else None
    return json.loads(json.dumps({"study": study.name, "settings": run.settings, "recipe": recipe}))


def without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An `identity` but for the settings that say where things lie."""
    settings = {name: value for name, value in identity["settings"].items() if name not in PLACES}
    return {**identity, "settings": settings}


def corpus_of(study: Study, run: StudyRun) -> str | None:
    """Fingerprint of the text that the run would read now; None where it isn't on this machine."""
    own = identity(study, run)
    data = own["recipe"].get("data") if isinstance(own["recipe"], Mapping) else None
    path = own["settings"].get("data.path", data.get("path") if isinstance(data, Mapping) else None)
    meta = Path(str(path), META)
    return sha256(meta) if path and meta.is_file() else None


def is_finished(study: Study, run: StudyRun, output: Path) -> bool:
    """Whether the run's summary is there. A folder without study.json, which no study began, is taken as it is.

    Raises:
        UserError: the folder holds a run, finished or not, of other settings, of another recipe or of another text.
    """
    folder = output / run.name
    begun, summary = folder / "study.json", folder / "summary.json"
    if begun.exists() and without_places(read_json(begun)) != without_places(identity(study, run)):
        raise UserError(f"{folder}: holds a run of other settings; remove it, or name another --output")
    if not summary.exists():
        return False
    found = read_json(summary)
    if found["seed"] != run.seed:
        raise UserError(
            f"{folder}: holds a run of seed {found['seed']}, not {run.seed}; remove it, or name another --output"
        )
    read, present = found["environment"].get("corpus"), corpus_of(study, run)
    if read and present and read != present:
        raise UserError(f"{folder}: holds a run of another text; remove it, or name another --output")
    return True


class Worker:
    """A running training process with its log, on one GPU where there are any."""

    def __init__(self, study: Study, run: StudyRun, output: Path, threads: int, gpu: str | None) -> None:
        self.run, self.folder, self.gpu = run, output / run.name, gpu
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "study.json", identity(study, run))
        self.log: IO[bytes] = (self.folder / "output.log").open("ab")
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, *TRAINER, *arguments(study, run, output, threads)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)

    def stop(self) -> None:
        """Ask the run to write a checkpoint and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for its end and close its log."""
        self.process.wait()
        self.log.close()

    def last_words(self) -> str:
        """The last line of its log."""
        lines = (
            (self.folder / "output.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        )
        return lines[-1].split("\r")[-1] if lines else "no output"


def gpus() -> list[str]:
    """Names of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES gives them."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does: otherwise the workers would go on without their launcher."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launch(
    study: Study,
    runs: Sequence[StudyRun],
    output: Path,
    *,
    workers: int = 1,
    threads: int = 0,
    minutes: float = 0,
) -> dict[str, Any]:
    """Run what is not finished yet.

    Args:
        study: the study.
        runs: those of its runs to do, in order.
        output: the folder of the study; every run gets a folder in it.
        workers: runs at a time, spread over the GPUs.
        threads: torch threads of each; 0: torch's default.
        minutes: stop after so long (runs that are under way are asked for a checkpoint); 0: no limit.

    Returns:
        {"finished": names, "failed": {name: last line}, "left": names}.
    """
    left = [run for run in runs if not is_finished(study, run, output)]
    finished = [run.name for run in runs if run not in left]
    failed: dict[str, str] = {}
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    bar = tqdm(total=len(runs), initial=len(finished), unit="run", desc=study.name, dynamic_ncols=True)
    shown = ""
    active: list[Worker] = []
    devices = gpus()
    with _exit_on_sigterm():
        try:
            while (left or active) and time.monotonic() < deadline:
                while left and len(active) < workers:
                    busy = [worker.gpu for worker in active]
                    gpu = min(devices, key=busy.count, default=None)
                    active.append(Worker(study, left.pop(0), output, threads, gpu))
                names = ", ".join(worker.run.name for worker in active)[:60]
                if names != shown:  # each refresh is a line in a log file
                    shown = names
                    bar.set_postfix_str(names)
                time.sleep(0.2)
                for worker in [worker for worker in active if worker.process.poll() is not None]:
                    active.remove(worker)
                    worker.wait()
                    if is_finished(study, worker.run, output):
                        finished.append(worker.run.name)
                    else:
                        failed[worker.run.name] = worker.last_words()
                        tqdm.write(f"failed: {worker.run.name}: {failed[worker.run.name]}", file=sys.stderr)
                    bar.update()
        finally:
            for worker in active:
                worker.stop()
            for worker in active:
                worker.wait()
            bar.close()
    unfinished = [worker.run.name for worker in active] + [run.name for run in left]
    return {"finished": finished, "failed": failed, "left": unfinished}
