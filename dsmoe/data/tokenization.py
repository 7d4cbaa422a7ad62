"""The tokenizer of a corpus: trained or loaded, saved for `AutoTokenizer`, and documents to token ids."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dsmoe import files
from dsmoe.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# looked for, in this order, when a bare tokenizer.json does not say which token ends a text
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
SMALLEST_VOCABULARY = 257  # 256 bytes and the end of text
# a document longer than this is encoded piece by piece, which bounds memory
_PIECE_CHARS = 1 << 22
_CUT = re.compile(r"(?<=[A-Za-z])\n(?=[A-Za-z])")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, model_max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's pre-tokenizer and "<|endoftext|>" as its only special token.

    Args:
        texts: training text.
        vocab_size: entries wanted, at least 257; fewer come out if the text is too small for them.
        model_max_length: what the tokenizer tells others about the longest input, in tokens.

    Raises:
        UserError: a vocabulary too small for the 256 bytes and the end of text.

    Source: byte-level BPE: Radford et al. 2019 ("Language Models are Unsupervised Multitask Learners").
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"train_tokenizer: {vocab_size} entries are too few; {SMALLEST_VOCABULARY} is the least"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, END_OF_TEXT, model_max_length=model_max_length)


def load_tokenizer(spec: str, eos_token: str | None = None) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer, so that encoding adds no special tokens by itself.

    Args:
        spec: a tokenizer.json file, a folder, or a name on the Hub. Code from the Hub is never run.
        eos_token: the token that ends a document; null: the tokenizer's own.

    Raises:
        UserError: nothing there, no fast tokenizer, or no end-of-text token.
    """
    path = Path(spec)
    options: dict[str, Any] = {}
    if path.is_file():
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise UserError(f"{spec}: not a tokenizer.json file ({error})") from None
        known = [token for token in _KNOWN_ENDS if backend.token_to_id(token) is not None]
        eos_token = eos_token or (known[0] if known else None)
    else:
        loaded = _from_pretrained(spec)
        backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
        eos_token = eos_token or loaded.eos_token
        names = ("bos_token", "pad_token", "unk_token", "chat_template")
        options = {name: getattr(loaded, name) for name in names if getattr(loaded, name, None)}
        options["model_max_length"] = loaded.model_max_length
    if eos_token is None:
        raise UserError(f"{spec}: the tokenizer names no end-of-text token; name it with --eos-token")
    if backend.token_to_id(eos_token) is None:
        raise UserError(f"{spec}: --eos-token {eos_token!r} is not in the tokenizer's vocabulary")
    return _wrapped(_without_template(backend), eos_token, **options)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save for `AutoTokenizer.from_pretrained(folder)`."""
    tokenizer.save_pretrained(str(folder))
    # transformers 5 writes its own new class name; this one is read by older versions and other tools as well
    config = folder / "tokenizer_config.json"
    files.write_json(config, {**files.read_json(config), "tokenizer_class": "PreTrainedTokenizerFast"})


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Entries an embedding table needs: the largest token id, plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a document.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: no eos token, and documents must end in one"
        )
    return tokenizer.eos_token_id


class DocumentEncoder:
    """Turns documents into token ids, each ended by the eos token.

    A special token spelled out in a document is encoded as plain text, so that eos stands only where a
    document ends. Documents over some 4 million characters are cut at a line break between two letters before
    encoding; the pre-tokenizer of GPT-2 splits there anyway, so that the ids are the same.

    Args:
        tokenizer: a fast tokenizer with an eos token.

    Raises:
        UserError: the tokenizer is not a fast one, or has no eos token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, piece_chars: int = _PIECE_CHARS):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"{tokenizer.name_or_path}: not a fast tokenizer (one with a tokenizer.json)")
        # a copy: the setting below must not leak into the caller's tokenizer
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos_token_id = end_of_text(tokenizer)
        before = json.loads(self.backend.to_str())["pre_tokenizer"] or {}
        cuttable = (
            before.get("type") == "ByteLevel" and before["use_regex"] and not before["add_prefix_space"]
        )
        self.piece_chars = piece_chars if cuttable else None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each document, as uint32 arrays that end in the eos token."""
        pieces = [self._pieces(text) for text in texts]
        encodings = iter(
            self.backend.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False)
        )
        end = [np.array([self.eos_token_id], dtype=np.uint32)]
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=np.uint32) for _ in parts] + end)
            for parts in pieces
        ]

    def encode(self, texts: Iterable[str], batch_chars: int = 1 << 20) -> Iterator[np.ndarray]:
        """Token ids of each document in order, encoded in batches of about `batch_chars` characters."""
        for batch in batched_by_size(texts, batch_chars):
            yield from self.encode_batch(batch)

    def _pieces(self, text: str) -> list[str]:
        pieces, start = [], 0
        while self.piece_chars is not None and len(text) - start > self.piece_chars:
            cut = _CUT.search(text, start + self.piece_chars)
            if cut is None:
                break
            pieces.append(text[start : cut.start()])
            start = cut.start()
        return [*pieces, text[start:]]


def batched_by_size(
    texts: Iterable[str], batch_chars: int, batch_documents: int = 4096
) -> Iterator[list[str]]:
    """Group documents in order into lists of about `batch_chars` characters, at most `batch_documents`."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= batch_chars or len(batch) >= batch_documents:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _from_pretrained(spec: str) -> Any:
    try:
        loaded = AutoTokenizer.from_pretrained(spec)
    except Exception as error:  # from missing folders to network errors
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tokenizer {spec}: no tokenizer could be loaded from it: {message}") from error
    if not hasattr(loaded, "backend_tokenizer"):
        raise UserError(f"--tokenizer {spec}: not a fast tokenizer (one with a tokenizer.json)")
    return loaded


def _without_template(backend: Tokenizer) -> Tokenizer:
    """Drop a post-processor that adds special tokens: what is trained on is the text, and an eos after it."""
    if backend.encode("a", add_special_tokens=True).ids != backend.encode("a", add_special_tokens=False).ids:
        print("note: this tokenizer added special tokens when encoding; the corpus' copy of it does not")
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _wrapped(backend: Tokenizer, eos_token: str, **options) -> PreTrainedTokenizerFast:
    defaults = {"bos_token": eos_token, "pad_token": eos_token, "model_max_length": 2048}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos_token, **{**defaults, **options})
