"""From sources of documents to a folder of packed token shards.

One reading of each source writes its tokens to a temporary file and keeps, for every document, a seeded
64-bit hash of the text, its length in tokens and its length in bytes. Documents sorted by that hash are
shuffled: the first ones are held out, the rest is trained on. So the order and the splits depend on the seed
and the texts alone, the shuffle is over all documents however they were read, and memory holds no tokens.
"""

import importlib.metadata
from array import array
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dsmoe import files
from dsmoe.data import tokenization
from dsmoe.data.corpus import FORMAT_VERSION, META, TOKENIZER, TokenCorpus
from dsmoe.data.documents import JSONL_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES, document_key
from dsmoe.data.recipe import Recipe, Source, check_recipe
from dsmoe.data.sampling import tokenizer_sample
from dsmoe.data.shards import DTYPES, ShardWriter, dtype_for
from dsmoe.errors import UserError


@dataclass
class TokenizedSource:
    """One source after its only reading.

    Attributes:
        path: temporary file of all tokens in reading order.
        keys: seeded hash of each document, uint64 [D].
        num_tokens: tokens of each, its eos included, int64 [D].
        num_bytes: UTF-8 bytes of each, int64 [D].
        duplicates: documents dropped because the same text came before.
        empty: documents dropped because they are blank.
    """

    path: Path
    keys: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    duplicates: int
    empty: int


def prepare(recipe: Recipe, output: str | Path, overwrite: bool = False) -> TokenCorpus:
    """Tokenize, deduplicate, shuffle, split and pack every source.

    Args:
        recipe: the settings.
        output: folder to write; it appears whole, or not at all.
        overwrite: replace an existing folder.

    Returns:
        The corpus, opened.

    Raises:
        UserError: anything wrong with the recipe or a source.
    """
    check_recipe(recipe)
    with files.new_folder(output, overwrite=overwrite, inputs=_inputs(recipe)) as folder:
        tokenizer = _tokenizer(recipe)
        tokenization.save_tokenizer(tokenizer, folder / TOKENIZER)
        vocab_size = tokenization.vocabulary_size(tokenizer)
        dtype = dtype_for(vocab_size)
        encoder = tokenization.DocumentEncoder(tokenizer)
        seen: set[bytes] = set()
        sources = []
        for name, source in recipe.sources.items():
            tokenized = _tokenize(name, source, recipe.seed, encoder, folder / f".{name}.tokens", dtype, seen)
            sources.append(_pack(name, source, tokenized, recipe, folder, dtype))
            tokenized.path.unlink()
        _set_weights(sources, recipe)
        meta = {
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "eos_token_id": encoder.eos_token_id,
            "seed": recipe.seed,
            "validation_fraction": recipe.validation_fraction,
            "test_fraction": recipe.test_fraction,
            "tokenizer": {
                "origin": _tokenizer_origin(recipe),
                "sha256": files.sha256(_tokenizer_json(folder)),
            },
            "sources": sources,
            "versions": {
                name: importlib.metadata.version(name) for name in ("dsmoe", "tokenizers", "transformers")
            },
        }
        files.write_json(folder / META, meta)
    return TokenCorpus(output)


def _inputs(recipe: Recipe) -> list[Path]:
    """The files and folders that are read; of a source that is a folder also the files with documents in it."""
    sources = [Path(source.path) for source in recipe.sources.values() if not source.is_hub]
    inside = [
        file
        for source in sources
        for file in source.rglob("*")
        if file.name.endswith(JSONL_SUFFIXES + PARQUET_SUFFIXES + TEXT_SUFFIXES)
    ]
    # a name on the Hub is no file here, and passed over
    return sources + inside + ([] if recipe.tokenizer is None else [Path(recipe.tokenizer)])


def _tokenizer(recipe: Recipe):
    if recipe.tokenizer is not None:
        return tokenization.load_tokenizer(recipe.tokenizer, recipe.eos_token)
    assert recipe.train_tokenizer is not None
    sample = tokenizer_sample(recipe)
    print(f"training a tokenizer of {recipe.train_tokenizer:,} entries on {len(sample):,} documents")
    tokenizer = tokenization.train_tokenizer(sample, recipe.train_tokenizer, recipe.model_max_length)
    found = tokenization.vocabulary_size(tokenizer)
    if found < recipe.train_tokenizer:
        print(f"note: the text has too few distinct words for that; the vocabulary has {found:,} entries")
    return tokenizer


def _tokenizer_origin(recipe: Recipe) -> str:
    if recipe.tokenizer is None:
        return f"trained, {recipe.train_tokenizer} entries"
    return Path(recipe.tokenizer).resolve().name if Path(recipe.tokenizer).exists() else recipe.tokenizer


def _tokenizer_json(folder: Path) -> Path:
    return folder / TOKENIZER / "tokenizer.json"


