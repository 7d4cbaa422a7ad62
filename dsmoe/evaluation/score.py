"""Score models side by side: benchmark accuracy, validation loss, parameters and decode speed.

Examples:
  python eval/score.py --model runs/dsmoe --model dense=runs/dense --tasks paper --limit 200 \\
      --include-path benchmarks --data data/tokens --output results.json
  python eval/score.py --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16 --wikitext --output olmoe.json

The results are written after each model; --resume keeps those that are finished.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.allocator import keep_freed_memory
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.evaluation.table import acc_norm_note, results_table, task_average

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `eval/score.py`; returns the exit status (2 for bad input, with one line on stderr)."""
    args = build_parser().parse_args(argv)
    return run_reporting_errors(lambda: run(args))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="score.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="folder (of a model or a run) or Hub id; may be repeated",
    )
    add(
        "--tasks",
        default="paper",
        help="'paper' (its six), lm-eval names with commas, or 'none' (%(default)s)",
    )
    add("--limit", type=int, metavar="N", help="the first N questions of each task (default: all)")
    add(
        "--include-path", metavar="DIR", help="local tasks, from `dsmoe data benchmarks` (default: the Hub's)"
    )
    add("--data", metavar="DIR", help="prepared tokens, from `dsmoe data prepare`, for the validation loss")
    add(
        "--data-tokens",
        type=int,
        metavar="N",
        help="validation tokens to score, spread over the split (default: all)",
    )
    add(
        "--sequence-length",
        type=int,
        default=1024,
        metavar="S",
        help="context of the validation loss (%(default)s)",
    )
    add(
        "--max-length",
        type=int,
        metavar="S",
        help="longest question and answer in tokens, cut on the left (default: the model's)",
    )
    add("--wikitext", action="store_true", help="also lm-eval's wikitext perplexity (needs the Hub)")
    add("--decode-speed", action="store_true", help="also tokens a second of greedy generation at batch 1")
    add("--output", required=True, metavar="FILE", help="results, as JSON")
    add("--resume", action="store_true", help="keep the models that FILE holds already")
    add("--batch-size", type=int, default=8, metavar="B", help="sequences a forward pass (%(default)s)")
    add("--device", help="default: cuda where there is one, else cpu")
    add(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"), help="(%(default)s)"
    )
    add("--seed", type=int, default=1234, help="(%(default)s)")
    add("--trust-remote-code", action="store_true", help="let transformers run code of the model's folder")
    return parser


def run(args: argparse.Namespace) -> None:
    """Score every model, write the results after each, and print the tables."""
    models = parse_models(args.model)
    settings = checked_settings(args)
    from dsmoe.environment import describe
    from dsmoe.evaluation.loading import model_path
    from dsmoe.evaluation.results import ResultsFile

    keep_freed_memory()
    # all of them before the first is scored
    models = {name: model_path(path) for name, path in models.items()}
    seeds = {"python": args.seed, "numpy": args.seed, "torch": args.seed, "fewshot": args.seed}
    results = ResultsFile(args.output, settings, {"seeds": seeds, **describe()}, resume=args.resume)
    for name, path in models.items():
        if results.has(name, path):
            print(f"{name}: already in {args.output}", file=sys.stderr)
            continue
        results.add(*score_one(name, path, args, settings["tasks"]))
    print(tables(results.as_dict()))
    print(f"\nwritten to {args.output}")


def parse_models(texts: Sequence[str]) -> dict[str, str]:
    """Names and paths from `--model DIR` or `--model NAME=DIR`.

    Raises:
        UserError: an empty part, or a name given twice.
    """
    models: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).resolve().name if Path(text).is_dir() else text, text
        if not name or not path:
            raise UserError(f"--model {text!r}: write it as DIR or NAME=DIR")
        if name in models:
            raise UserError(f"--model {text!r}: the name {name!r} is taken; give another one as NAME=DIR")
        models[name] = path
    return models


