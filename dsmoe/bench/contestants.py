"""What is compared: layers and whole models, each as a step of forward and backward."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dsmoe.config import DSMoEConfig
from dsmoe.losses import router_losses, router_statistics
from dsmoe.model import DSMoEForCausalLM
from dsmoe.model.wide import wide_experts

DTYPES = {"float32": torch.float32, "bfloat16 autocast": torch.bfloat16}


class DenseSwiGLU(nn.Module):
    """An ordinary dense SwiGLU of `nn.Linear`s: the yardstick."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.down_proj(functional.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class WideLayer(nn.Module):
    """This project's dense expert path, with gates given."""

    gates: Tensor

    def __init__(self, hidden_size: int, num_experts: int, width: int, tokens: int, recompute: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, 2 * width, hidden_size) * hidden_size**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, width, hidden_size) * hidden_size**-0.5)
        # no Parameter: what autograd keeps of it counts
        self.register_buffer("gates", torch.rand(tokens, num_experts, requires_grad=True))
        self.recompute = recompute

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return wide_experts(x_TD, self.gates, self.up, self.down, "swiglu", recompute=self.recompute)


class TransformersLayer(nn.Module):
    """transformers' experts, with gates and the kept experts given: [T, K] of one batch after the other."""

    gates: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, width: int, index_BTK: Tensor, implementation: str
    ) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=hidden_size, moe_intermediate_size=width, num_experts=num_experts,
            num_experts_per_tok=index_BTK.shape[-1],
        )  # fmt: skip
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=hidden_size**-0.5)
        # no Parameter: what autograd keeps of it counts
        self.register_buffer("gates", torch.rand(index_BTK.shape[1:], requires_grad=True))
        self.turns = itertools.cycle([index.clone() for index in index_BTK])  # what is kept is one batch's

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.experts(x_TD, next(self.turns), self.gates)


@dataclass
class LayerStep:
    """One forward and backward pass of a layer.

    Attributes:
        layer: [.., D] to [.., D]; gates are a buffer of it.
        x: its input, with a gradient.
        gradient: of its output.
        dtype: that of autocast; float32: no autocast.
    """

    layer: nn.Module
    x: Tensor
    gradient: Tensor
    dtype: torch.dtype

    def parameters(self) -> list[Tensor]:
        """What the layer learns."""
        return list(self.layer.parameters())

    def forward(self) -> Tensor:
        """The forward pass."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.layer(self.x)

    def __call__(self) -> None:
        """Forward and backward, from no gradients."""
        for leaf in (self.x, *self.parameters(), *self.layer.buffers()):
            leaf.grad = None
        y = self.forward()
        y.backward(self.gradient.to(y.dtype))


def layer_steps(
    sizes: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype,
    peers: tuple[str, ...] = (),
    recompute: bool = True,
) -> dict[str, LayerStep]:
    """Steps of "dense", "wide", "recompute" and the implementations of transformers that are named.

    Args:
        sizes: hidden size, number of experts, hidden units of one expert.
        tokens: T.
        dtype: of autocast.
        peers: e.g. ("eager", "grouped_mm").
        recompute: whether to include "recompute".

    Returns:
        Name to LayerStep; all share x and the gradient.
    """
    hidden_size, num_experts, width = sizes
    layers: dict[str, nn.Module] = {"dense": DenseSwiGLU(hidden_size, num_experts * width)}
    layers["wide"] = WideLayer(*sizes, tokens, recompute=False)
    if recompute:
        layers["recompute"] = WideLayer(*sizes, tokens, recompute=True)
    for name in peers:
        layers[name] = TransformersLayer(*sizes, torch.arange(num_experts).repeat(1, tokens, 1), name)
    x, gradient = torch.randn(tokens, hidden_size, requires_grad=True), torch.randn(tokens, hidden_size)
    return {name: LayerStep(layer, x, gradient, dtype) for name, layer in layers.items()}


def attention_steps(
    hidden_size: int, heads: int, batch: tuple[int, int], dtype: torch.dtype
) -> dict[str, LayerStep]:
    """Steps of "moa" (as many attention experts as heads, one KV head) and of "gqa", the same heads without gates.

    Args:
        hidden_size: D.
        heads: query heads.
        batch: rows and tokens of a row.
        dtype: of autocast.

    Returns:
        Name to LayerStep.
    """
    common: dict[str, Any] = {
        "hidden_size": hidden_size, "intermediate_size": hidden_size, "num_hidden_layers": 1, "vocab_size": 8,
        "num_experts": 1, "num_attention_heads": heads, "num_key_value_heads": 1, "qk_norm": "none",
    }  # fmt: skip
    x, gradient = torch.randn(*batch, hidden_size, requires_grad=True), torch.randn(*batch, hidden_size)
    kinds: dict[str, dict[str, Any]] = {
        "moa": {"kind": "dsmoe", "num_attention_experts": heads},
        "gqa": {"kind": "dense"},
    }
    steps = {}
    for name, kind in kinds.items():
        model = DSMoEForCausalLM(DSMoEConfig(**common, **kind)).train()
        positions = model.model.rotary_emb(x, torch.arange(batch[1])[None])
        layer = _AttentionLayer(model.model.layers[0].self_attn, positions)
        steps[name] = LayerStep(layer, x, gradient, dtype)
    return steps


class _AttentionLayer(nn.Module):
    def __init__(self, attention: nn.Module, positions: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.attention, self.positions = attention, positions

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.attention(x_BSD, position_embeddings=self.positions, attention_mask=None)[0]


@dataclass
class ModelStep:
    """One training step of a whole model: forward, losses, backward, clipping, optimiser.

    Attributes:
        model: dense twin or DS-MoE.
        optimizer: of its parameters.
        ids: token ids [B, S + 1].
        mi_coef: coefficient of the mutual-information loss.
        dtype: of autocast.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    ids: Tensor
    mi_coef: float
    dtype: torch.dtype

    def forward(self) -> Tensor:
        """The loss."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            outputs = self.model(
                input_ids=self.ids[:, :-1], shift_labels=self.ids[:, 1:].contiguous(), use_cache=False
            )
        loss = outputs.loss
        if outputs.router_logits is not None:
            statistics = router_statistics(outputs.router_logits)
            loss = loss + self.mi_coef * router_losses(outputs.router_logits, statistics).mutual_information
        return loss

    def __call__(self) -> None:
        """The whole step."""
        self.forward().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def model_steps(
    config: dict[str, Any], kinds: dict[str, dict[str, Any]], batch: tuple[int, int], dtype: torch.dtype
) -> dict[str, ModelStep]:
    """Steps of whole models.

    Args:
        config: fields of DSMoEConfig that all share.
        kinds: name to the fields in which a model differs.
        batch: rows and tokens of a row.
        dtype: of autocast.

    Returns:
        Name to ModelStep; all share the tokens.
    """
    ids = torch.randint(0, config["vocab_size"], (batch[0], batch[1] + 1))
    steps = {}
    for name, kind in kinds.items():
        model = DSMoEForCausalLM(DSMoEConfig(**{**config, **kind})).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        steps[name] = ModelStep(model, optimizer, ids, 0.01, dtype)
    return steps
