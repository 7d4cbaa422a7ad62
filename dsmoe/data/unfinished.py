"""A preparation at work in `OUTPUT.partial`: an interrupted one stays there, and the same command goes on from it.

What is kept is the tokenizer, the sources that are packed, and of the source at hand the tokens and a table of its
documents. A source is read again up to where its tokens end, which its hashes check, but nothing is tokenized twice.
"""

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe import files
from dsmoe.data.corpus import TOKENIZER
from dsmoe.data.recipe import Recipe
from dsmoe.data.shards import DTYPES
from dsmoe.errors import UserError
from dsmoe.lock import LOCK, FolderLock

_SETTINGS = ".settings.json"
_TOKENS, _DOCUMENTS, _PACKED = ".tokens", ".documents", ".packed.json"
# UTF-8 bytes of text whose tokens are at stake in an interruption
COMMIT_BYTES = 1 << 25
# the hash is compared and sorted as bytes: its first eight are its first number
_ROW = np.dtype([("key", ">u8", 2), ("num_tokens", "<i8"), ("num_bytes", "<i8")])
_KEY_BYTES = 16


class DocumentTable:
    """The tokens of one source in reading order, on the disk, and a row for each of its documents.

    A context manager, which closes the file of the tokens. Rows reach the disk after the tokens that they count, so that
    each row there has its tokens.

    Args:
        stem: path of the two files up to their suffixes; what they hold is kept.
        dtype: of the tokens, "uint16" or "uint32".
    """

    def __init__(self, stem: Path, dtype: str):
        self.tokens_path = stem.with_name(stem.name + _TOKENS)
        self._rows_path = stem.with_name(stem.name + _DOCUMENTS)
        self._dtype = np.dtype(DTYPES[dtype])
        self._rows = bytearray(self._rows_path.read_bytes() if self._rows_path.exists() else b"")
        self._tokens = self.tokens_path.open("ab")
        del self._rows[len(self._rows) // _ROW.itemsize * _ROW.itemsize :]
        ends = np.cumsum(self.num_tokens) * self._dtype.itemsize
        kept = int(np.searchsorted(ends, self.tokens_path.stat().st_size, side="right"))
        del self._rows[kept * _ROW.itemsize :]
        self.total_tokens = int(self.num_tokens.sum())
        self._tokens.truncate(self.total_tokens * self._dtype.itemsize)
        self._committed = len(self._rows)
        with self._rows_path.open("ab") as handle:
            handle.truncate(self._committed)
        self._bytes_at_stake = 0

    def __len__(self) -> int:
        return len(self._rows) // _ROW.itemsize

    @property
    def _table(self) -> np.ndarray:
        # of a copy: an array that looked into the bytes would keep them from growing
        return np.frombuffer(bytes(self._rows), dtype=_ROW)

    @property
    def keys(self) -> np.ndarray:
        """The first 64 bits of each document's hash, uint64 [D]."""
        return self._table["key"][:, 0].astype(np.uint64)

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each document, its eos included, int64 [D]."""
        return self._table["num_tokens"]

    @property
    def num_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document, int64 [D]."""
        return self._table["num_bytes"]

    def key(self, document: int) -> bytes:
        """The whole hash of a document, 16 bytes."""
        start = document * _ROW.itemsize
        return bytes(self._rows[start : start + _KEY_BYTES])

    def add(self, key: bytes, tokens: np.ndarray, num_bytes: int) -> None:
        """Append a document: its hash (16 bytes), tokens [T] and the length of its text in UTF-8."""
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self._rows += key + np.array([len(tokens), num_bytes], dtype="<i8").tobytes()
        self.total_tokens += len(tokens)
        self._bytes_at_stake += num_bytes
        if self._bytes_at_stake >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Bring everything so far to the disk."""
        self._tokens.flush()
        os.fsync(self._tokens.fileno())
        with self._rows_path.open("ab") as handle:
            handle.write(self._rows[self._committed :])
            handle.flush()
            os.fsync(handle.fileno())
        self._committed, self._bytes_at_stake = len(self._rows), 0

    def __enter__(self) -> "DocumentTable":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()


class Unfinished:
    """The folder of a preparation at work.

    Args:
        folder: where everything is written until the corpus is complete.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, name: str, suffix: str) -> Path:
        return self.folder / f".{name}{suffix}"

    def table(self, name: str, dtype: str) -> DocumentTable:
        """The table of a source, with what an interrupted run has tokenized of it."""
        return DocumentTable(self._file(name, ""), dtype)

    def packed(self, name: str) -> dict[str, Any] | None:
        """A source's part of meta.json, if an interrupted run has packed it."""
        path = self._file(name, _PACKED)
        return files.read_json(path) if path.exists() else None

    def keys_of_packed(self, name: str) -> set[bytes]:
        """The hashes of the documents of a packed source."""
        rows = self._file(name, _DOCUMENTS).read_bytes()
        return {rows[start : start + _KEY_BYTES] for start in range(0, len(rows), _ROW.itemsize)}

    def set_packed(self, name: str, part: dict[str, Any]) -> None:
        """Note that a source is packed, and delete its tokens in reading order."""
        files.sync_folder(self.folder)
        files.write_json(self._file(name, _PACKED), part)
        self._file(name, _TOKENS).unlink()

    def set_settings(self, recipe: Recipe) -> None:
        """Note the settings; from here on an interruption leaves the folder, tokenizer included."""
        files.write_json(self.folder / _SETTINGS, _settings(recipe))

    @property
    def is_started(self) -> bool:
        """Whether the tokenizer and the settings are there."""
        return (self.folder / _SETTINGS).exists()

    @property
    def _committed_bytes(self) -> int:
        """UTF-8 bytes of the text whose tokens are on the disk."""
        tables = self.folder.glob(f".*{_DOCUMENTS}")
        rows = (np.frombuffer(table.read_bytes(), dtype="<i8").reshape(-1, 4) for table in tables)
        return sum(int(table[:, 3].sum()) for table in rows)

    def is_worth_keeping(self, error: BaseException) -> bool:
        """Whether the folder outlives an error: any other than the user's, or one that would cost much work."""
        return self.is_started and (not isinstance(error, UserError) or self._committed_bytes >= COMMIT_BYTES)

    def forget(self) -> None:
        """Remove what only an interrupted run needs."""
        for path in self.folder.glob(".*"):
            path.unlink()


