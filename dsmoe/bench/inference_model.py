"""Decoding with a whole model: kept experts against the dense twin in the same loop, and against transformers.

Weights are random: speed depends on them only through the choice of experts, which a wide distribution of the routers'
weights makes as diverse as that of a trained, balanced model. The tokens that are fed are random as well, the same for
all; the argmax of the logits is taken and not used.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from dsmoe.bench.ceiling import read_bytes_per_second
from dsmoe.bench.inference_contestants import DTYPES
from dsmoe.bench.memory import peak_bytes
from dsmoe.bench.timing import interleaved_seconds, ratio
from dsmoe.config import DSMoEConfig
from dsmoe.model import DSMoEForCausalLM, use_routing
from dsmoe.model.generation import Decoder
from dsmoe.model.int8 import quantize_int8

_READ_BYTES = 200 << 20


@dataclass(frozen=True)
class ModelCase:
    """What is measured.

    Attributes:
        sizes: fields of DSMoEConfig that both models share.
        num_experts: N.
        k: experts that a token keeps.
        prompt: tokens in the cache before the first step.
        steps: tokens of a timed round.
        rounds: timed rounds.
        transformers_rounds: the same for transformers' loop, which takes longer.
    """

    num_experts: int
    k: int
    prompt: int
    steps: int
    rounds: int
    transformers_rounds: int
    sizes: dict[str, Any] = field(default_factory=dict)


FULL_MODEL = ModelCase(
    num_experts=32,
    k=8,
    prompt=128,
    steps=16,
    rounds=12,
    transformers_rounds=4,
    sizes={
        "vocab_size": 32768,
        "hidden_size": 768,
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "router_initializer_range": 1.0,
    },
)
QUICK_MODEL = ModelCase(
    num_experts=8,
    k=2,
    prompt=8,
    steps=4,
    rounds=2,
    transformers_rounds=1,
    sizes={
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "router_initializer_range": 1.0,
    },
)


def measure_model(case: ModelCase, dtype_name: str, advance: Callable[[], Any]) -> dict[str, Any]:
    """One row: all contestants in one dtype.

    Args:
        case: the model.
        dtype_name: "f32", "bf16" or "int8" (experts and attention projections of both models; the rest is bf16).
        advance: called after each timed step.
    """
    models = {name: _model(case, dtype_name, name) for name in ("own", "dense")}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(case.sizes["vocab_size"], (1, case.prompt + case.steps), generator=generator)
    decoders, memory = {}, {}
    for name, model in models.items():

        def first(name: str = name, model: Any = model) -> None:
            decoders[name] = Decoder(model, case.prompt + case.steps, profile=True)
            decoders[name].prefill(ids[:, : case.prompt])
            _decode(decoders[name], case, ids)

        memory[name] = peak_bytes(first)
    steps = {name: partial(_decode, decoder, case, ids) for name, decoder in decoders.items()}
    prompt = ids[:, : case.prompt]
    if dtype_name != "int8":  # transformers has no such weights
        for name, model in models.items():
            steps[f"transformers_{name}"] = partial(_transformers_generate, model, prompt, case.steps + 1)
            steps[f"transformers_{name}_first_token"] = partial(_transformers_generate, model, prompt, 1)
    before = {name: decoder.seconds for name, decoder in decoders.items()}
    few = {name: case.transformers_rounds for name in steps if name not in decoders}
    seconds = interleaved_seconds(steps, case.rounds, few, advance)
    rate = read_bytes_per_second(_READ_BYTES, 1)
    row: dict[str, Any] = {
        "dtype": dtype_name,
        "tokens_per_second_ratio_to_dense": ratio(seconds["dense"], seconds["own"])["median"],
        "tokens_per_second_ratio_to_dense_quartiles": _quartiles(seconds["dense"], seconds["own"]),
        "speedup_over_transformers": None,
        "read_bytes_per_second": rate,
        "experts_used_by_prompt": _experts_used(models["own"], prompt, case.k),
        "backend": decoders["own"].backend,
        "seconds": seconds,
    }
    for name, model in models.items():
        timed = statistics.median(seconds[name]) / case.steps
        row[name] = _costs(model, decoders[name], case, name, memory[name], timed, rate)
        tokens = (case.rounds + 1) * case.steps
        row[name]["milliseconds_by_part"] = {
            part: 1e3 * (value - before[name][part]) / tokens
            for part, value in decoders[name].seconds.items()
        }
        if f"transformers_{name}" in seconds:
            whole, first_token = (
                statistics.median(seconds[f"transformers_{name}{end}"]) for end in ("", "_first_token")
            )
            row[name]["transformers_tokens_per_second"] = case.steps / max(whole - first_token, 1e-9)
    row["ideal_ratio_to_dense"] = row["dense"]["bytes_read_per_token"] / row["own"]["bytes_read_per_token"]
    if "transformers_tokens_per_second" in row["own"]:
        best = row["own"]["transformers_tokens_per_second"]
        row["speedup_over_transformers"] = row["own"]["tokens_per_second"] / best
    row["growth"] = _growth(models["own"], case) if dtype_name != "int8" else []
    return row


def _costs(
    model: DSMoEForCausalLM,
    decoder: Decoder,
    case: ModelCase,
    name: str,
    growth: int | None,
    seconds_per_token: float,
    bytes_per_second: float,
) -> dict[str, Any]:
    """Memory, speed and bytes read of one model; `bytes_per_second` is what the machine can read."""
    read = _bytes_read(model, case, name)
    return {
        "tokens_per_second": 1 / seconds_per_token,
        "weight_bytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "cache_bytes": decoder.cache.nbytes,
        "memory_growth_bytes": growth,
        "bytes_read_per_token": read,
        "share_of_read_bandwidth": read / seconds_per_token / bytes_per_second,
    }


def _growth(model: DSMoEForCausalLM, case: ModelCase) -> list[dict[str, Any]]:
    """Seconds of a step where one of K, batch and tokens in the cache is changed."""
    changes: list[dict[str, int]] = [
        {},
        *({"k": k} for k in sorted({max(1, case.k // 2), 2 * case.k, case.num_experts})),
        *({"batch": batch} for batch in (2, 4, 8)),
        {"context": 4 * case.prompt},
    ]
    generator, rows = torch.Generator().manual_seed(1), []
    for change in changes:
        row: dict[str, Any] = {"k": case.k, "batch": 1, "context": case.prompt, **change}
        shape = row["batch"], row["context"] + case.steps
        ids = torch.randint(case.sizes["vocab_size"], shape, generator=generator)
        with use_routing(model, mlp={"policy": "top_k", "k": row["k"]}):
            decoder = Decoder(model, shape[1], row["batch"])
            decoder.prefill(ids[:, : row["context"]])
            seconds = []
            for position in range(row["context"], shape[1]):
                start = time.perf_counter()
                decoder.step(ids[:, position])
                seconds.append(time.perf_counter() - start)
        rows.append({**row, "seconds_per_step": statistics.median(seconds)})
    return rows


def model_summary(case: ModelCase, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The model and its rows.

    Args:
        case: the model.
        rows: of `measure_model`; the smallest ratio of float rows (or of all, where there are no others) stands for them.
    """
    config = _config(case, "own")
    with torch.device("meta"):
        model = DSMoEForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    floats = [row for row in rows if row["dtype"] != "int8"] or rows
    return {
        "num_params_total": total,
        "num_params_active": total - round(experts * (1 - case.k / case.num_experts)),
        "mlp_share_active": case.k / case.num_experts,
        "tokens_per_second_ratio_to_dense": min(row["tokens_per_second_ratio_to_dense"] for row in floats),
        "num_experts": case.num_experts,
        "k": case.k,
        "prompt_tokens": case.prompt,
        "steps": case.steps,
        "sizes": dict(case.sizes),
        "rows": list(rows),
    }


