"""What a model must be for each export format; everything else is refused with the reason.

| format   | architecture | takes                                                                              |
|----------|--------------|------------------------------------------------------------------------------------|
| olmoe    | OLMoE        | qk_norm "full"; DS-MoE and SMoE with one K, or a dense twin (as one expert)        |
| qwen2moe | Qwen2-MoE    | qk_norm "none"; DS-MoE and SMoE with one K; its shared expert is one unit of zeros |
| llama    | Llama        | qk_norm "none"; a dense twin                                                       |
| dsmoe    | DS-MoE       | every model; loading it needs the `dsmoe` package                                  |
| gguf     | of the above | what one of the first three takes, as a file for llama.cpp (`dsmoe.export.gguf`)   |

The three stock formats store all experts in every layer and choose by probability alone, so they take no removed
experts and no `score_weights`; those with experts have one K for all layers, so no thresholds (per layer or per expert),
no top_p and no K per layer.

OLMoE and Qwen2-MoE keep the K largest of the softmax over all N experts and weight them with those probabilities
(norm_topk_prob false: gates "softmax") or with those divided by their sum (true: "renormalized"), so both equal
DS-MoE's sparse inference once the gate scale is folded into down_proj. Read in transformers 5.16 to 5.23. Mixtral,
JetMoE and GraniteMoE always renormalise, so they are no targets.
"""

from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import is_dense
from dsmoe.errors import UserError

ARCHITECTURES = {"olmoe": "OLMoE", "qwen2moe": "Qwen2-MoE", "llama": "Llama", "dsmoe": "DS-MoE"}
FORMATS = (*ARCHITECTURES, "gguf")
QK_NORM_OF = {"olmoe": "full", "qwen2moe": "none", "llama": "none"}
_KEEP = "`--format dsmoe` keeps it"
_SPARSIFY = "`dsmoe sparsify CHECKPOINT --policy top_k --k K --output DIR`"


def check_exportable(config: DSMoEConfig, target: str) -> None:
    """Refuse a model that the target architecture cannot hold.

    Args:
        config: the model's.
        target: one of ARCHITECTURES.

    Raises:
        UserError: the reason, and what would be right.
    """
    if target not in ARCHITECTURES:
        raise UserError(f"export format {target!r}: must be one of {', '.join(FORMATS)}")
    if target == "dsmoe":
        return
    _check_kind(config, target)
    _check_attention(config, target)
    _check_experts(config, target)
    _check_removed(config, target)
    if config.num_experts > 1:
        uniform_top_k(config, target)
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        raise UserError(
            f"model.pad_token_id is {config.pad_token_id}; {ARCHITECTURES[target]} needs one below vocab_size "
            f"{config.vocab_size}, or none"
        )


def uniform_top_k(config: DSMoEConfig, target: str) -> int:
    """The number of experts that every token keeps in every layer (num_experts_per_tok of the target).

    Raises:
        UserError: the number differs between tokens or between layers.
    """
    ks = [_top_k_of_layer(config, target, layer) for layer in range(config.num_hidden_layers)]
    if len(set(ks)) > 1:
        other = next(layer for layer, k in enumerate(ks) if k != ks[0])
        raise UserError(
            f"the layers keep K = {', '.join(map(str, ks))} experts (model.mlp_routing[{other}] {ks[other]}, "
            f"model.mlp_routing[0] {ks[0]}); {ARCHITECTURES[target]} has one K for all layers. Choose one with "
            f"{_SPARSIFY}; {_KEEP}"
        )
    return ks[0]


def _top_k_of_layer(config: DSMoEConfig, target: str, layer: int) -> int:
    """The number of experts that every token keeps in a layer, the K most probable ones."""
    name, where, policy = ARCHITECTURES[target], f"model.mlp_routing[{layer}]", config.routing("mlp", layer)
    if is_dense(policy, config.num_experts):
        return config.num_experts
    if policy.get("k") is None:
        what = f"is {policy}"
        if isinstance(policy.get("threshold"), list):
            what = f"is policy {policy['policy']!r} with one threshold per expert"
        elif "score_weights" in policy:
            what = f"is policy {policy['policy']!r} with score_weights"
        raise UserError(
            f"{where} {what}, under which the number of experts varies from token to token; {name} keeps one K for all. "
            f"Fix K with {_SPARSIFY}; {_KEEP}"
        )
    if len(set(policy.get("score_weights", ()))) > 1:
        raise UserError(
            f"{where} has score_weights, which choose experts by p * weight; {name} chooses by p alone. Choose so with "
            f"{_SPARSIFY}; {_KEEP}"
        )
    return policy["k"]


def _check_removed(config: DSMoEConfig, target: str) -> None:
    # attention experts were refused before
    for layer in range(config.num_hidden_layers):
        kept = config.num_kept_experts("mlp", layer)
        if kept < config.num_experts:
            raise UserError(
                f"model.mlp_kept_experts[{layer}] stores {kept} of {config.num_experts} experts; {ARCHITECTURES[target]} "
                f"stores all in every layer, and its router would choose the removed ones. Sparsify without removal; "
                f"{_KEEP}"
            )


def _check_kind(config: DSMoEConfig, target: str) -> None:
    if config.num_attention_experts > 1:
        raise UserError(
            f"model.num_attention_experts is {config.num_attention_experts}; {ARCHITECTURES[target]} has no mixture of "
            f"attention heads; {_KEEP}"
        )
    if target == "llama" and config.num_experts > 1:
        raise UserError(
            f"model.num_experts is {config.num_experts}; Llama has no experts; use `--format qwen2moe` (qk_norm 'none') "
            "or `--format olmoe` (qk_norm 'full')"
        )
    if target == "qwen2moe" and config.num_experts == 1:
        raise UserError("the model is a dense twin; export one with qk_norm 'none' with `--format llama`")


def _check_attention(config: DSMoEConfig, target: str) -> None:
    name, needed = ARCHITECTURES[target], QK_NORM_OF[target]
    if config.qk_norm != needed:
        fitting = [
            other
            for other, norm in QK_NORM_OF.items()
            if norm == config.qk_norm
            and (other == "olmoe" or (other == "llama") == (config.num_experts == 1))
        ]
        advice = f"use `--format {fitting[0]}`" if fitting else _KEEP
        raise UserError(f"model.qk_norm is {config.qk_norm!r}; {name} needs {needed!r}; {advice}")
    if config.head_dim != config.hidden_size / config.num_attention_heads:
        raise UserError(
            f"model.head_dim is {config.head_dim} with {config.num_attention_heads} heads; {name} needs hidden_size / "
            f"num_attention_heads = {config.hidden_size / config.num_attention_heads:g}; {_KEEP}"
        )


def _check_experts(config: DSMoEConfig, target: str) -> None:
    name = ARCHITECTURES[target]
    if config.mlp_type != "swiglu":
        raise UserError(f"model.mlp_type is {config.mlp_type!r}; {name} has 'swiglu' alone; {_KEEP}")
    if config.num_experts == 1:
        return
    if config.router_type != "linear":
        raise UserError(
            f"model.router_type is {config.router_type!r}; {name} has a linear router alone; {_KEEP}"
        )
    if config.gate_normalization == "l2":
        raise UserError(
            "model.gate_normalization is 'l2', which divides by the norm of the probabilities of all experts; "
            f"{name} sees those of the kept ones alone: train with 'softmax' or 'renormalized'; {_KEEP}"
        )
    if config.gate_constant:
        raise UserError(
            f"model.gate_constant is {config.gate_constant:g}; the gates of {name} have no constant part: train with 0; "
            f"{_KEEP}"
        )
