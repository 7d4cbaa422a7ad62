"""From sources of documents to a folder of packed token shards.

One reading of each source writes its tokens to a temporary file and a table of its documents: a seeded hash of the
text, its length in tokens and its length in bytes. Documents sorted by that hash are shuffled: the first ones are held
out, the rest is trained on. So the order and the splits depend on the seed and the texts alone, the shuffle is over all
documents however they were read, and memory holds no tokens.

An interrupted preparation goes on where it stopped (`dsmoe.data.unfinished`).
"""

import importlib.metadata
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dsmoe import files
from dsmoe.data import tokenization
from dsmoe.data.corpus import FORMAT_VERSION, META, TOKENIZER, TokenCorpus
from dsmoe.data.documents import JSONL_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES, document_key
from dsmoe.data.recipe import Recipe, Source, check_recipe
from dsmoe.data.sampling import tokenizer_sample
from dsmoe.data.shards import DTYPES, ShardWriter, dtype_for
from dsmoe.data.unfinished import DocumentTable, Unfinished, unfinished
from dsmoe.errors import UserError


def prepare(
    recipe: Recipe, output: str | Path, overwrite: bool = False, restart: bool = False
) -> TokenCorpus:
    """Tokenize, deduplicate, shuffle, split and pack every source.

    Args:
        recipe: the settings.
        output: folder to write; it appears whole, or not at all. Until then its files are in `output.partial`, which
            stays where an error that isn't the user's interrupts much work; the next call goes on from there.
        overwrite: replace an existing folder.
        restart: discard what an interrupted call has left.

    Returns:
        The corpus, opened.

    Raises:
        UserError: anything wrong with the recipe or a source.
    """
    check_recipe(recipe)
    files.check_new_folder(output, overwrite=overwrite, inputs=_inputs(recipe))
    with unfinished(recipe, output, restart) as work:
        tokenizer = _tokenizer(recipe, work)
        vocab_size = tokenization.vocabulary_size(tokenizer)
        dtype = dtype_for(vocab_size)
        encoder = tokenization.DocumentEncoder(tokenizer)
        seen: set[bytes] = set()
        sources = []
        for name, source in recipe.sources.items():
            part = work.packed(name)
            if part is None:
                with work.table(name, dtype) as table:
                    dropped = _tokenize(name, source, recipe.seed, encoder, table, seen)
                part = _pack(name, source, table, dropped, recipe, work.folder, dtype)
                work.set_packed(name, part)
            else:
                seen |= work.keys_of_packed(name)
            sources.append(part)
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
                "sha256": files.sha256(work.folder / TOKENIZER / "tokenizer.json"),
            },
            "sources": sources,
            "versions": {
                name: importlib.metadata.version(name) for name in ("dsmoe", "tokenizers", "transformers")
            },
        }
        files.write_json(work.folder / META, meta)
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


def _tokenizer(recipe: Recipe, work: Unfinished) -> PreTrainedTokenizerFast:
    """The tokenizer that the corpus holds, which an interrupted run may have saved."""
    folder = work.folder / TOKENIZER
    if not work.is_started:
        tokenizer = (
            _trained_tokenizer(recipe, recipe.train_tokenizer)
            if recipe.train_tokenizer is not None
            else tokenization.load_tokenizer(str(recipe.tokenizer), recipe.eos_token)
        )
        tokenization.save_tokenizer(tokenizer, folder)
        files.sync_folder(folder)
        work.set_settings(recipe)
    # as saved also the first time, so that both times all that follows is the same
    return tokenization.load_tokenizer(str(folder))


def _trained_tokenizer(recipe: Recipe, vocab_size: int) -> PreTrainedTokenizerFast:
    sample = tokenizer_sample(recipe)
    print(f"training a tokenizer of {vocab_size:,} entries on {len(sample):,} documents")
    tokenizer = tokenization.train_tokenizer(sample, vocab_size, recipe.model_max_length)
    found = tokenization.vocabulary_size(tokenizer)
    if found < vocab_size:
        print(f"note: the text has too few distinct words for that; the vocabulary has {found:,} entries")
    return tokenizer


def _tokenizer_origin(recipe: Recipe) -> str:
    if recipe.tokenizer is None:
        return f"trained, {recipe.train_tokenizer} entries"
    return Path(recipe.tokenizer).resolve().name if Path(recipe.tokenizer).exists() else recipe.tokenizer


