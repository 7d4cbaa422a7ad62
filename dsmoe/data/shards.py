"""Writes one split of one source as raw little-endian files of token ids."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsmoe.errors import UserError

DTYPES = {"uint16": "<u2", "uint32": "<u4"}


def dtype_for(vocab_size: int) -> str:
    """Name of the smallest type that holds every token id."""
    if vocab_size <= 1 << 16:
        return "uint16"
    if vocab_size <= 1 << 32:
        return "uint32"
    raise UserError(f"a vocabulary of {vocab_size} entries does not fit 32 bits")


class ShardWriter:
    """Appends tokens to `<prefix>-00000.bin`, `<prefix>-00001.bin`, ... in a folder.

    Args:
        folder: where the shards go.
        prefix: start of their names.
        dtype: "uint16" or "uint32".
        shard_tokens: tokens of every shard but the last; a document may straddle two.
    """

    def __init__(self, folder: Path, prefix: str, dtype: str, shard_tokens: int):
        self.folder = folder
        self.prefix = prefix
        self.dtype = np.dtype(DTYPES[dtype])
        self.shard_tokens = shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.num_tokens = 0
        self._handle: BinaryIO | None = None
        self._written = 0
        self._digest = hashlib.sha256()

    def write(self, tokens: np.ndarray) -> None:
        """Append a one-dimensional array of token ids."""
        self.num_tokens += len(tokens)
        while len(tokens):
            if self._handle is None:
                self._start()
            assert self._handle is not None
            part = tokens[: self.shard_tokens - self._written]
            data = part.astype(self.dtype, copy=False).tobytes()
            self._handle.write(data)
            self._digest.update(data)
            self._written += len(part)
            tokens = tokens[len(part) :]
            if self._written == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """Finish the shard at hand, if there is one."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
            self.shards[-1].update(num_tokens=self._written, sha256=self._digest.hexdigest())

    def _start(self) -> None:
        name = f"{self.prefix}-{len(self.shards):05d}.bin"
        self.shards.append({"file": name})
        self._handle = (self.folder / name).open("wb")
        self._written = 0
        self._digest = hashlib.sha256()
