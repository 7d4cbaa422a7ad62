"""Reads documents as strings: JSONL, Parquet, plain text, folders of these, and Hugging Face datasets."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError, reason_of

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".txt", ".txt.gz", ".md")
_SUFFIXES = JSONL_SUFFIXES + PARQUET_SUFFIXES + TEXT_SUFFIXES
# any of these marks a folder written by datasets' save_to_disk
_SAVED_DATASET = ("state.json", "dataset_dict.json")
HUB_PREFIX = "hf:"


def read_texts(
    path: str | Path, text_field: str = "text", limit: int | None = None, split_paragraphs: bool = False
) -> Iterator[str]:
    """Yield the documents of a file or folder, in order.

    Args:
        path: a .jsonl, .ndjson, .parquet, .txt or .md file (all but Parquet and .md also gzipped), a folder
            with such files (read in the order of their paths), or one written by `datasets`' save_to_disk.
        text_field: the field or column that holds the text (plain text has none).
        limit: stop after this many documents; null: read all.
        split_paragraphs: plain text: blank lines separate documents, instead of one document a file.

    Yields:
        One string per document, as it stands in the file (an unpaired surrogate becomes "?").

    Raises:
        UserError: missing file, unknown format, a line that is not JSON, or a missing text field.
    """
    path = Path(path)
    if path.is_dir() and any((path / name).is_file() for name in _SAVED_DATASET):
        texts = _from_saved_dataset(path, text_field)
    elif path.is_dir():
        texts = _from_folder(path, text_field, split_paragraphs)
    elif path.is_file():
        texts = _from_file(path, text_field, split_paragraphs)
    else:
        raise UserError(f"{path}: no such file or folder of documents")
    return map(_encodable, islice(texts, limit))


def read_hub(
    spec: str,
    text_field: str = "text",
    limit: int | None = None,
    streaming: bool = False,
    seed: int = 0,
    shuffle_buffer: int = 10_000,
) -> Iterator[str]:
    """Yield the documents of a dataset of the Hugging Face Hub, shuffled.

    Args:
        spec: "hf:NAME", "hf:NAME:CONFIG" or "hf:NAME:CONFIG:SPLIT"; the split is "train" unless named, and an
            empty CONFIG stands for the default one.
        text_field: the column that holds the text.
        limit: stop after this many documents; null: read all.
        streaming: read over the network as it comes, instead of downloading the whole dataset first.
        seed: of the shuffle, which is whole for a downloaded dataset and goes through a buffer for a stream.
        shuffle_buffer: documents in that buffer.

    Raises:
        UserError: a malformed spec, or a dataset that cannot be loaded.
    """
    import datasets

    name, config, split = parse_hub(spec)
    try:
        data = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # the library raises many kinds, from network errors to missing configs
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{spec}: the dataset could not be loaded: {message}") from error
    data = data.shuffle(seed=seed, buffer_size=shuffle_buffer) if streaming else data.shuffle(seed=seed)
    return map(_encodable, islice(_from_rows(data, spec, text_field), limit))


def document_key(text: str, seed: int) -> bytes:
    """A seeded 128-bit hash of a document: equal for equal texts, otherwise as good as random."""
    return blake2b(text.encode("utf-8"), digest_size=16, key=str(seed).encode()).digest()


def parse_hub(spec: str) -> tuple[str, str | None, str]:
    """Split "hf:NAME[:CONFIG][:SPLIT]" into name, config (or None) and split.

    Raises:
        UserError: no name, or too many parts.
    """
    parts = spec.removeprefix(HUB_PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"{spec}: not a Hub dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    name, config, split = [*parts, "", ""][:3]
    return name, config or None, split or "train"


def _from_folder(path: Path, text_field: str, split_paragraphs: bool) -> Iterator[str]:
    found = [file for file in sorted(path.rglob("*")) if file.name.endswith(_SUFFIXES) and file.is_file()]
    if not found:
        raise UserError(f"{path}: no documents in this folder; known file types are {', '.join(_SUFFIXES)}")
    for file in found:
        yield from _from_file(file, text_field, split_paragraphs)


def _from_file(path: Path, text_field: str, split_paragraphs: bool) -> Iterator[str]:
    if path.name.endswith(JSONL_SUFFIXES):
        return _from_jsonl(path, text_field)
    if path.name.endswith(PARQUET_SUFFIXES):
        return _from_parquet(path, text_field)
    if path.name.endswith(TEXT_SUFFIXES):
        return _from_plain_text(path, split_paragraphs)
    raise UserError(f"{path}: unknown file type; known are {', '.join(_SUFFIXES)}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line) of a UTF-8 file, gzipped or not."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error})") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: damaged gzip file after line {number} ({error})") from None


def _from_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # a ValueError that is no JSONDecodeError: a number of thousands of digits; a RecursionError: brackets as deep
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:{number}: a JSON object with a field {text_field!r} is wanted, not {row!r:.60}"
            )
        yield _text_of(row, text_field, f"{path}:{number}")


def _from_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _missing_field(str(path), text_field, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    yield _text_of({text_field: value.as_py()}, text_field, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        # damaged pages are an OSError without a file's name
        if getattr(error, "filename", None) is not None:
            raise
        raise UserError(f"{path}: can't be read as Parquet ({reason_of(error)})") from None


def _from_plain_text(path: Path, split_paragraphs: bool) -> Iterator[str]:
    lines = (line for _, line in _lines(path))
    if not split_paragraphs:
        yield "".join(lines)
        return
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\n")
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip("\n")


def _from_saved_dataset(path: Path, text_field: str) -> Iterator[str]:
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UserError(
                f"{path}: this dataset has no split 'train'; give the folder of one of {sorted(data)}"
            )
        data = data["train"]
    return _from_rows(data, str(path), text_field)


def _from_rows(rows: Iterable[Any], where: str, text_field: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        yield _text_of(row, text_field, f"{where}: row {number}")


def _text_of(row: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in row:
        raise _missing_field(where, text_field, row)
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} is {text!r:.60}, and a string is wanted")
    return text


def _missing_field(where: str, text_field: str, fields: Iterable[str]) -> UserError:
    return UserError(
        f"{where}: no field {text_field!r}; there are {', '.join(map(repr, fields))} (see --text-field)"
    )


def _encodable(text: str) -> str:
    """The text with unpaired surrogates (which JSON can spell, and UTF-8 cannot) replaced."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text