def _tokenize(
    name: str,
    source: Source,
    seed: int,
    encoder: tokenization.DocumentEncoder,
    path: Path,
    dtype: str,
    seen: set[bytes],
) -> TokenizedSource:
    """Read a source once: write its tokens to `path`, and return the table of its documents."""
    keys, lengths, sizes = array("Q"), array("q"), array("q")
    dropped = {"duplicate": 0, "empty": 0}
    total = 0
    fresh = _fresh(source.read(seed), seed, seen, dropped)
    with path.open("wb") as handle, tqdm(desc=f"tokenizing {name}", unit=" tokens", unit_scale=True) as bar:
        for batch in tokenization.batched_by_size(fresh, 1 << 20):
            for place, (text, tokens) in enumerate(zip(batch, encoder.encode_batch(batch))):
                if source.max_tokens is not None and total + len(tokens) > source.max_tokens:
                    # the rest of the batch was read and is not used: another source may still bring it
                    seen.difference_update(document_key(unused, seed) for unused in batch[place:])
                    fresh.close()
                    break
                handle.write(tokens.astype(DTYPES[dtype]).tobytes())
                total += len(tokens)
                keys.append(int.from_bytes(document_key(text, seed)[:8], "big"))
                lengths.append(len(tokens))
                sizes.append(len(text.encode("utf-8")))
                bar.update(len(tokens))
    if not keys:
        why = f" within max_tokens {source.max_tokens}" if source.max_tokens is not None else ""
        raise UserError(
            f"{source.path}: source {name!r} has no document{why}, leaving out duplicates and blank ones"
        )
    return TokenizedSource(
        path=path,
        keys=np.frombuffer(keys, dtype=np.uint64),
        num_tokens=np.frombuffer(lengths, dtype=np.int64),
        num_bytes=np.frombuffer(sizes, dtype=np.int64),
        duplicates=dropped["duplicate"],
        empty=dropped["empty"],
    )


def _fresh(
    texts: Iterable[str], seed: int, seen: set[bytes], dropped: dict[str, int]
) -> Generator[str, None, None]:
    """Yield the texts that are neither blank nor seen before (in any source)."""
    for text in texts:
        key = document_key(text, seed)
        if not text.strip():
            dropped["empty"] += 1
        elif key in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
            yield text


def _pack(
    name: str, source: Source, tokenized: TokenizedSource, recipe: Recipe, folder: Path, dtype: str
) -> dict[str, Any]:
    """Write the shards of every split of a source; returns its part of meta.json."""
    starts = np.concatenate([[0], np.cumsum(tokenized.num_tokens)])
    tokens = np.memmap(tokenized.path, dtype=DTYPES[dtype], mode="r")
    splits = {}
    for split, documents in _split(name, tokenized.keys, recipe).items():
        writer = ShardWriter(folder, f"{name}-{split}", dtype, recipe.shard_tokens)
        for document in tqdm(documents, desc=f"packing {name} {split}", unit=" documents", leave=False):
            writer.write(tokens[starts[document] : starts[document + 1]])
        writer.close()
        splits[split] = {
            "shards": writer.shards,
            "num_tokens": writer.num_tokens,
            "num_documents": len(documents),
            "num_bytes": int(tokenized.num_bytes[documents].sum()),
        }
    part: dict[str, Any] = {"name": name, "weight": source.weight, "origin": source.origin}
    if not source.is_hub and Path(source.path).is_file():
        part["origin_sha256"] = files.sha256(source.path)
    return {
        **part,
        "duplicates_dropped": tokenized.duplicates,
        "empty_dropped": tokenized.empty,
        "splits": splits,
    }


def _split(name: str, keys: np.ndarray, recipe: Recipe) -> dict[str, np.ndarray]:
    """Document numbers of each split, shuffled; a positive fraction holds out at least one document."""
    order = np.argsort(keys, kind="stable")
    splits = {}
    for split, fraction in (("validation", recipe.validation_fraction), ("test", recipe.test_fraction)):
        count = max(1, round(len(keys) * fraction)) if fraction > 0 else 0
        if count:
            splits[split], order = order[:count], order[count:]
    if not len(order):
        raise UserError(
            f"{recipe.sources[name].path}: source {name!r} has {len(keys)} document(s), too few to hold out "
            "any; set the fractions to 0, or, for plain text with blank lines between documents, pass "
            "--split-paragraphs"
        )
    return {"train": order, **splits}


def _set_weights(sources: list[dict[str, Any]], recipe: Recipe) -> None:
    """Make the weights shares that sum to 1; without any, a source's is its share of training tokens."""
    for source in sources:
        if source["weight"] is None:
            source["weight"] = source["splits"]["train"]["num_tokens"]
    total = sum(source["weight"] for source in sources)
    for source in sources:
        source["weight"] /= total
