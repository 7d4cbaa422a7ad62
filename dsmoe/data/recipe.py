"""The settings of `dsmoe data prepare`: defaults, then a YAML recipe, then the command line. Strict."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dsmoe.data.documents import HUB_PREFIX, parse_hub, read_hub, read_texts
from dsmoe.errors import UserError
from dsmoe.files import load_yaml

# no dot in front: such files are those of a preparation at work
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Source:
    """One source of documents.

    Attributes:
        path: a file, a folder, or hf:NAME[:CONFIG][:SPLIT] (see `dsmoe.data.documents`).
        weight: share of sampled training tokens, in any unit; give all sources one, or none (null), which
            makes every source count by its size.
        text_field: field or column of the text.
        split_paragraphs: plain text: blank lines separate documents.
        streaming: a Hub dataset: read over the network as it comes.
        max_documents: read at most this many documents.
        max_tokens: stop before the document that would exceed this many tokens (over all splits).
    """

    path: str
    weight: float | None = None
    text_field: str = "text"
    split_paragraphs: bool = False
    streaming: bool = False
    max_documents: int | None = None
    max_tokens: int | None = None

    @property
    def is_hub(self) -> bool:
        """Whether the source is a dataset of the Hugging Face Hub."""
        return self.path.startswith(HUB_PREFIX)

    @property
    def origin(self) -> str:
        """What the corpus' description calls it: the Hub spec, or the name of the file without its folder."""
        return self.path if self.is_hub else Path(self.path).resolve().name

    def read(self, seed: int) -> Iterator[str]:
        """Yield the documents, at most `max_documents`; a Hub dataset is shuffled by the seed."""
        if self.is_hub:
            return read_hub(self.path, self.text_field, self.max_documents, self.streaming, seed)
        return read_texts(self.path, self.text_field, self.max_documents, self.split_paragraphs)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a prepared corpus.

    Attributes:
        sources: name to source.
        train_tokenizer: train a byte-level BPE with this many entries; exclusive with `tokenizer`.
        tokenizer: an existing one: a tokenizer.json file, a folder, or a name on the Hub.
        tokenizer_sample_chars: characters of text the tokenizer is trained on, at most.
        eos_token: token that ends a document; null: the tokenizer's own.
        model_max_length: what a trained tokenizer calls its longest input, in tokens.
        validation_fraction: share of every source's documents held out for validation.
        test_fraction: the same for test.
        seed: of the shuffle and of what is held out.
        shard_tokens: tokens of a file.
    """

    sources: Mapping[str, Source] = field(default_factory=dict)
    train_tokenizer: int | None = None
    tokenizer: str | None = None
    tokenizer_sample_chars: int = 50_000_000
    eos_token: str | None = None
    model_max_length: int = 2048
    validation_fraction: float = 0.01
    test_fraction: float = 0.0
    seed: int = 0
    shard_tokens: int = 100_000_000


# (type, smallest value) of every scalar setting; null is allowed where the default is null
_KINDS: dict[str, tuple[Any, float | None]] = {
    "path": (str, None),
    "weight": (float, 0),
    "text_field": (str, None),
    "split_paragraphs": (bool, None),
    "streaming": (bool, None),
    "max_documents": (int, 1),
    "max_tokens": (int, 1),
    "train_tokenizer": (int, 257),
    "tokenizer": (str, None),
    "tokenizer_sample_chars": (int, 1),
    "eos_token": (str, None),
    "model_max_length": (int, 1),
    "validation_fraction": (float, 0),
    "test_fraction": (float, 0),
    "seed": (int, 0),
    "shard_tokens": (int, 1),
}


def read_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe.

    Raises:
        UserError: not YAML, an unknown key (the nearest known one is named), or a value of the wrong kind.
    """
    values = _checked(load_yaml(path), Recipe, str(path))
    sources = values.pop("sources", {})
    if not isinstance(sources, Mapping):
        raise UserError(f"{path}: sources is {sources!r:.60}; it must map names to sources")
    read = {}
    for name, source in sources.items():
        where = f"{path}: sources: {name}"
        source = _checked(source, Source, where)
        if "path" not in source:
            raise UserError(f"{where}: lacks 'path'")
        read[_checked_name(name, where)] = Source(**source)
    return Recipe(sources=read, **values)