def checked_settings(args: argparse.Namespace) -> Row:
    """What the scores depend on besides the models; raises UserError on options that can't work."""
    from dsmoe.data.benchmarks import tasks_folder
    from dsmoe.evaluation.harness import parse_tasks

    for name in ("limit", "batch_size", "max_length", "data_tokens", "sequence_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    tasks = [] if args.tasks == "none" else parse_tasks(args.tasks)
    if not (tasks or args.data is not None or args.wikitext or args.decode_speed):
        raise UserError(
            "--tasks none leaves nothing to measure; name tasks, or pass --data, --wikitext or --decode-speed"
        )
    if tasks and args.include_path is not None:
        tasks_folder(args.include_path)
    corpus = None
    if args.data is not None:
        from dsmoe.data.corpus import TokenCorpus

        corpus = TokenCorpus(args.data).fingerprint
    return {
        "tasks": tasks,
        "limit": args.limit,
        "num_fewshot": 0,
        "local_tasks": args.include_path is not None,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "seed": args.seed,
        "corpus": corpus,
        "data_tokens": args.data_tokens,
        "sequence_length": args.sequence_length,
        "wikitext": args.wikitext,
        "decode_speed": args.decode_speed,
    }


def score_one(name: str, path: str, args: argparse.Namespace, tasks: Sequence[str]) -> tuple[Row, Row, Row]:
    """Score one model.

    Args:
        name: its name in the results.
        path: its folder or Hub id.
        args: the parsed command line.
        tasks: lm-eval names; may be empty.

    Returns:
        Its row, its per-question outcomes, and the versions of the tasks.

    Raises:
        UserError: it cannot be loaded or scored.
    """
    from dsmoe.evaluation import harness
    from dsmoe.evaluation.loading import load_model
    from dsmoe.evaluation.parameters import describe_model
    from dsmoe.evaluation.results import fingerprint
    from dsmoe.evaluation.speed import decode_tokens_per_second

    start = time.monotonic()
    digest = fingerprint(path)  # before the scoring: files that change during it are noticed by --resume
    loaded = load_model(path, device=args.device, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    row: Row = {"name": name, "path": path, "fingerprint": digest, **describe_model(path, loaded.model)}
    options = {name: getattr(args, name) for name in ("limit", "batch_size", "max_length", "seed")} | {
        "label": name
    }
    scored: Row = {"tasks": {}, "questions": {}, "task_versions": {}, "num_truncated": 0}
    if tasks:
        scored = harness.score_model(loaded, tasks, include_path=args.include_path, **options)
    row["tasks"] = scored["tasks"]
    row["num_truncated"] = scored["num_truncated"]
    if row["num_truncated"]:
        print(
            f"{name}: {row['num_truncated']} requests were too long and were cut on the left",
            file=sys.stderr,
        )
    row["average"], row["average_stderr"] = _average(row["tasks"], "acc")
    row["average_acc_norm"], row["average_acc_norm_stderr"] = _average(row["tasks"], "acc_norm")
    row.update(_validation(name, loaded, args))
    row["wikitext"] = harness.wikitext(loaded, **options) if args.wikitext else None
    row["decode_tokens_per_second"] = None
    if args.decode_speed:
        row["decode_tokens_per_second"] = decode_tokens_per_second(
            loaded.model, loaded.model.config.vocab_size
        )
    row["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    row["device"] = str(loaded.model.device)
    row["seconds"] = round(time.monotonic() - start, 1)
    return row, scored["questions"], scored["task_versions"]


def _average(tasks: Row, metric: str) -> tuple[float | None, float | None]:
    mean = task_average(tasks, metric)
    if mean is None:
        return None, None
    value, stderr = mean
    return value, stderr if stderr < float("inf") else None


def _validation(name: str, loaded: Any, args: argparse.Namespace) -> Row:
    """Validation loss and bits per byte; null for a model whose tokenizer is not the corpus'."""
    row: Row = {"validation_loss": None, "bits_per_byte": None, "validation_tokens": None}
    if args.data is None:
        return row
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from dsmoe.data.agreement import same_tokenizer
    from dsmoe.data.corpus import TokenCorpus
    from dsmoe.data.windows import evaluation_batches, shown_bytes_per_token
    from dsmoe.evaluation.loading import trained_length
    from dsmoe.evaluation.perplexity import validation_loss

    corpus = TokenCorpus(args.data)
    tokenizer = AutoTokenizer.from_pretrained(str(corpus.tokenizer_dir))
    if not same_tokenizer(tokenizer, loaded.tokenizer):
        print(
            f"{name}: no validation loss, since {args.data} was made with another tokenizer", file=sys.stderr
        )
        return row
    longest = getattr(loaded.model.config, "max_position_embeddings", None) or args.sequence_length
    length = min(args.sequence_length, longest)
    if length < args.sequence_length:
        print(f"{name}: validation loss in its longest context, {length} tokens", file=sys.stderr)
    trained = trained_length(loaded.path)
    if trained is not None and trained < length:
        print(
            f"{name}: trained on sequences of {trained} tokens and judged on {length}; --sequence-length {trained} "
            "judges it as it was trained",
            file=sys.stderr,
        )
    batches = evaluation_batches(
        corpus,
        split="validation",
        sequence_length=length,
        batch_size=args.batch_size,
        max_tokens=args.data_tokens,
    )
    num_tokens = min(corpus.num_tokens("validation"), args.data_tokens or sys.maxsize)
    bar = tqdm(
        batches,
        total=-(-num_tokens // (length * args.batch_size)),
        desc=f"{name} loss",
        unit="batch",
        disable=None,
    )
    size = shown_bytes_per_token(
        corpus, tokenizer, split="validation", sequence_length=length, max_tokens=args.data_tokens
    )
    scored = validation_loss(loaded.model, bar, size)
    return {
        "validation_loss": scored["loss"],
        "bits_per_byte": scored["bits_per_byte"],
        "validation_tokens": scored["num_tokens"],
        "validation_sequence_length": length,
    }


def tables(results: Row) -> str:
    """The results as text: Markdown tables of acc and acc_norm, and the models' paired differences."""
    models = results["models"]
    limit = f", first {results['limit']} questions a task" if results["limit"] else ""
    parts = [f"acc x 100, 0-shot{limit}", results_table(models)]
    if any(scores.get("acc_norm") is not None for model in models for scores in model["tasks"].values()):
        parts += ["", "acc_norm x 100", results_table(models, "acc_norm")]
        parts += list(filter(None, [acc_norm_note(models)]))
    lines = [_pair(pair) for pair in results["paired"] if "average" in pair]
    return "\n".join(
        [*parts, *(["", "paired difference of the average (tie: within 2 SE)", *lines] if lines else [])]
    )


def _pair(pair: Row) -> str:
    mean = pair["average"]
    stderr = "undefined" if mean["stderr"] is None else f"{100 * mean['stderr']:.1f}"
    verdict = ", tie" if mean["tie"] else ""
    return f"{pair['a']} - {pair['b']}: {100 * mean['difference']:+.1f} points, SE {stderr}{verdict}"
