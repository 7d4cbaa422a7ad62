"""Decode speed: tokens a second of greedy generation, one request at a time."""

import time
from typing import Any

import torch
from transformers import GenerationConfig


def decode_tokens_per_second(
    model: Any,
    vocab_size: int,
    *,
    prompt_length: int = 16,
    new_tokens: int = 64,
    repeats: int = 3,
    seconds: float = 2.0,
    seed: int = 1234,
) -> float:
    """Fastest of several calls of `model.generate` with a KV cache at batch 1, after one warm-up.

    The fastest, because whatever else the machine does only ever adds time, and a small model's call is so short that the
    scheduler decides about it. Models are timed one after another: for ratios there is `eval/bench_inference.py`, which
    times them in turns.

    That is the same call for every model. Models of this project decode with their lean step there (see
    `dsmoe.model.generation`), dense twins and DS-MoE alike; stock architectures with the loop of transformers, so that
    speeds of the two groups compare the software as well as the models.

    Args:
        model: any causal language model of transformers.
        vocab_size: random prompt tokens are drawn below it.
        prompt_length: tokens of the prompt, whose prefill counts in the time.
        new_tokens: tokens to generate; an end-of-text token does not stop it.
        repeats: timed calls at least.
        seconds: repeat until so many have passed.
        seed: of the prompt.

    Returns:
        New tokens a second.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, vocab_size, (1, prompt_length), generator=generator).to(model.device)
    config = GenerationConfig(
        do_sample=False, use_cache=True, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0
    )

    def call() -> float:
        _synchronize(model)
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        _synchronize(model)
        assert output.shape[1] == prompt_length + new_tokens, output.shape
        return time.perf_counter() - start

    call()
    times = [call() for _ in range(repeats)]
    while sum(times) < seconds:
        times.append(call())
    return new_tokens / min(times)


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
