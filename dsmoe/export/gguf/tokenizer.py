"""The vocabulary of a GGUF file, read from the tokenizer files of a checkpoint.

llama.cpp takes a byte-level BPE as lists: tokens by id, a type for each, merges, and the ids of special tokens. What it
can't do as the tokenizer does is refused; `--no-tokenizer` writes a file without a vocabulary ("no_vocab").
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsmoe.checkpoint.pretrained import TOKENIZER_FILES
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.export.gguf.pretokenizers import pretokenizer_name

_WAY_OUT = "`--no-tokenizer` writes a file without one"
# TokenType of the package `gguf`, llama_token_type of llama.cpp
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: by id, as many as the model's embedding table has rows.
        types: of the tokens.
        merges: pairs of tokens, joined by a space, the first merge first.
        add_bos: whether encoding puts the beginning-of-sequence token before a text.
        add_eos: whether it puts the end-of-sequence token after it.
        special_ids: "bos", "eos" and, where there are any, "unk" and "pad".
        chat_template: as transformers has it; None: none.
        notes: what a user should know.
        backend: the tokenizer itself.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    add_bos: bool
    add_eos: bool
    special_ids: dict[str, int]
    chat_template: str | None
    notes: list[str]
    backend: Tokenizer


def read_vocabulary(folder: Path, config: DSMoEConfig) -> Vocabulary | None:
    """The vocabulary of a checkpoint; None where the folder holds no tokenizer.

    Args:
        folder: of the model.
        config: the model's; its embedding table may have more rows than the tokenizer has tokens.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    loaded = _load(folder)
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    content = json.loads(backend.to_str())
    _check_model(content["model"])
    notes = _check_normalizer(content.get("normalizer"))
    pre = pretokenizer_name(content)
    tokens, types, unused = _tokens(content, config.vocab_size)
    if unused:
        notes.append(
            f"{unused} rows of the embedding table belong to no token; they are named [PAD...] and unused in the file"
        )
    before, after = _added_by_encoding(backend)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=_merges(content["model"]),
        add_bos=bool(before),
        add_eos=bool(after),
        special_ids=_special_ids(loaded, config, before, after),
        chat_template=loaded.chat_template if isinstance(loaded.chat_template, str) else None,
        notes=notes,
        backend=backend,
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Hand a vocabulary to a GGUFWriter; None: the file says that it has none."""
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    ids = vocabulary.special_ids
    writer.add_bos_token_id(ids["bos"])
    writer.add_eos_token_id(ids["eos"])
    if "unk" in ids:
        writer.add_unk_token_id(ids["unk"])
    if "pad" in ids:
        writer.add_pad_token_id(ids["pad"])
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _load(folder: Path) -> Any:
    """The tokenizer as a user of the checkpoint gets it."""
    try:
        if (folder / "tokenizer_config.json").exists():
            loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # from missing files to damaged ones
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokenizer can't be loaded ({message}); {_WAY_OUT}") from None
    if not hasattr(loaded, "backend_tokenizer"):
        raise UserError(f"{folder}: not a fast tokenizer (one with a tokenizer.json); {_WAY_OUT}")
    return loaded


def _check_model(model: dict[str, Any]) -> None:
    for what, wrong in (
        ("is no BPE", model.get("type") != "BPE"),
        ("falls back to bytes (byte_fallback), as SentencePiece does", model.get("byte_fallback")),
        ("drops merges at random (dropout)", model.get("dropout")),
        ("marks word pieces (continuing_subword_prefix)", model.get("continuing_subword_prefix")),
        ("marks ends of words (end_of_word_suffix)", model.get("end_of_word_suffix")),
    ):
        if wrong:
            raise UserError(f"the tokenizer {what}; a byte-level BPE is what this export knows; {_WAY_OUT}")


def _check_normalizer(normalizer: dict[str, Any] | None) -> list[str]:
    """Notes on the normalizer; llama.cpp has none for a byte-level BPE."""
    if normalizer is None:
        return []
    parts = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    for part in parts:
        if part["type"] != "NFC":
            raise UserError(
                f"the tokenizer normalises text ({part['type']}), which llama.cpp does not; {_WAY_OUT}"
            )
    if not parts:
        return []
    return [
        "the tokenizer brings text into Unicode's form NFC first, llama.cpp does not: give it text in NFC"
    ]


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int], int]:
    """Tokens and types by id, and how many ids belong to no token."""
    names = {number: token for token, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(names, NORMAL)
    for added in content["added_tokens"]:
        for setting in ("lstrip", "rstrip", "single_word"):
            if added[setting]:
                raise UserError(
                    f"the tokenizer's token {added['content']!r} has {setting}, which llama.cpp does not follow; "
                    f"{_WAY_OUT}"
                )
        names[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(names) >= vocab_size:
        raise UserError(
            f"the tokenizer's token {names[max(names)]!r} has id {max(names)}, beyond model.vocab_size {vocab_size}"
        )
    taken = set(names.values())
    if len(taken) < len(names):
        raise UserError(f"the tokenizer gives one token several ids, which ends llama.cpp; {_WAY_OUT}")
    unused = [number for number in range(vocab_size) if number not in names]
    for number in unused:
        name = f"[PAD{number}]"
        while name in taken:
            name = f"[{name}]"
        names[number], types[number] = name, UNUSED
    numbers = range(vocab_size)
    return [names[n] for n in numbers], [types[n] for n in numbers], len(unused)


def _merges(model: dict[str, Any]) -> list[str]:
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    for pair in merges:
        if any(" " in token for token in pair):
            raise UserError(
                f"the tokenizer merges tokens with spaces {pair}: it is not byte-level; {_WAY_OUT}"
            )
    return [" ".join(pair) for pair in merges]


def _added_by_encoding(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that encoding puts before and after a text, at most one each."""
    text = "a"
    plain = backend.encode(text, add_special_tokens=False).ids
    full = backend.encode(text).ids
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    before, after = full[:start], full[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise UserError(
            f"the tokenizer adds {len(before)} tokens before and {len(after)} after a text; llama.cpp adds at most one "
            f"each; {_WAY_OUT}"
        )
    return before, after


def _special_ids(loaded: Any, config: DSMoEConfig, before: list[int], after: list[int]) -> dict[str, int]:
    """Ids of special tokens; llama.cpp takes 11 for bos and eos where a file names none, so both are always named."""
    of_config = config.eos_token_id
    if isinstance(of_config, list):
        of_config = of_config[0] if of_config else None
    own = loaded.eos_token_id if loaded.eos_token_id is not None else of_config
    eos = after[0] if after else own
    if eos is None:
        raise UserError(f"the tokenizer names no end-of-sequence token (eos_token); {_WAY_OUT}")
    bos = loaded.bos_token_id if loaded.bos_token_id is not None else eos
    ids = {
        "bos": before[0] if before else bos,
        "eos": eos,
        "unk": loaded.unk_token_id,
        "pad": loaded.pad_token_id,
    }
    return {name: number for name, number in ids.items() if number is not None}
