"""The model's configuration: one architecture that config turns into a dense twin, an SMoE or a DS-MoE."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from dsmoe.config.kept import kept_per_layer
from dsmoe.config.routing import is_dense, policies_per_layer
from dsmoe.errors import UserError

KINDS = ("dense", "smoe", "dsmoe")
MLP_TYPES = ("swiglu", "gelu")
QK_NORMS = ("none", "full", "per_head")
ROUTER_TYPES = ("linear", "mlp")
GATE_NORMALIZATIONS = ("softmax", "l2", "renormalized")
# may be given as whole numbers, as JSON and YAML have them
_FLOATS = ("mlp_gate_scale", "attention_gate_scale", "gate_constant", "rope_theta", "rms_norm_eps",
           "initializer_range", "router_initializer_range")  # fmt: skip


@strict
class DSMoEConfig(PreTrainedConfig):
    """Configuration of `DSMoEForCausalLM` (model_type "dsmoe").

    Args:
        kind: "dense" (the twin: one MLP), "smoe" (trained sparsely) or "dsmoe" (trained densely, run sparsely).
        vocab_size: entries of the embedding table.
        hidden_size: width of the residual stream.
        intermediate_size: hidden units of all MLP experts of a layer together, equal to the dense twin's.
        moe_intermediate_size: hidden units of one expert; null: intermediate_size / num_experts.
        num_hidden_layers: decoder layers.
        num_experts: MLP experts of a layer; a dense twin has 1.
        mlp_type: "swiglu" (three matrices) or "gelu" (two matrices, as in the paper).
        num_attention_heads: query heads of a layer, over all attention experts together.
        num_key_value_heads: key/value heads; null: num_attention_heads without attention experts, otherwise
            the heads of one expert, which is then the only possible value.
        head_dim: width of a head; null: hidden_size / num_attention_heads.
        num_attention_experts: 1 is ordinary attention; more make it a mixture of attention heads (MoA): every
            expert has its own query and output projections, keys and values are shared.
        qk_norm: RMSNorm of queries and keys: "none", "full" (over all heads, as OLMoE) or "per_head" (as Qwen3).
        router_type: "linear", or "mlp" (one hidden layer of SiLU units).
        router_hidden_size: hidden units of an MLP router; 0 for a linear one.
        gate_normalization: how gates follow from p, the softmax over all N experts: "softmax": scale * p;
            "l2": scale * p / ||p||; "renormalized": scale * p / (sum of p over the kept experts).
        mlp_gate_scale: the scale above for MLP experts; null: N ("softmax" and "renormalized"; in an SMoE with
            "renormalized" the k of its top_k policy, which must be one for all layers), sqrt(N) ("l2"). With it the
            layer of a uniform router equals the dense twin's.
        attention_gate_scale: the same for attention experts.
        gate_constant: c from 0 to below 1: the gate of a kept MLP expert is c + (1 - c) * g, g being the gate that the
            two above give; that of a dropped one stays 0. With all experts each then has at least c. Attention experts
            have none.
        mlp_routing: the routing policy of the MLP experts (see `dsmoe.config.routing`): a dict for all layers
            or a list with one dict per layer.
        attention_routing: the same for the attention experts.
        mlp_kept_experts: the MLP experts that are stored, one ascending list of indices per layer; null: all. The
            others were removed (`dsmoe.model.remove_experts`): no token keeps them. num_experts stays that of the
            router, whose softmax still runs over all of them.
        attention_kept_experts: the same for the attention experts.
        normalize_embeddings: divide each token's embedding (of `input_ids` or given as `inputs_embeds`) by its root mean
            square.
        tie_word_embeddings: use the embedding table as output projection.
        max_position_embeddings: longest context.
        rope_theta: base of the rotary embedding (kept in `rope_parameters`).
        rope_parameters: transformers' form of it; rope_type "default" alone, without scaling.
        rms_norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of initial weights; projections back into the residual stream
            (o_proj, down_proj) get it divided by sqrt(2 * num_hidden_layers).
        router_initializer_range: the same for the matrix that gives router logits; null: initializer_range. The smaller,
            the closer a DS-MoE starts to its dense twin (0: the same function).

    Raises:
        UserError: an impossible combination; the message names the field.
    """

    model_type = "dsmoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    kind: str = "dsmoe"
    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 1024
    moe_intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_experts: int = 16
    mlp_type: str = "swiglu"
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_attention_experts: int = 1
    qk_norm: str = "full"
    router_type: str = "linear"
    router_hidden_size: int = 0
    gate_normalization: str = "softmax"
    mlp_gate_scale: float | int | None = None
    attention_gate_scale: float | int | None = None
    gate_constant: float | int = 0.0
    mlp_routing: list | dict | None = None
    attention_routing: list | dict | None = None
    mlp_kept_experts: list | None = None
    attention_kept_experts: list | None = None
    normalize_embeddings: bool = False
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    rope_theta: float | int = 10000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    router_initializer_range: float | int | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from what a config.json holds, with the fields in `kwargs` in its place.

        Raises:
            UserError: a field of the wrong type, or an impossible combination.
        """
        # transformers would set them on the finished config, derived from the others and checked as it then is
        own = {name: kwargs.pop(name) for name in DSMoEConfig.__annotations__ if name in kwargs}
        config_dict = {**config_dict, **own}
        if "rope_theta" in own and "rope_parameters" not in own:
            config_dict.pop("rope_parameters", None)
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise UserError(f"config.json: {error.__cause__ or error}") from None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive what is null and check the whole."""
        for name in _FLOATS:
            if isinstance(getattr(self, name), int):
                setattr(self, name, float(getattr(self, name)))
        for name, known in (
            ("kind", KINDS),
            ("mlp_type", MLP_TYPES),
            ("qk_norm", QK_NORMS),
            ("router_type", ROUTER_TYPES),
            ("gate_normalization", GATE_NORMALIZATIONS),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_experts",
                     "num_attention_heads", "num_attention_experts", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("rms_norm_eps", "initializer_range", "router_initializer_range"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"model.{name} is {value}; it must be at least 0")
        self._derive_sizes()
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        else:
            self.rope_theta = float(self.rope_parameters.get("rope_theta", self.rope_theta))
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"model.rope_theta is {self.rope_theta}; it must be above 0")
        self._check_experts("mlp")
        self._check_experts("attention")
        self._check_kind()
        self._derive_gate_scales()
        super().__post_init__(**kwargs)
        # only now does it hold what older files call rope_scaling
        self.check_rope()

    def check_rope(self) -> None:
        """Refuse `rope_parameters` that ask for more than a base, since the model reads nothing else.

        Raises:
            UserError: a scaling, a rotation of a part of each head, or parameters of each type of layer.
        """
        rope = self.rope_parameters or {}
        wanted = {"rope_type": "default", "partial_rotary_factor": 1.0}
        for name, value in rope.items():
            if isinstance(value, dict) or value != wanted.get(name, value):
                raise UserError(
                    f"model.rope_parameters has {name} {value!r}; this architecture rotates by rope_theta alone: leave "
                    f"it out, or give {{'rope_type': 'default', 'rope_theta': {self.rope_theta}}}"
                )

    def _derive_sizes(self) -> None:
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = _divided(self, "intermediate_size", "num_experts")
        if self.moe_intermediate_size * self.num_experts != self.intermediate_size:
            raise UserError(
                f"model.moe_intermediate_size {self.moe_intermediate_size} times num_experts {self.num_experts} is not "
                f"intermediate_size {self.intermediate_size}; leave moe_intermediate_size out to derive it"
            )
        if self.head_dim is None:
            self.head_dim = _divided(self, "hidden_size", "num_attention_heads")
        if self.head_dim < 1 or self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}; rotary embeddings need an even one above 0")
        heads_per_expert = _divided(self, "num_attention_heads", "num_attention_experts")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads_per_expert
        if self.num_attention_experts > 1 and self.num_key_value_heads != heads_per_expert:
            raise UserError(
                f"model.num_key_value_heads is {self.num_key_value_heads}; with attention experts head j of each expert "
                f"reads KV head j, so it must be num_attention_heads / num_attention_experts = {heads_per_expert}"
            )
        _divided(self, "num_attention_heads", "num_key_value_heads")
        if self.num_attention_experts > 1 and self.qk_norm == "full":
            raise UserError(
                "model.qk_norm 'full' normalises over all attention experts, so a token could not skip any; "
                "use 'per_head' or 'none' when num_attention_experts is above 1"
            )
        if (self.router_type == "mlp") != (self.router_hidden_size > 0):
            raise UserError(
                f"model.router_hidden_size is {self.router_hidden_size} for router_type {self.router_type!r}; "
                "an mlp router needs one above 0, a linear router 0"
            )

    def _check_experts(self, part: str) -> None:
        """Which experts of a part are stored, and the policies that choose among them."""
        layers, num_experts = self.num_hidden_layers, self.num_experts_of(part)
        kept = kept_per_layer(
            getattr(self, f"{part}_kept_experts"), layers, num_experts, f"model.{part}_kept_experts"
        )
        setattr(self, f"{part}_kept_experts", kept)
        name = f"{part}_routing"
        setattr(
            self, name, policies_per_layer(getattr(self, name), layers, num_experts, f"model.{name}", kept)
        )

    def _derive_gate_scales(self) -> None:
        # Kept as numbers: a policy that the sparsifier changes later must not change the scale.
        for part, num_experts in (("mlp", self.num_experts), ("attention", self.num_attention_experts)):
            name = f"{part}_gate_scale"
            if getattr(self, name) is not None:
                continue
            scale = float(num_experts)
            if self.gate_normalization == "l2":
                scale = num_experts**0.5
            elif self.gate_normalization == "renormalized" and self.kind == "smoe":
                scale = float(self._common_k(part))
            setattr(self, name, scale)

    def _common_k(self, part: str) -> int:
        """How many experts a token keeps, where that is one number for all layers."""
        num_experts, policies = self.num_experts_of(part), getattr(self, f"{part}_routing")
        ks = {policy.get("k", num_experts) for policy in policies}
        if len(ks) > 1 or any(policy["policy"] not in ("dense", "top_k") for policy in policies):
            raise UserError(
                f"model.{part}_gate_scale is null: with renormalized gates it is the one k of all layers, which "
                f"{part}_routing doesn't have; give the scale, about the number of experts that a token keeps (earlier "
                f"versions took {num_experts})"
            )
        return ks.pop()

    def _check_kind(self) -> None:
        if self.kind == "dense" and (self.num_experts > 1 or self.num_attention_experts > 1):
            raise UserError(
                f"model.kind 'dense' has num_experts {self.num_experts} and num_attention_experts "
                f"{self.num_attention_experts}; a dense model has 1 of each"
            )
        if self.kind != "dense" and self.num_experts == 1 and self.num_attention_experts == 1:
            raise UserError(f"model.kind {self.kind!r} needs num_experts or num_attention_experts above 1")
        part = "mlp" if self.num_experts > 1 else "attention"
        policies = getattr(self, f"{part}_routing")
        if self.kind == "smoe" and any(policy["policy"] == "dense" for policy in policies):
            raise UserError(
                f"model.kind 'smoe' trains sparsely: set {part}_routing, for example {{policy: top_k, k: 2}}"
            )
        for name in ("mlp_gate_scale", "attention_gate_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"model.{name} is {value}; it must be above 0 (or null for the default)")
        if not 0 <= self.gate_constant < 1:
            raise UserError(f"model.gate_constant is {self.gate_constant}; it must be from 0 to below 1")

    def routing(self, part: str, layer: int) -> dict[str, Any]:
        """The routing policy of a layer's "mlp" or "attention" experts."""
        return (self.mlp_routing if part == "mlp" else self.attention_routing)[layer]

    def num_experts_of(self, part: str) -> int:
        """The router's "mlp" or "attention" experts, removed ones included."""
        return self.num_experts if part == "mlp" else self.num_attention_experts

    def kept_experts(self, part: str, layer: int) -> list[int] | None:
        """The "mlp" or "attention" experts that a layer stores, ascending; None: all."""
        kept = self.mlp_kept_experts if part == "mlp" else self.attention_kept_experts
        if kept is None or len(kept[layer]) == self.num_experts_of(part):
            return None
        return kept[layer]

    def num_kept_experts(self, part: str, layer: int) -> int:
        """How many "mlp" or "attention" experts a layer stores."""
        kept = self.kept_experts(part, layer)
        return self.num_experts_of(part) if kept is None else len(kept)

    def is_dense_layer(self, part: str, layer: int) -> bool:
        """Whether a layer keeps all the "mlp" or "attention" experts that it stores for every token."""
        return is_dense(self.routing(part, layer), self.num_kept_experts(part, layer))

    def keeps_all(self, part: str) -> bool:
        """Whether every layer is such a layer."""
        return all(self.is_dense_layer(part, layer) for layer in range(self.num_hidden_layers))


def _divided(config: DSMoEConfig, name: str, by: str) -> int:
    value, divisor = getattr(config, name), getattr(config, by)
    if divisor < 1 or value % divisor:
        raise UserError(f"model.{name} {value} is not divisible by {by} {divisor}")
    return value // divisor
