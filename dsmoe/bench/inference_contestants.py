"""What the inference benchmark compares: one expert layer, each way to compute it as a step.

Shapes: T tokens, D hidden size, N experts, F hidden units of one expert, C copies of the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dsmoe.bench.contestants import DenseSwiGLU
from dsmoe.model.grouped import grouped_experts
from dsmoe.model.int8 import int8_experts, quantize_rows
from dsmoe.model.kernels import inference_kernel
from dsmoe.model.kernels.inference import MOST_TOKENS_OF_ALL_EXPERTS, read_experts
from dsmoe.model.wide import wide_experts

# of tokens, and of weights but for int8, which is ours alone: there dense and transformers have bfloat16 weights
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@dataclass
class LayerWeights:
    """C copies of one layer's weights in every form, so many that none stays in a cache between its turns.

    Attributes:
        sizes: D, N, F.
        dtype: of tokens, and of weights that are not int8.
        own: up [N, 2F, D] and down [N, F, D] of each copy, and their scales where they are int8.
        dense: nn.Linear SwiGLUs of width N * F.
        stock: transformers' experts by implementation; those of one copy share their Parameters.
    """

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    own: list[tuple[Tensor, ...]]
    dense: list[nn.Module]
    stock: dict[str, list[nn.Module]]


def layer_weights(
    sizes: tuple[int, int, int], dtype: torch.dtype, cold_bytes: int, int8: bool = False
) -> LayerWeights:
    """Make the copies.

    Args:
        sizes: D, N, F.
        dtype: of the weights.
        cold_bytes: at least so many bytes of each form; and at least two copies.
        int8: our own weights are int8.
    """
    hidden_size, num_experts, width = sizes
    up = (torch.randn(num_experts, 2 * width, hidden_size) * hidden_size**-0.5).to(dtype)
    down = (torch.randn(num_experts, width, hidden_size) * width**-0.5).to(dtype)
    ours: tuple[Tensor, ...] = (up, down)
    if int8:
        (up_q, up_scales), (down_q, down_scales) = quantize_rows(up), quantize_rows(down)
        ours = up_q, down_q, up_scales, down_scales
    copies = max(2, -(-cold_bytes // (ours[0].nbytes + ours[1].nbytes)))
    own = [tuple(tensor.clone() for tensor in ours) for _ in range(copies)]
    dense: list[nn.Module] = []
    stock: dict[str, list[nn.Module]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(copies):
        twin = DenseSwiGLU(hidden_size, num_experts * width).to(dtype)
        twin.gate_proj.weight.data = up[:, :width].flatten(0, 1)
        twin.up_proj.weight.data = up[:, width:].flatten(0, 1)
        twin.down_proj.weight.data = down.flatten(0, 1).T.contiguous()
        dense.append(twin.requires_grad_(False))
        shared = nn.Parameter(up.clone()), nn.Parameter(down.transpose(1, 2).contiguous())
        for name, modules in stock.items():
            modules.append(_stock_experts(sizes, name, *shared))
    return LayerWeights(sizes, dtype, own, dense, stock)


def _stock_experts(
    sizes: tuple[int, int, int], implementation: str, up: nn.Parameter, down: nn.Parameter
) -> nn.Module:
    config = Qwen3MoeConfig(hidden_size=sizes[0], moe_intermediate_size=sizes[2], num_experts=sizes[1])
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = up, down
    return experts.eval()


@dataclass
class Batch:
    """The tokens of one call and the experts that they keep under both policies.

    Attributes:
        x: [T, D].
        gates: [T, N] softmax over all experts.
        top_k: [T, N] bool, and `index`, `weights` [T, K] in transformers' form.
        threshold: [T, N] bool.
    """

    x: Tensor
    gates: Tensor
    top_k: Tensor
    threshold: Tensor
    index: Tensor
    weights: Tensor


def batches(weights: LayerWeights, tokens: int, k: int, count: int) -> list[Batch]:
    """Tokens with random routers; the threshold keeps K experts of a token in the mean over all batches.

    Args:
        weights: for the sizes and the dtype.
        tokens: T.
        k: experts of a token.
        count: number of batches.
    """
    hidden_size, num_experts, _ = weights.sizes
    probs = torch.randn(count, tokens, num_experts).mul(1.5).softmax(-1)
    best = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.argmax(-1, keepdim=True), True)
    # every token keeps its best expert, so the others share what is left of the mean count
    rest = probs.masked_fill(best, 0).flatten().sort(descending=True).values
    kept = best | (probs > rest[count * tokens * (k - 1)])
    made = []
    for gates, threshold in zip(probs, kept):
        top = gates.topk(k)
        made.append(
            Batch(
                x=torch.randn(tokens, hidden_size).to(weights.dtype),
                gates=gates,
                top_k=torch.zeros_like(threshold).scatter(-1, top.indices, True),
                threshold=threshold,
                index=top.indices,
                weights=top.values.to(weights.dtype),
            )
        )
    return made


def layer_steps(
    weights: LayerWeights, given: Sequence[Batch], peers: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """One step of each contestant; each call takes the next copy of the weights and the next batch.

    Contestants that share copies are a third of them apart, so that none finds what another has just read.

    Args:
        weights: the copies.
        given: the batches.
        peers: implementations of transformers.

    Returns:
        "top_k", "threshold", "all_experts", "dense", with few tokens "reading" (of top-K's weights, without any
        arithmetic) and each peer, to its step.
    """
    copies, int8 = len(weights.own), len(weights.own[0]) > 2

    def turns(function: Callable[[int, Batch], Any], start: int) -> Callable[[], Any]:
        number = -1

        def step() -> Any:
            nonlocal number
            number += 1
            return function((start + number) % copies, given[number % len(given)])

        return step

    def kept(policy: str) -> Callable[[int, Batch], Any]:
        if int8:
            return lambda copy, batch: _int8_step(weights.own[copy], batch, getattr(batch, policy))

        def step(copy: int, batch: Batch) -> Tensor:
            up, down = weights.own[copy]
            return grouped_experts(batch.x, batch.gates, getattr(batch, policy), up, down, "swiglu")

        return step

    def all_experts(copy: int, batch: Batch) -> Tensor:
        if int8:
            return _int8_step(weights.own[copy], batch, None)
        up, down = weights.own[copy]
        return wide_experts(batch.x, batch.gates, up, down, "swiglu")

    steps = {
        "top_k": turns(kept("top_k"), 0),
        "threshold": turns(kept("threshold"), copies // 3),
        "all_experts": turns(all_experts, 2 * copies // 3),
        "dense": turns(lambda copy, batch: weights.dense[copy](batch.x), 0),
    }
    if given[0].x.shape[0] <= MOST_TOKENS_OF_ALL_EXPERTS and inference_kernel() is not None:
        steps["reading"] = turns(
            lambda copy, batch: read_experts(batch.top_k, weights.own[copy][0], weights.own[copy][1]),
            copies // 2,
        )
    for place, name in enumerate(peers):
        steps[name] = turns(
            partial(_stock_step, weights.stock[name]),
            place * copies // max(1, len(peers)),
        )
    return steps


def _int8_step(own: tuple[Tensor, ...], batch: Batch, expert_mask: Tensor | None) -> Tensor:
    up, down, *scales = own
    return int8_experts(batch.x, batch.gates, expert_mask, up, down, "swiglu", *scales)


def _stock_step(modules: Sequence[nn.Module], copy: int, batch: Batch) -> Tensor:
    return modules[copy](batch.x, batch.index, batch.weights)
