"""What the C++ step reads of a model: addresses of its weights, in place, and its routing policies.

Shapes: L slots, hd head_dim, N experts, M stored experts.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe.model.attention import Attention
from dsmoe.model.experts import Experts
from dsmoe.model.generation.cache import PreallocatedCache
from dsmoe.model.int8 import Int8Experts, Int8Linear
from dsmoe.model.kernels import decoder
from dsmoe.model.mlp import MixtureMLP
from dsmoe.model.moa import MixtureOfHeads
from dsmoe.model.norm import RMSNorm
from dsmoe.model.router import Router

_IDLE_HOOKS = "transformers.utils.output_capturing"


def uncovered(model: Any) -> str | None:
    """Why the C++ step can't run a model, in a few words; None: it can."""
    dtype = model.dtype
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu" or type(tensor) not in (nn.Parameter, Tensor):
            return f"{name} is no ordinary tensor in CPU memory"
        wanted = (torch.float32,) if name.endswith("scales") else (dtype, torch.int8)
        if tensor.dtype not in wanted:
            return f"{name} is {tensor.dtype}, other weights are {dtype}"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    if (hooked := _hooked(model)) is not None:
        return f"{hooked} has forward hooks, which it would pass over"
    if dtype not in decoder.DTYPES:
        return f"the weights are {dtype}, it computes float32 and bfloat16"
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.k_proj, attention.v_proj]
        if type(attention) is Attention:
            projections += [attention.q_proj, attention.o_proj]
        elif type(attention) is not MixtureOfHeads:
            return f"{type(attention).__name__} is no attention of ours"
        if type(mlp) is not MixtureMLP or type(mlp.experts) not in (Experts, Int8Experts):
            return f"{type(mlp).__name__} is no MLP of ours"
        for module in (*projections, model.lm_head):
            # an adapter's layer, say
            if type(module) not in (nn.Linear, Int8Linear) or getattr(module, "bias", None) is not None:
                return f"a projection is {type(module).__name__}"
    return None


def _hooked(model: nn.Module) -> str | None:
    """The name of a module whose forward has hooks or was replaced (as accelerate does); None: there is none."""
    if torch.nn.modules.module._has_any_global_hook():
        return "every module"
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        # transformers leaves its own in place once hidden states were asked for; they do nothing by themselves
        if any(getattr(hook, "__module__", None) != _IDLE_HOOKS for hook in hooks) or "forward" in vars(
            module
        ):
            return name or "the model"
    return None


