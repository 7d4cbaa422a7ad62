"""The command line of the serving benchmark."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsmoe.bench.output import benchmark_parser, give, reading, results_of
from dsmoe.bench.serving_engines import ENGINES
from dsmoe.bench.serving_extra import extra_form, kind_of, parse_extras
from dsmoe.bench.serving_models import DTYPES, FULL_SHAPE, KINDS, QUICK_SHAPE, form_of, native_folder
from dsmoe.bench.serving_rounds import Conditions, Model, measure_group
from dsmoe.bench.serving_settings import FULL, QUICK, Setting
from dsmoe.bench.serving_tables import draw, result_table
from dsmoe.bench.timing import checked_threads, usable_cores
from dsmoe.environment import describe
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.planner.units import parse_memory

TITLE = "Serving: a DS-MoE, its dense twin and a larger SMoE in the same memory"
EXAMPLES = """examples:
  python eval/bench_serving.py --engines own transformers
  python eval/bench_serving.py --python venv-serve/bin/python --json results.json
  python eval/bench_serving.py --engines vllm --settings requests --input-tokens 1000 --output-tokens 1000 --requests 32
  python eval/bench_serving.py --models dense --extra mine=runs/dsmoe-top4 --engines own
  python eval/bench_serving.py --results vllm.json llamacpp.json --record eval/records/serving
  python eval/bench_serving.py --quick
Times depend on what else the machine does: run it on a quiet one. Verdicts use ratios alone.
"""


def measure(
    models: Sequence[Model],
    engines: Sequence[str],
    settings: Sequence[Setting],
    conditions: Conditions,
    advance: Callable[[str], Any],
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        models: what is compared.
        engines: names from ENGINES.
        settings: what is asked of them.
        conditions: memory, dtype, threads, rounds.
        advance: called with the name of the case after each step.

    Returns:
        The results as written by `--json`.
    """
    rows = []
    for engine in engines:
        for setting in settings:
            rows += measure_group(
                models, engine, setting, conditions, advance, partial(tqdm.write, file=sys.stderr)
            )
    return {
        "rows": rows,
        "memory_bytes": conditions.memory_bytes,
        "dtype": conditions.dtype,
        "threads": conditions.threads,
        "rounds": conditions.rounds,
        **describe(),
    }


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Measure (or read earlier results), print the table or JSON, write the record."""
    results = results_of(args, partial(_measured, args))
    results.setdefault(
        "commands", [shlex.join(["python", "eval/bench_serving.py", *_measuring_words(words)])]
    )
    with reading(args):
        table, again = result_table(results), _again(args.record, results)
    give(
        args, results, table, TITLE, again, {"serving.png": partial(draw, results)},
    )  # fmt: skip


def _again(record: Path | None, results: dict[str, Any]) -> str:
    """The commands that make a record again: one for each piece that was measured by itself, one that joins them."""
    pieces = results["commands"]
    if len(pieces) == 1:
        return f"{pieces[0]} --record {record} --overwrite"
    files = [f"piece{number}.json" for number in range(1, len(pieces) + 1)]
    measured = [f"{piece} --json {file}" for piece, file in zip(pieces, files)]
    joined = f"python eval/bench_serving.py --results {' '.join(files)} --record {record} --overwrite"
    return "\n".join([*measured, joined])


def _measuring_words(words: Sequence[str]) -> list[str]:
    """A command line without what says where results go and where things lie on this machine."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--overwrite", action="store_true")
    for name in ("--json", "--record", "--note", "--cache", "--python"):
        parser.add_argument(name)
    places, rest = parser.parse_known_args(words)
    return [*rest, *(["--python", "PYTHON"] if places.python else [])]