def _tokenize(
    name: str,
    source: Source,
    seed: int,
    encoder: tokenization.DocumentEncoder,
    table: DocumentTable,
    seen: set[bytes],
) -> dict[str, int]:
    """Read a source and put what `table` lacks of it there; returns how many documents were dropped."""
    dropped = {"duplicates_dropped": 0, "empty_dropped": 0}
    # the counts at each document that was read and isn't used yet: how far is read ahead must not show
    ahead: deque[dict[str, int]] = deque()
    fresh = _fresh(source.read(seed), seed, seen, dropped, ahead)
    with tqdm(desc=f"tokenizing {name}", unit=" tokens", unit_scale=True) as bar:
        _pass_over(fresh, seed, table, source)
        ahead.clear()
        bar.update(table.total_tokens)
        for batch in tokenization.batched_by_size(fresh, 1 << 20):
            for place, (text, tokens) in enumerate(zip(batch, encoder.encode_batch(batch))):
                if source.max_tokens is not None and table.total_tokens + len(tokens) > source.max_tokens:
                    # the rest of the batch was read and is not used: another source may still bring it
                    seen.difference_update(document_key(unused, seed) for unused in batch[place:])
                    fresh.close()
                    dropped = ahead[0]
                    break
                ahead.popleft()
                table.add(document_key(text, seed), tokens, len(text.encode("utf-8")))
                bar.update(len(tokens))
    table.commit()
    if not len(table):
        why = f" within max_tokens {source.max_tokens}" if source.max_tokens is not None else ""
        raise UserError(
            f"{source.path}: source {name!r} has no document{why}, leaving out duplicates and blank ones"
        )
    return dropped


def _pass_over(texts: Iterator[str], seed: int, table: DocumentTable, source: Source) -> None:
    """Read the documents that an interrupted run has tokenized, and check that they are still the same."""
    number = 0
    for number, text in enumerate(islice(texts, len(table)), 1):
        if document_key(text, seed) != table.key(number - 1):
            break
    else:
        if number == len(table):
            return
    raise UserError(
        f"{source.path}: document {number:,} is another than when an interrupted run read it; pass --restart to "
        "tokenize everything again"
    )


def _fresh(
    texts: Iterable[str],
    seed: int,
    seen: set[bytes],
    dropped: dict[str, int],
    ahead: deque[dict[str, int]],
) -> Generator[str, None, None]:
    """Yield the texts that are neither blank nor seen before (in any source); `ahead` gets the counts at each."""
    for text in texts:
        key = document_key(text, seed)
        if not text.strip():
            dropped["empty_dropped"] += 1
        elif key in seen:
            dropped["duplicates_dropped"] += 1
        else:
            seen.add(key)
            ahead.append(dict(dropped))
            yield text


def _pack(
    name: str,
    source: Source,
    table: DocumentTable,
    dropped: dict[str, int],
    recipe: Recipe,
    folder: Path,
    dtype: str,
) -> dict[str, Any]:
    """Write the shards of every split of a source; returns its part of meta.json."""
    starts = np.concatenate([[0], np.cumsum(table.num_tokens)])
    num_bytes = table.num_bytes
    tokens = np.memmap(table.tokens_path, dtype=DTYPES[dtype], mode="r")
    splits = {}
    for split, documents in _split(name, table.keys, recipe).items():
        with closing(ShardWriter(folder, f"{name}-{split}", dtype, recipe.shard_tokens)) as writer:
            for document in tqdm(documents, desc=f"packing {name} {split}", unit=" documents", leave=False):
                writer.write(tokens[starts[document] : starts[document + 1]])
        splits[split] = {
            "shards": writer.shards,
            "num_tokens": writer.num_tokens,
            "num_documents": len(documents),
            "num_bytes": int(num_bytes[documents].sum()),
        }
    part: dict[str, Any] = {"name": name, "weight": source.weight, "origin": source.origin}
    if not source.is_hub and Path(source.path).is_file():
        part["origin_sha256"] = files.sha256(source.path)
    # in this order: the corpus' fingerprint is of the bytes
    return {**part, **dropped, "splits": splits}


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