def _config(case: ModelCase, name: str) -> DSMoEConfig:
    kind: dict[str, Any] = {"kind": "dense", "num_experts": 1}
    if name == "own":
        kind = {"num_experts": case.num_experts, "mlp_routing": {"policy": "top_k", "k": case.k}}
    return DSMoEConfig(**case.sizes, **kind)


def _model(case: ModelCase, dtype_name: str, name: str) -> DSMoEForCausalLM:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype_name])
    try:
        model = DSMoEForCausalLM(_config(case, name)).eval()
    finally:
        torch.set_default_dtype(dtype)
    return quantize_int8(model, linear=True) if dtype_name == "int8" else model


def _decode(decoder: Decoder, case: ModelCase, ids: Tensor) -> None:
    decoder.crop(case.prompt)
    for position in range(case.prompt, case.prompt + case.steps):
        decoder.step(ids[:, position]).argmax(-1)


def _transformers_generate(model: Any, prompt: Tensor, new_tokens: int) -> None:
    """Greedy search in transformers' own loop, which the model's would otherwise take the place of."""
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        pad_token_id=0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        custom_generate=GenerationMixin._sample,
    )


def _bytes_read(model: DSMoEForCausalLM, case: ModelCase, name: str) -> int:
    """Weights that one token needs; the tied table is read once, as output projection."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if name == "dense":
        return total
    experts = sum(
        tensor.nbytes
        for layer in model.model.layers
        for tensor in (*layer.mlp.experts.parameters(), *layer.mlp.experts.buffers())
    )
    return total - round(experts * (1 - case.k / case.num_experts))


@torch.no_grad()
def _experts_used(model: DSMoEForCausalLM, prompt: Tensor, k: int) -> float:
    """Share of a layer's experts that some token of the prompt keeps, in the mean over layers."""
    logits = model(prompt, use_cache=False, logits_to_keep=1).router_logits
    assert logits is not None
    shares = [layer.flatten(0, 1).topk(k).indices.unique().numel() / layer.shape[-1] for layer in logits]
    return statistics.fmean(shares)


def _quartiles(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    found = ratio(ours, theirs)
    return [found["low"], found["high"]]
