r"""Which of llama.cpp's pre-tokenizers cuts text as a tokenizer.json does.

llama.cpp knows pre-tokenizers by name (`tokenizer.ggml.pre`), each with its expressions built in
(`llm_tokenizer_bpe` in `src/llama-vocab.cpp`), and a wrong name gives other tokens without a word. So the expressions of
the tokenizer.json are looked up, as they stand, and only names are used whose tokens were compared with the
tokenizer's own:

| pre       | expressions                         | tokenizers                                 |
|-----------|-------------------------------------|--------------------------------------------|
| gpt-2     | GPT-2's                             | `dsmoe data prepare`, GPT-2, GPT-NeoX, OLMo |
| smollm    | single digits, then GPT-2's         | SmolLM, StarCoder                          |
| llama-bpe | Llama 3's, with ignore_merges       | Llama 3                                    |
| dbrx      | the same, without ignore_merges     | cl100k, OLMo 2                             |
| qwen2     | Llama 3's with digits one by one    | Qwen 2                                     |
"""

from typing import Any

from dsmoe.errors import UserError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# two spellings of the same: the possessive quantifiers stand before what they can't match
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# (expressions in their order, ignore_merges of the BPE): llama.cpp's name
_KNOWN = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_CL100K,), True): "llama-bpe",
    ((_CL100K,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
}
_ADVICE = (
    "known are those of GPT-2 (`dsmoe data prepare --train-tokenizer`, GPT-NeoX), SmolLM, Llama 3, cl100k and Qwen 2; "
    "`--no-tokenizer` writes a file without one"
)


def pretokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a byte-level BPE.

    Args:
        tokenizer: the content of a tokenizer.json.

    Raises:
        UserError: none that is known to give the same tokens.
    """
    expressions = _expressions(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = _KNOWN.get((expressions, ignore_merges))
    if name is None:
        found = " then ".join(expressions) if expressions else "none"
        raise UserError(
            f"the tokenizer's pre-tokenizer (expressions: {found}; ignore_merges {str(ignore_merges).lower()}) is none "
            f"that llama.cpp is known to share; {_ADVICE}"
        )
    return name


def _expressions(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The expressions that cut the text, one after another; the bytes must follow last."""
    parts = [] if pre_tokenizer is None else [pre_tokenizer]
    if parts and parts[0]["type"] == "Sequence":
        parts = parts[0]["pretokenizers"]
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise UserError(f"the tokenizer's pre-tokenizer is not byte-level; {_ADVICE}")
    expressions = [_expression(part) for part in parts[:-1]]
    last = parts[-1]
    if last.get("add_prefix_space"):
        raise UserError(f"the tokenizer adds a space before every text (add_prefix_space); {_ADVICE}")
    if last.get("use_regex", True):
        expressions.append(_GPT2)
    return tuple(expressions)


def _expression(part: dict[str, Any]) -> str:
    if part["type"] == "Digits":
        return _DIGIT if part["individual_digits"] else _DIGIT + "+"
    # what these expressions leave out is nothing, so that both ways keep every match as a piece
    cuts = (part.get("behavior"), part.get("invert")) in (("Isolated", False), ("Removed", True))
    if part["type"] == "Split" and cuts and "Regex" in part["pattern"]:
        return part["pattern"]["Regex"]
    raise UserError(f"the tokenizer's pre-tokenizer holds {part['type']!r} with other settings; {_ADVICE}")
