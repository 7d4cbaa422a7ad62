"""`eval/compare_processes.py`: one process against two, in numbers and in speed."""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsmoe.environment import describe
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.files import write_json
from dsmoe.records import check_outputs, give_results, write_record
from dsmoe.trainer.compare_runs import largest_difference, launch, losses, make_text, run, tokens_per_second

EPILOG = """examples:
  python eval/compare_processes.py
  python eval/compare_processes.py --only equality resume --strategies zero2 zero3 --json -
  python eval/compare_processes.py --only speed --rounds 7
  python eval/compare_processes.py --json results.json --record eval/records/processes

  equality  step losses of two processes against those of one with the whole batch in one forward, float32 matmul
            strict, MI loss with exact statistics; accumulation 1 and 4
  resume    the same run, stopped twice by SIGTERM and continued on one process, then on two again, against the run of
            two processes that nobody stopped
  speed     tokens/s of two processes of one thread (DDP) over those of one process of two threads, in rounds that
            take turns; on a quiet machine with two cores

The exit status is 1 where losses differ by more than the tolerance; the speed depends on the machine, and is only told.
"""
PARTS = ("equality", "resume", "speed")
STRATEGIES = {"ddp": "none", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
TOLERANCE, WANTED_SPEED = 1e-5, 0.9
BATCH, WARM_UP = 8, 3
TINY: dict[str, Any] = {
    "model.vocab_size": 300, "model.hidden_size": 32, "model.intermediate_size": 64, "model.num_hidden_layers": 2,
    "model.num_experts": 4, "model.num_attention_heads": 4, "model.num_key_value_heads": 2,
    # routers that differ from uniform, and a loss on them that a wrong p(e) would change
    "model.initializer_range": 0.1, "router_loss.router_mi_loss_coef_mlp": 1.0, "data.sequence_length": 16,
    "router_loss.mi_statistics": "exact",
    "train.global_batch_size": BATCH, "train.log_every_steps": 1, "train.eval_tokens": 300,
    "train.float32_matmul": "strict", "train.save_every_minutes": 1e6,
}  # fmt: skip
LARGER: dict[str, Any] = {
    **TINY, "model.hidden_size": 256, "model.intermediate_size": 1024, "model.num_hidden_layers": 4,
    "model.num_experts": 8, "model.num_attention_heads": 8, "model.num_key_value_heads": 8,
    "data.sequence_length": 128, "train.global_batch_size": 16, "train.float32_matmul": "auto",
}  # fmt: skip


@dataclass
class Comparison:
    """Runs in a folder, and what came out.

    Attributes:
        home: of the runs.
        corpus: token folder.
        steps: optimiser steps of a run of the first two parts.
        results: filled by the methods.
    """

    home: Path
    corpus: Path
    steps: int
    results: dict[str, Any] = field(default_factory=dict)

    def equality(self, strategies: Sequence[str], advance: Callable[[str], None]) -> None:
        """Two processes against one."""
        self._reference(advance)
        one = losses(self.home / "one-1")
        rows = [self._row(one, "one-4", {"processes": 1, "strategy": None, "accumulation": 4})]
        for strategy in strategies:
            self._two(strategy, advance)
            for steps in (1, 4):
                where = {"processes": 2, "strategy": strategy, "accumulation": steps}
                rows.append(self._row(one, f"{strategy}-{steps}", where))
        self.results["equality"] = rows

    def resume(self, strategies: Sequence[str], advance: Callable[[str], None]) -> None:
        """Two processes, one, and two again against two that were left alone."""
        rows = []
        for strategy in strategies:
            if not (self.home / f"{strategy}-1").exists():
                self._two(strategy, advance)
            name = f"{strategy}-resumed"
            for processes, stop in ((2, self.steps // 3), (1, 2 * self.steps // 3), (2, None)):
                advance(f"resume, {strategy}, {processes} process(es)")
                settings = {**self._settings(name, processes, 1, strategy), "train.resume": True}
                launch([run(settings, stop)], self.home, processes=processes, threads=1)
            rows.append(self._row(losses(self.home / f"{strategy}-1"), name, {"strategy": strategy}))
        self.results["resume"] = rows

    def speed(self, rounds: int, steps: int, advance: Callable[[str], None]) -> None:
        """Two processes of one thread, and one process of two, taking turns."""
        rates: dict[int, list[float]] = {1: [], 2: []}
        tokens = LARGER["train.global_batch_size"] * LARGER["data.sequence_length"]
        for number in range(rounds):
            # who begins takes turns as well
            for processes in (1, 2) if number % 2 else (2, 1):
                name = f"speed-{processes}-{number}"
                advance(f"speed, {processes} process(es)")
                settings = {
                    **LARGER,
                    **self._place(name),
                    "train.total_tokens": (steps + WARM_UP) * tokens,
                    "train.micro_batch_size": LARGER["train.global_batch_size"] // processes,
                    "train.num_threads": 2 // processes,
                }
                launch([run(settings)], self.home, processes=processes, threads=2 // processes)
                rates[processes].append(tokens_per_second(self.home / name, WARM_UP))
        self.results["speed"] = {
            "tokens_per_second_one_process_two_threads": rates[1],
            "tokens_per_second_two_processes_one_thread": rates[2],
            "ratio": statistics.median(two / one for one, two in zip(rates[1], rates[2])),
            "rounds": rounds,
            "steps": steps,
        }

    def _reference(self, advance: Callable[[str], None]) -> None:
        advance("equality, one process")
        runs = [run(self._settings(f"one-{steps}", 1, steps)) for steps in (1, 4)]
        launch(runs, self.home, processes=1, threads=1)

    def _two(self, strategy: str, advance: Callable[[str], None]) -> None:
        advance(f"equality, {strategy}, two processes")
        runs = [run(self._settings(f"{strategy}-{steps}", 2, steps, strategy)) for steps in (1, 4)]
        launch(runs, self.home, processes=2, threads=1)

    def _settings(
        self, name: str, processes: int, accumulation: int, strategy: str = "ddp"
    ) -> dict[str, Any]:
        return {
            **TINY,
            **self._place(name),
            "train.total_tokens": self.steps * BATCH * TINY["data.sequence_length"],
            "train.micro_batch_size": BATCH // (processes * accumulation),
            "train.sharding": STRATEGIES[strategy],
            "train.num_threads": 1,
        }

    def _place(self, name: str) -> dict[str, Any]:
        return {"data.path": self.corpus, "train.output_dir": self.home / name}

    def _row(self, expected: Sequence[float], name: str, where: dict[str, Any]) -> dict[str, Any]:
        difference = largest_difference(losses(self.home / name), expected)
        return {**where, "largest_relative_difference": difference, "steps": len(expected)}


def conclusion(results: dict[str, Any]) -> str:
    """The results in a few lines of Markdown."""
    lines = []
    for part, title in (("equality", "against one process"), ("resume", "2 -> 1 -> 2 against uncut")):
        for row in results.get(part, []):
            what = ", ".join(str(row[key]) for key in ("processes", "strategy") if row.get(key))
            what += f", accumulation {row['accumulation']}" if "accumulation" in row else ""
            difference = row["largest_relative_difference"]
            verdict = "" if difference <= TOLERANCE else f" (above {TOLERANCE:g})"
            lines.append(f"- {part}: {what}, {title}: {difference:.2g} over {row['steps']} steps{verdict}")
    if "speed" in results:
        lines.append(
            f"- speed: two processes of one thread reach {results['speed']['ratio']:.3f} of one process of two threads "
            f"(median of {results['speed']['rounds']} rounds; wanted {WANTED_SPEED})"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Compare training on one process with training on two (CPU).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument(
        "--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), help="default: all"
    )
    parser.add_argument("--steps", type=int, default=50, help="of equality and resume (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed part (default: %(default)s)")
    parser.add_argument("--speed-steps", type=int, default=12, help="steps a round (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="token folder (default: random words)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file; - for stdout")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a record into a new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing record")
    args = parser.parse_args(argv)
    args.command = " ".join(
        ["python eval/compare_processes.py", *(argv if argv is not None else sys.argv[1:])]
    )
    found: dict[str, Any] = {}
    status = run_reporting_errors(lambda: found.update(_run(args)))
    rows = [row for part in ("equality", "resume") for row in found.get(part, [])]
    return status or int(any(row["largest_relative_difference"] > TOLERANCE for row in rows))


def _run(args: argparse.Namespace) -> dict[str, Any]:
    for name, low in (("steps", 3), ("rounds", 1), ("speed_steps", 1)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {low}")
    check_outputs(record=args.record, overwrite=args.overwrite, json=args.json)
    with contextlib.ExitStack() as held:
        home = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="compare-processes-")))
        bar = held.enter_context(tqdm(unit="launch", file=sys.stderr, disable=None))

        def advance(what: str) -> None:
            bar.set_description(what)
            bar.update()

        comparison = Comparison(home, args.data or make_text(home), args.steps)
        if "equality" in args.only:
            comparison.equality(args.strategies, advance)
        if "resume" in args.only:
            comparison.resume(args.strategies, advance)
        if "speed" in args.only:
            comparison.speed(args.rounds, args.speed_steps, advance)
        results = {**comparison.results, "tolerance": TOLERANCE, **describe()}
        give_results(results, conclusion(results), args.json, lambda: _record(args, home, results))
    return results


def _record(args: argparse.Namespace, home: Path, results: dict[str, Any]) -> None:
    if not args.record:
        return
    write_json(home / "results.json", results)
    write_record(
        args.record,
        title="One process and two: losses, resumption, speed",
        command=args.command,
        conclusion=conclusion(results),
        files=[home / "results.json"],
        details={"settings": {"tiny": TINY, "larger": LARGER}, "text": str(args.data or "random words")},
        overwrite=args.overwrite,
    )
