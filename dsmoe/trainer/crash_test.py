"""`eval/crash_test.py`: training is killed again and again, and must come out as if nothing had happened."""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from dsmoe.data.prepare import prepare
from dsmoe.data.recipe import Recipe, Source
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.files import write_json
from dsmoe.trainer.crash_check import Faults, Reference, WatchedRun, read_log, weights_digest
from dsmoe.trainer.crash_child import Kill, forked, start_training, wait

EPILOG = """examples:
  python eval/crash_test.py --kills 10
  python eval/crash_test.py --kills 200 --seed 1 --json crash.json

Kills are SIGKILL: before a random operation on the run's files, at a random moment, or while a checkpoint is being
written. After one in four, the newest checkpoint is damaged (a file cut short, a bit flipped, a file or the folder gone).

  lost               training went on from an older checkpoint than the newest complete and undamaged one
  corrupt            a damaged or incomplete checkpoint was taken for whole, pointed to, or passed over without a warning
                     that names the bad file; or going on failed
  resume_mismatches  processes after which the log differs from that of the run left alone, to the bit, and runs that
                     ended with other weights
"""
STEPS = 36
SETTINGS: dict[str, Any] = {
    "model.vocab_size": 300, "model.hidden_size": 32, "model.intermediate_size": 64, "model.num_hidden_layers": 2,
    "model.num_experts": 4, "model.num_attention_heads": 4, "model.num_key_value_heads": 2,
    "model.initializer_range": 0.1, "data.sequence_length": 16, "optim.learning_rate": 0.01,
    "router_loss.router_mi_loss_coef_mlp": 0.1, "train.global_batch_size": 8, "train.micro_batch_size": 4,
    "train.total_tokens": STEPS * 128, "train.log_every_steps": 1, "train.eval_tokens": 300, "train.num_threads": 1,
    "train.save_every_steps": 3, "train.keep_last": 3, "train.resume": True,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "running": {"router_loss.mi_statistics": "running", "guard.spike_stds": 1.0, "guard.spike_window": 4},
    "mask_phase": {"mask_phase.fraction": 0.8, "mask_phase.gain": 0.5, "train.eval_every_tokens": 8 * 128},
    "moa": {"model.num_attention_experts": 2, "model.qk_norm": "per_head", "optim.schedule": "wsd"},
}

COUNTED = ("operation", "moment", "writing", "inside", "damaged", "runs")