def source_from_spec(spec: str) -> tuple[str, Source]:
    """Read `NAME=PATH` or `PATH`, whose name is then the file's up to the first dot (or the dataset's)."""
    name, equals, path = spec.partition("=")
    # a path may hold "=" as well: what stands before it is a name only without a slash or colon
    if not equals or not _NAME.fullmatch(name):
        path = spec
        stem = (
            parse_hub(spec)[0].rpartition("/")[2]
            if spec.startswith(HUB_PREFIX)
            else Path(spec).resolve().name
        )
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", stem.partition(".")[0] or "source")
    if not path:
        raise UserError(f"--source {spec}: no path; write NAME=PATH or PATH")
    return _checked_name(name, f"--source {spec}"), Source(path=path)


def sources_from_specs(specs: Sequence[str]) -> dict[str, Source]:
    """Read every `--source`.

    Raises:
        UserError: two sources of one name.
    """
    sources: dict[str, Source] = {}
    for spec in specs:
        name, source = source_from_spec(spec)
        if name in sources:
            raise UserError(
                f"--source {spec}: a second source named {name!r}; write --source OTHER_NAME=PATH"
            )
        sources[name] = source
    return sources


def with_source_values(recipe: Recipe, key: str, values: Sequence[str]) -> Recipe:
    """Set a setting of sources from `VALUE` (every source) or `NAME=VALUE` (one) strings, in order."""
    option = f"--{key.replace('_', '-')}"
    sources = dict(recipe.sources)
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            name, value = "", text
        elif name not in sources:
            raise UserError(f"{option} {text}: no source {name!r}; {_nearest(name, sources)}")
        for target in [name] if equals else list(sources):
            parsed = check_value(key, value if _KINDS[key][0] is str else _parsed(value), f"{option} {text}")
            sources[target] = replace(sources[target], **{key: parsed})
    return replace(recipe, sources=sources)


def check_recipe(recipe: Recipe) -> None:
    """Check what no single setting shows.

    Raises:
        UserError: no source, weights for some sources only, no tokenizer or two, or nothing left to train on.
    """
    if not recipe.sources:
        raise UserError(
            "no source of documents; give --source NAME=PATH (again for more), or --config FILE.yaml"
        )
    weighted = [name for name, source in recipe.sources.items() if source.weight is not None]
    unweighted = [name for name, source in recipe.sources.items() if source.weight is None]
    if weighted and unweighted:
        raise UserError(
            f"source {unweighted[0]!r} has no weight and {weighted[0]!r} has; give all of them one, or none"
        )
    if weighted and not any(source.weight for source in recipe.sources.values()):
        raise UserError("every source has weight 0; at least one must be positive")
    if (recipe.train_tokenizer is None) == (recipe.tokenizer is None):
        found = "neither" if recipe.tokenizer is None else "both"
        raise UserError(
            f"give one of --train-tokenizer VOCAB_SIZE and --tokenizer NAME_OR_PATH; {found} is set"
        )
    if recipe.train_tokenizer is not None and recipe.eos_token is not None:
        raise UserError(
            f"--eos-token {recipe.eos_token!r} names a token of an existing --tokenizer; one that is trained has its own"
        )
    held_out = recipe.validation_fraction + recipe.test_fraction
    if held_out >= 1:
        raise UserError(
            f"validation and test fractions sum to {held_out:g}; they must leave documents to train on"
        )
    for name, source in recipe.sources.items():
        if source.streaming and not source.is_hub:
            raise UserError(
                f"source {name!r}: streaming is for Hub datasets (hf:NAME), and {source.path} is not one"
            )


def _checked(values: Any, kind: type, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {values!r:.60} is not a mapping of settings")
    known = [known.name for known in fields(kind)]
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; {_nearest(str(key), known)}")
    return {
        key: value if key == "sources" else check_value(key, value, f"{where}: {key}")
        for key, value in values.items()
    }


def check_value(key: str, value: Any, where: str) -> Any:
    """Return the value of a scalar setting in its type (a whole 1e6 becomes an integer where one is wanted).

    Args:
        key: name of the setting.
        value: what the recipe or the command line gave.
        where: what to call it in an error.

    Raises:
        UserError: wrong type or out of range.
    """
    kind, least = _KINDS[key]
    if value is None and any(
        known.default is None for known in fields(Source) + fields(Recipe) if known.name == key
    ):
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    names = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: {value!r} is not {names[kind]}")
    # written so that NaN fails as well
    if least is not None and not least <= value < float("inf"):
        raise UserError(f"{where}: {value!r} is out of range; it must be at least {least:g}")
    return value


def _parsed(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{where}: {name!r} is no name of a source; use letters, digits, '_', '-' and '.', that not first"
        )
    return name


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    nearest = get_close_matches(name, known, n=1, cutoff=0.0)
    return f"the nearest known one is {nearest[0]!r}" if nearest else "there are none"