@contextmanager
def unfinished(recipe: Recipe, output: str | Path, restart: bool = False) -> Iterator[Unfinished]:
    """Yield the folder of a preparation, whose files are those of the corpus when the block ends.

    Args:
        recipe: the settings; what an interrupted run of other settings has left is refused.
        output: where the corpus will stand; whatever stands there is replaced.
        restart: discard what an interrupted run has left.

    Raises:
        UserError: another process is at work there, one of other settings was, or the folder is somebody else's.
    """
    output = Path(output).resolve()
    work = Unfinished(output.with_name(output.name + ".partial"))
    with FolderLock(work.folder, "name another --output"):
        if restart or not work.is_started:
            _check_ours(work)
            _clear(work.folder)
        else:
            _check_settings(work.folder, recipe)
            print(f"{work.folder}: going on with what an interrupted run has left")
        try:
            yield work
        except BaseException as error:
            if work.is_worth_keeping(error):
                print(
                    f"{work.folder}: keeps what was done; the same command goes on from there",
                    file=sys.stderr,
                )
            else:
                shutil.rmtree(work.folder)
            raise
    work.forget()
    files.publish_folder(work.folder, output)


def _check_ours(work: Unfinished) -> None:
    """Refuse to clear a folder of that name that is somebody else's."""
    # before the settings there is nothing but these
    others = sorted({path.name for path in work.folder.iterdir()} - {LOCK, TOKENIZER})
    if others and not work.is_started:
        raise UserError(
            f"{work.folder}: holds {others[0]!r} and is no interrupted run's; move it, or name another --output"
        )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _settings(recipe: Recipe) -> dict[str, Any]:
    # another version may cut words otherwise
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers",)}
    # through JSON, so that what was read back compares
    return json.loads(json.dumps({"recipe": asdict(recipe), "versions": versions}))


def _check_settings(folder: Path, recipe: Recipe) -> None:
    before, now = files.read_json(folder / _SETTINGS), _settings(recipe)
    if json.dumps(before) != json.dumps(now):
        raise UserError(
            f"{folder}: an interrupted run with {_difference(before, now)} has left its work there; give its settings "
            "to go on, or pass --restart to discard it"
        )


def _difference(before: Any, now: Any, where: str = "") -> str:
    """The first setting that differs, and its former value."""
    if isinstance(before, dict) and isinstance(now, dict) and list(before) == list(now):
        for key, value in before.items():
            if json.dumps(value) != json.dumps(now[key]):
                return _difference(value, now[key], f"{where}.{key}" if where else key)
    return f"{where.removeprefix('recipe.')} {json.dumps(before):.80}"
