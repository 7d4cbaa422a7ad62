"""`TokenCorpus`: a folder of packed token shards, as `dsmoe data prepare` writes it, memory-mapped."""

import hashlib
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe import files
from dsmoe.data.shards import DTYPES
from dsmoe.errors import UserError

FORMAT_VERSION = 1
META = "meta.json"
TOKENIZER = "tokenizer"
SPLITS = ("train", "validation", "test")


class TokenStream:
    """All tokens of one split of one source as one sequence, across its shards.

    Args:
        paths: the shards in order.
        lengths: tokens of each.
        dtype: numpy's name of the type on disk, such as "<u2".
    """

    def __init__(self, paths: list[Path], lengths: list[int], dtype: str):
        self._maps = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        self._ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start, ..., stop - 1 as an int64 array (a copy).

        Raises:
            IndexError: the range does not lie inside the stream.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        out = np.empty(stop - start, dtype=np.int64)
        shard, done = bisect_right(self._ends, start), 0
        while done < len(out):
            first = start + done - (self._ends[shard - 1] if shard else 0)
            part = self._maps[shard][first : first + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def positions_of(self, token: int) -> np.ndarray:
        """Where a token stands, ascending (int64)."""
        starts = [0, *self._ends[:-1]]
        found = [np.flatnonzero(part == token) + start for part, start in zip(self._maps, starts)]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


class TokenCorpus:
    """A prepared corpus: its description and its memory-mapped tokens.

    Args:
        folder: what `dsmoe data prepare --output` named.

    Attributes:
        folder: Path of the folder.
        meta: what meta.json holds.
        vocab_size: entries an embedding table needs.
        eos_token_id: the token after each document.
        tokenizer_dir: Path for `AutoTokenizer.from_pretrained`.
        fingerprint: SHA-256 of meta.json, which holds the checksum of every shard: it identifies the corpus.
        weights: source name to its share of sampled tokens.

    Raises:
        UserError: not such a folder, another format version, or a shard that is missing or of the wrong size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / META
        if not path.is_file():
            raise UserError(
                f"{self.folder}: not a prepared corpus (no {META}); make one with dsmoe data prepare"
            )
        self.meta: dict[str, Any] = files.read_json(path)
        if not isinstance(self.meta, dict) or self.meta.get("format_version") != FORMAT_VERSION:
            version = self.meta.get("format_version") if isinstance(self.meta, dict) else None
            raise UserError(f"{path}: format_version is {version!r}; this version reads {FORMAT_VERSION}")
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            self._open()
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged description ({type(error).__name__}: {error})") from None

    def _open(self) -> None:
        self.vocab_size: int = self.meta["vocab_size"]
        self.eos_token_id: int = self.meta["eos_token_id"]
        self.tokenizer_dir = self.folder / TOKENIZER
        self.weights: dict[str, float] = {source["name"]: source["weight"] for source in self.meta["sources"]}
        dtype = DTYPES[self.meta["dtype"]]
        self._splits: dict[tuple[str, str], dict[str, Any]] = {}
        self._streams: dict[tuple[str, str], TokenStream] = {}
        for source in self.meta["sources"]:
            for split, info in source["splits"].items():
                paths = [self.folder / Path(shard["file"]).name for shard in info["shards"]]
                lengths = [shard["num_tokens"] for shard in info["shards"]]
                for shard_path, length in zip(paths, lengths):
                    _check_size(shard_path, length * np.dtype(dtype).itemsize)
                key = (source["name"], split)
                self._splits[key] = info
                self._streams[key] = TokenStream(paths, lengths, dtype)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in the order of the recipe."""
        return tuple(self.weights)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that hold tokens, among "train", "validation" and "test"."""
        return tuple(split for split in SPLITS if self._total(split, "num_tokens"))

    def stream(self, source: str, split: str) -> TokenStream:
        """The tokens of one split of one source (an empty stream where it has none)."""
        return self._streams.get((source, split)) or TokenStream([], [], "<u2")

    def num_tokens(self, split: str) -> int:
        """Tokens of a split over all sources, eos tokens included."""
        return self._total(self._known(split), "num_tokens")

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text of a split over all sources."""
        return self._total(self._known(split), "num_bytes")

    def num_documents(self, split: str) -> int:
        """Documents of a split over all sources."""
        return self._total(self._known(split), "num_documents")

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token, eos counted (nats per token / this / ln 2: bits per byte)."""
        return self.num_bytes(split) / self.num_tokens(split)

    def _known(self, split: str) -> str:
        if split not in self.splits:
            raise UserError(f"{self.folder}: no split {split!r}; there are {', '.join(self.splits)}")
        return split

    def _total(self, split: str, field: str) -> int:
        return sum(info[field] for (_, name), info in self._splits.items() if name == split)


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing; copy the whole folder, or prepare the corpus again")
    size = path.stat().st_size
    if size != expected:
        raise UserError(f"{path}: {size} bytes long, and {META} says {expected}; the file is damaged")