class Plan:
    """The structs of `dsmoe.model.kernels.decoder`, filled in for a model and a cache.

    Args:
        model: a DSMoEForCausalLM that `uncovered` has nothing against. Its tensors are read in place and kept alive;
            those that are later replaced (not changed) are not noticed, nor is a new routing policy.
        cache: of the same dtype.
    """

    def __init__(self, model: Any, cache: PreallocatedCache) -> None:
        self.alive: list[Any] = []
        self.config, self.dtype = model.config, model.dtype
        config = self.config
        slots = cache.layers[0].key_slots.shape[-2]
        cosines, sines = self._angles(model, slots)
        layers = (decoder.Layer * config.num_hidden_layers)()
        for index, layer in enumerate(model.model.layers):
            self._fill_layer(layers[index], layer, index)
            layers[index].keys = self._address(cache.layers[index].key_slots)
            layers[index].values = self._address(cache.layers[index].value_slots)
        self.struct = decoder.Model(
            layers=ctypes.cast(layers, ctypes.POINTER(decoder.Layer)),
            embedding=self._address(model.model.embed_tokens.weight),
            norm=self._address(model.model.norm.weight),
            lm_head=self._linear(model.lm_head),
            cosines=self._address(cosines),
            sines=self._address(sines),
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            width=config.moe_intermediate_size,
            swiglu=config.mlp_type == "swiglu",
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            slots=slots,
            qk_norm=decoder.QK_NORMS.index(config.qk_norm),
            normalize_embeddings=config.normalize_embeddings,
            eps=config.rms_norm_eps,
        )
        self.alive.append(layers)

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        # an alias holds the storage: of a parameter another may be put into its place, as `Module.to` does
        self.alive.append(tensor.detach())
        return tensor.data_ptr()

    def _matrix(self, weight: Tensor, scales: Tensor | None = None) -> decoder.Matrix:
        return decoder.Matrix(self._address(weight), self._address(scales))

    def _linear(self, module: nn.Linear | Int8Linear) -> decoder.Matrix:
        return self._matrix(module.weight, getattr(module, "scales", None))

    def _norm(self, module: RMSNorm | None) -> int | None:
        return None if module is None else self._address(module.weight)

    def _angles(self, model: Any, slots: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [L, hd / 2] in float32."""
        anything = torch.empty(0, dtype=torch.float32, device="cpu")
        both = model.model.rotary_emb(anything, torch.arange(slots, device="cpu")[None])
        cosines, sines = (angles[0, :, : self.config.head_dim // 2].contiguous() for angles in both)
        return cosines, sines

    def _fill_layer(self, to: decoder.Layer, layer: Any, index: int) -> None:
        attention, experts = layer.self_attn, layer.mlp.experts
        to.attention_norm, to.mlp_norm = (
            self._norm(layer.input_layernorm),
            self._norm(layer.post_attention_layernorm),
        )
        to.q_norm = self._norm(getattr(attention, "q_norm", None))
        to.k_norm = self._norm(getattr(attention, "k_norm", None))
        to.k, to.v = self._linear(attention.k_proj), self._linear(attention.v_proj)
        if isinstance(attention, MixtureOfHeads):
            to.q, to.o = self._matrix(attention.experts_q_proj), self._matrix(attention.experts_o_proj)
            to.attention = self._routing(attention.router, "attention", index)
        else:
            to.q, to.o = self._linear(attention.q_proj), self._linear(attention.o_proj)
        to.up = self._matrix(experts.input_proj, getattr(experts, "up_scales", None))
        to.down = self._matrix(experts.down_proj, getattr(experts, "down_scales", None))
        if layer.mlp.router is not None:
            to.mlp = self._routing(layer.mlp.router, "mlp", index)

    def _routing(self, router: Router, part: str, index: int) -> decoder.Routing:
        config = self.config
        num_experts, kept = config.num_experts_of(part), config.kept_experts(part, index)
        policy = config.routing(part, index)
        dense = config.is_dense_layer(part, index)
        limits = policy.get("threshold")
        if isinstance(limits, list) and kept is not None:
            limits = [limits[expert] for expert in kept]
        stored = num_experts if kept is None else len(kept)
        if limits is not None and not isinstance(limits, list):
            limits = [limits] * stored
        mlp = hasattr(router, "in_proj")
        return decoder.Routing(
            experts=num_experts,
            stored=stored,
            index=self._constant(kept, torch.int64),
            weight=self._address(router.out_proj if mlp else router.weight),
            in_proj=self._address(router.in_proj if mlp else None),
            hidden=config.router_hidden_size,
            choice=0 if dense else decoder.CHOICES.index(policy["policy"]),
            k=policy.get("k") or 0,
            thresholds=self._constant(limits, torch.float32),
            score_weights=self._constant(policy.get("score_weights"), torch.float32),
            normalization=decoder.NORMALIZATIONS.index(config.gate_normalization),
            top_p=policy.get("top_p", 1.0),
            scale=config.mlp_gate_scale if part == "mlp" else config.attention_gate_scale,
            constant=config.gate_constant if part == "mlp" else 0.0,
        )

    def _constant(self, values: list | None, dtype: torch.dtype) -> int | None:
        return None if values is None else self._address(torch.tensor(values, dtype=dtype, device="cpu"))
