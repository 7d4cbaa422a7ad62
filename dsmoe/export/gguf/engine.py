"""A GGUF file run by llama.cpp itself, through llama-cpp-python, where that is installed.

Keys and values are cached in float32 here (llama.cpp's default is float16). In a file of bfloat16 or float16 llama.cpp
rounds the input of every matrix product to that type as well, which the original does not.
"""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsmoe.errors import UserError
from dsmoe.export.gguf.tokenizer import Vocabulary

# mean over positions and tokens of |difference of log-probabilities|. Measured: float32 2e-6; float16 0.0005 on trained
# models and 0.002 on random ones with sharp routers; bfloat16 0.004 and 0.04. One expert more or less: 0.2.
BOUNDS = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.1}
_F32 = 0  # of ggml_type
# letters, accents, other scripts, emoji, digits, runs of white space, line ends, contractions, punctuation
TEXTS = (
    "Hello, world!",
    "The quick brown fox doesn't jump; it's LAZY, they'LL say. I'd've known.",
    "na\u00efve caf\u00e9 \u00dcbergr\u00f6\u00dfe \u0415\u0432\u0440\u043e\u043f\u0430 \u65e5\u672c\u8a9e\u306e\u6587",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u1797\u17b6\u179f\u17b6 \u0939\u093f\u0928\u094d\u0926\u0940",
    "emoji \U0001f680\U0001f636\u200d\U0001f32b\ufe0f \U0001f999\U0001f999 \u2705!!",
    "3 33 333 3333 33333 1234567890 3.14 1,000,000 2\u00b2 \u00bd \u0663 room101b",
    "  two\n\n   three\t\ttabs \t mixed \r\n windows \n \n\n end   ",
    "                                                  fifty spaces",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # ------===???!!!\n\n\n",
    "<|endoftext|>one<|endoftext|> two <|im_start|>three",
    "\u00a0no-break\u3000wide\u2009thin\u200bzero\u0000null\u007f",
    " ",
    "",
)


@dataclass(frozen=True)
class EngineReport:
    """What llama.cpp gave.

    Attributes:
        version: of llama-cpp-python.
        mean_abs_logp_difference: mean over positions and tokens of the difference of log-probabilities to the original.
        argmax_agreement: share of positions with the same most likely token.
        num_texts: texts whose token ids equal the tokenizer's; None without a tokenizer.
    """

    version: str
    mean_abs_logp_difference: float
    argmax_agreement: float
    num_texts: int | None


def load_engine(path: Path, num_positions: int) -> Any:
    """The model in llama.cpp; None where llama-cpp-python is missing or does not start."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):
        return None
    return llama_cpp.Llama(
        model_path=os.fspath(path),
        n_ctx=num_positions,
        n_batch=num_positions,
        n_ubatch=num_positions,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        n_gpu_layers=0,
        logits_all=True,
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )


def engine_logits(engine: Any, tokens_BS: Tensor, batch: int | None = None) -> Tensor:
    """Logits [B, S, V] by llama.cpp.

    Args:
        engine: of `load_engine`.
        tokens_BS: the tokens.
        batch: tokens of a sequence that are given at once; None: all.
    """
    rows = []
    for sequence in tokens_BS.tolist():
        engine.reset()
        for start in range(0, len(sequence), batch or len(sequence)):
            engine.eval(sequence[start : start + (batch or len(sequence))])
        rows.append(torch.from_numpy(np.array(engine.scores[: len(sequence)])))
    return torch.stack(rows)


def check_engine(
    path: Path, dtype: str, tokens_BS: Tensor, logits_BSV: Tensor, vocabulary: Vocabulary | None
) -> EngineReport | None:
    """Run a file in llama.cpp; None where llama-cpp-python is missing.

    Args:
        path: the file.
        dtype: of its matrices.
        tokens_BS: tokens to run it on.
        logits_BSV: the original's.
        vocabulary: written to the file.

    Raises:
        UserError: llama.cpp does not load the file, or gives other logits or tokens.
    """
    try:
        engine = load_engine(path, tokens_BS.shape[1])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"llama.cpp does not load the file, so it was not written: {error}") from None
    if engine is None:
        return None
    try:
        found = engine_logits(engine, tokens_BS)
        num_texts = None if vocabulary is None else _check_texts(engine, vocabulary)
    finally:
        engine.close()
    difference = (found.log_softmax(-1) - logits_BSV.log_softmax(-1)).abs().mean().item()
    same = (found.argmax(-1) == logits_BSV.argmax(-1)).float().mean().item()
    if not difference <= BOUNDS[dtype]:  # true for NaN as well
        raise UserError(
            f"llama.cpp gives other logits than the original, so the file was not written: mean |difference of "
            f"log-probabilities| is {difference:.2e}, allowed in {dtype} is {BOUNDS[dtype]:g} (same most likely token "
            f"{same:.1%})"
        )
    return EngineReport(importlib.metadata.version("llama-cpp-python"), difference, same, num_texts)


def _check_texts(engine: Any, vocabulary: Vocabulary) -> int:
    for text in TEXTS:
        expected = vocabulary.backend.encode(text).ids
        found = engine.tokenize(text.encode(), add_bos=True, special=True)
        if found != expected:
            raise UserError(
                f"llama.cpp cuts {text!r} into other tokens than the tokenizer ({found[:12]}... and {expected[:12]}...), "
                "so the file was not written; `--no-tokenizer` writes one without a tokenizer"
            )
    return len(TEXTS)
