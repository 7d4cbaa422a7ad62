"""Checks a prepared corpus against its checksums, and prints what it holds."""

from pathlib import Path

from tqdm import tqdm

from dsmoe import files
from dsmoe.data.corpus import META, TokenCorpus
from dsmoe.errors import UserError


def verify(folder: str | Path) -> TokenCorpus:
    """Compare every shard, and the tokenizer, with the checksum in meta.json.

    Raises:
        UserError: not a corpus, or a file whose checksum differs.
    """
    corpus = TokenCorpus(folder)
    expected = {
        shard["file"]: shard["sha256"]
        for source in corpus.meta["sources"]
        for split in source["splits"].values()
        for shard in split["shards"]
    }
    expected["tokenizer/tokenizer.json"] = corpus.meta["tokenizer"]["sha256"]
    for name, digest in tqdm(expected.items(), desc="checksums", unit=" files"):
        path = corpus.folder / name
        if not path.is_file():
            raise UserError(
                f"{path}: this file is missing; copy the whole folder, or prepare the corpus again"
            )
        found = files.sha256(path)
        if found != digest:
            raise UserError(f"{path}: its SHA-256 is {found}, and {META} says {digest}; the file is damaged")
    return corpus


def table(corpus: TokenCorpus) -> str:
    """A line per source and split, then one per split over all sources."""
    rows = [("source", "split", "weight", "documents", "tokens", "bytes", "bytes/token")]
    for source in corpus.meta["sources"]:
        for split, info in source["splits"].items():
            weight = f"{source['weight']:.4f}" if split == "train" else ""
            rows.append((source["name"], split, weight, *_numbers(*_counts(info))))
    if len(corpus.source_names) > 1:
        for split in corpus.splits:
            counts = (corpus.num_documents(split), corpus.num_tokens(split), corpus.num_bytes(split))
            rows.append(("all", split, "", *_numbers(*counts)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def _counts(info: dict) -> tuple[int, int, int]:
    return info["num_documents"], info["num_tokens"], info["num_bytes"]


def _numbers(documents: int, tokens: int, size: int) -> tuple[str, str, str, str]:
    return f"{documents:,}", f"{tokens:,}", f"{size:,}", f"{size / tokens:.3f}"