def _measured(args: argparse.Namespace, advance: Callable[[str], Any]) -> dict[str, Any]:
    if args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}; it must be at least 1")
    checked_threads([args.threads])
    extras = parse_extras(args.extra or [])
    settings = _settings(args)
    shape = QUICK_SHAPE if args.quick else FULL_SHAPE
    longest = max(setting.length for setting in settings)
    if args.models and longest > shape.sizes["max_position_embeddings"]:
        raise UserError(
            f"input and output tokens are {longest} together; the benchmark's models take up to "
            f"{shape.sizes['max_position_embeddings']}"
        )
    args.cache.mkdir(parents=True, exist_ok=True)
    models = []
    for kind in args.models:

        def form(engine: str, kind: str = kind) -> Any:
            return form_of(native_folder(shape, kind, args.dtype, args.cache), engine, args.dtype, args.cache)

        models.append(Model(kind, kind, form))
    for name, source in extras.items():
        models.append(
            Model(name, kind_of(source), partial(extra_form, source, dtype=args.dtype, cache=args.cache))
        )
    if not models:
        raise UserError("nothing to measure: --models is empty and there is no --extra")
    can_pin = hasattr(os, "sched_getaffinity")
    conditions = Conditions(
        memory_bytes=parse_memory(args.memory),
        dtype=args.dtype,
        threads=args.threads,
        cores=sorted(os.sched_getaffinity(0))[-args.threads :] if can_pin else [],
        rounds=args.rounds,
        python=args.python,
        timeout=args.timeout,
    )
    return measure(models, args.engines, settings, conditions, advance)


def _settings(args: argparse.Namespace) -> list[Setting]:
    known = dict(QUICK if args.quick else FULL)
    given = {
        "input_tokens": args.input_tokens,
        "output_tokens": args.output_tokens,
        "requests": args.requests,
        "concurrency": args.concurrency or args.requests,
    }
    known["requests"] = replace(
        known["requests"], **{key: value for key, value in given.items() if value is not None}
    )
    if args.decode_tokens is not None:
        known["decode"] = replace(known["decode"], output_tokens=args.decode_tokens)
    return [known[name] for name in args.settings]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsmoe" / "serving"


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int, default=min(2, usable_cores()), metavar="N",
        help="of an engine, pinned to as many cores (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=list(ENGINES), metavar="ENGINE",
                        help=f"of {', '.join(ENGINES)} (default: all)")  # fmt: skip
    parser.add_argument("--settings", nargs="+", choices=tuple(FULL), default=list(FULL), metavar="SETTING",
                        help=f"of {', '.join(FULL)} (default: both)")  # fmt: skip
    parser.add_argument("--models", nargs="*", choices=KINDS, default=list(KINDS), metavar="MODEL",
                        help=f"of {', '.join(KINDS)} (default: all)")  # fmt: skip
    parser.add_argument(
        "--extra", action="append", metavar="NAME=SOURCE",
        help="a further model: Hub id, transformers folder, dsmoe folder or GGUF file; may be given again",
    )  # fmt: skip
    parser.add_argument("--memory", default="2GB", help="budget of weights and cache (default: %(default)s)")
    requests = FULL["requests"]
    parser.add_argument(
        "--input-tokens",
        type=int,
        metavar="N",
        help=f"of setting requests (default: {requests.input_tokens})",
    )
    parser.add_argument(
        "--output-tokens",
        type=int,
        metavar="N",
        help=f"of setting requests (default: {requests.output_tokens})",
    )
    parser.add_argument("--requests", type=int, metavar="N", help=f"(default: {requests.requests})")
    parser.add_argument("--concurrency", type=int, metavar="N", help="at a time (default: all)")
    parser.add_argument(
        "--decode-tokens", type=int, metavar="N",
        help=f"answer of setting decode (default: {FULL['decode'].output_tokens})",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="R", help="timed rounds (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument(
        "--python",
        metavar="FILE",
        help="interpreter of an environment for engines that aren't installed in this one",
    )
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="SECONDS",
        help="an engine that doesn't answer for so long has failed (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path, default=_cache_folder(), metavar="DIR",
        help="where the models are kept for the next run (default: dsmoe/serving in the user's cache folder)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and few tokens, to see that it works"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run.

    Args:
        argv: arguments; None: those of the process.
    """
    parser = benchmark_parser(
        "bench_serving.py",
        (
            "Throughput, latency and memory of a DS-MoE, its dense twin and an SMoE with 2.5 times the parameters, with "
            "random weights, in vLLM, llama.cpp, transformers and the own loop. All get the same memory for weights and "
            "cache. Each runs in a process of its own; within an engine they take turns. An engine that is missing or "
            "fails gives rows with an error."
        ),
        EXAMPLES,
    )
    _add_own_arguments(parser)
    words = sys.argv[1:] if argv is None else list(argv)
    return run_reporting_errors(lambda: run(parser.parse_args(words), words))