@dataclass
class CrashTest:
    """Kills runs of each arm in turn.

    Attributes:
        home: folder for all of it.
        random: draws moments and damage.
        faults: what went wrong.
        counts: kills by kind, those that left a half-written checkpoint, checkpoints damaged and runs finished.
        told: faults that were printed.
    """

    home: Path
    random: Random
    faults: Faults = field(default_factory=Faults)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    told: set[str] = field(default_factory=set)

    def prepare(self) -> None:
        """Make a text, and run each arm once without disturbing it."""
        pid = forked(self._make_corpus, self.home / "corpus.output")
        if wait(pid, self.home, Kill()):
            raise UserError(f"{self.home}: no text could be made ({_tail(self.home / 'corpus.output')})")
        self.references = {arm: self._reference(arm) for arm in ARMS}
        # imported once here, rather than by every process
        for name in self.references["moa"].modules:
            if name not in sys.modules and name.startswith(
                ("torch.", "transformers.", "accelerate.", "dsmoe.")
            ):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)

    def _tell(self, kill: Kill) -> None:
        """Print new faults at once: a long test may itself be broken off."""
        for text in [text for found in vars(self.faults).values() for text in found if text not in self.told]:
            self.told.add(text)
            tqdm.write(f"after {kill}: {text}", file=sys.stderr)

    def kill(self, number: int) -> None:
        """Kill training `number` times, and let the last run come to its end."""
        arms = self._arms()
        with tqdm(total=number, unit="kill", desc="crash test", dynamic_ncols=True) as bar:
            run = next(arms)
            while True:
                kill = self._choose(run) if bar.n < number else Kill()
                seen = self.faults.count()
                status = self._process(run, kill)
                run.check()
                if status == -signal.SIGKILL:
                    bar.update()
                    self.counts[_kind(kill)] += 1
                    self.counts["inside"] += any((run.folder / "checkpoints").glob(".step-*.tmp"))
                    if self.random.random() < 0.25 and run.damage(self.random):
                        self.counts["damaged"] += 1
                elif status == 0:
                    run.check_end()
                    self.counts["runs"] += 1
                else:
                    output = _tail(run.folder.with_name(f"{run.folder.name}.output"))
                    self.faults.corrupt.append(
                        f"{run.folder}: going on ended with status {status} ({output})"
                    )
                self._tell(kill)
                bar.set_postfix({name: len(found) for name, found in vars(self.faults).items()})
                # one fault is counted once: what follows from it is not
                if status == 0 or self.faults.count() > seen:
                    if bar.n >= number:
                        return
                    run = next(arms)

    def report(self, seed: int) -> dict[str, Any]:
        """The numbers, and what went wrong in words."""
        kills = {name: self.counts[name] for name in ("operation", "moment", "writing")}
        return {
            "kills": sum(kills.values()),
            "lost": len(self.faults.lost),
            "corrupt": len(self.faults.corrupt),
            "resume_mismatches": len(self.faults.resume_mismatches),
            "kills_by_kind": kills,
            "kills_inside_writing": self.counts["inside"],
            "damaged_checkpoints": self.counts["damaged"],
            "finished_runs": self.counts["runs"],
            "seed": seed,
            "found": [text for texts in vars(self.faults).values() for text in texts],
        }

    def _arms(self) -> Iterator[WatchedRun]:
        number = 0
        while True:
            arm = list(ARMS)[number % len(ARMS)]
            folder = self.home / f"{number:04d}-{arm}"
            yield WatchedRun(folder, folder.with_suffix(".journal"), self.references[arm], self.faults)
            number += 1

    def _choose(self, run: WatchedRun) -> Kill:
        reference, draw = run.reference, self.random.random()
        if draw < 0.4:
            # a third of them early: while an interrupted run is put in order
            early = self.random.random() < 0.33
            return Kill(operation=self.random.randint(1, 20 if early else reference.operations))
        if draw < 0.7:
            return Kill(after=self.random.uniform(0.0, reference.seconds))
        return Kill(writing=self.random.randint(1, 4), delay=self.random.uniform(0.0, 0.02))

    def _process(self, run: WatchedRun, kill: Kill) -> int:
        arm = run.folder.name.split("-", 1)[1]
        pid = start_training(self._arguments(arm, run.folder), run.folder, run.journal, kill)
        try:
            return wait(pid, run.folder, kill)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise

    def _reference(self, arm: str) -> Reference:
        folder = self.home / f"whole-{arm}"
        journal = folder.with_suffix(".journal")
        began = time.monotonic()
        pid = start_training(self._arguments(arm, folder), folder, journal, Kill())
        if wait(pid, folder, Kill()):
            raise UserError(
                f"{folder}: the run left alone fails ({_tail(folder.with_name(folder.name + '.output'))})"
            )
        last = json.loads(journal.read_text(encoding="utf-8").splitlines()[-1])
        seconds = time.monotonic() - began
        return Reference(
            read_log(folder), weights_digest(folder), seconds, last["operations"], last["modules"]
        )

    def _arguments(self, arm: str, folder: Path) -> list[str]:
        settings = {**SETTINGS, **ARMS[arm], "data.path": self.home / "corpus", "train.output_dir": folder}
        words = []
        for name, value in settings.items():
            words += [f"--{name}", json.dumps(value) if isinstance(value, bool) else str(value)]
        return words

    def _make_corpus(self) -> int:
        random, words = Random(0), [f"w{index}" for index in range(60)]
        lines = [json.dumps({"text": " ".join(random.choices(words, k=25))}) for _ in range(300)]
        source = self.home / "text.jsonl"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        recipe = Recipe(sources={"words": Source(str(source))}, train_tokenizer=300, validation_fraction=0.1)
        prepare(recipe, self.home / "corpus")
        return 0


def _kind(kill: Kill) -> str:
    return "operation" if kill.operation else "moment" if kill.after is not None else "writing"


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no output"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(
        description="Kill training at random moments and compare with a run left alone, to the bit.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments and the damage (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file; - for stdout")
    parser.add_argument("--keep", metavar="FOLDER", help="keep all runs in this new folder, to look at them")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    status = run_reporting_errors(lambda: found.update(_run(args)))
    if status:
        return status
    return int(any(found[name] for name in ("lost", "corrupt", "resume_mismatches")))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if args.kills < 1:
        raise UserError(f"--kills is {args.kills}; it must be at least 1")
    if not hasattr(os, "fork"):
        raise UserError("the crash test forks processes, which this system cannot")
    if args.keep and Path(args.keep).exists():
        raise UserError(f"--keep {args.keep}: exists; name a new folder")
    os.environ.setdefault("DSMOE_KERNEL", "eager")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tqdm.monitor_interval = 0  # its thread would be forked
    # the usual lock is shared with forked processes: one that is killed while it holds it would stop this one for good
    tqdm.set_lock(threading.RLock())
    with contextlib.ExitStack() as held:
        home = args.keep or held.enter_context(tempfile.TemporaryDirectory(prefix="crash-test-"))
        Path(home).mkdir(parents=True, exist_ok=True)
        test = CrashTest(Path(home).resolve(), Random(args.seed))
        test.prepare()
        test.kill(args.kills)
    report = test.report(args.seed)
    for text in report["found"]:
        print(f"fault: {text}", file=sys.stderr)
    if args.json == "-":
        print(json.dumps(report))
    else:
        print(
            ", ".join(f"{name} {report[name]}" for name in ("kills", "lost", "corrupt", "resume_mismatches"))
        )
        if args.json:
            write_json(args.json, report)
    return report
