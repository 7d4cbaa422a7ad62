"""What a model must be for each export format; everything else is refused with the reason.

| format   | architecture | takes                                                                              |
|----------|--------------|------------------------------------------------------------------------------------|
| olmoe    | OLMoE        | qk_norm "full"; DS-MoE and SMoE with one K, or a dense twin (as one expert)        |
| qwen2moe | Qwen2-MoE    | qk_norm "none"; DS-MoE and SMoE with one K; its shared expert is one unit of zeros |
| llama    | Llama        | qk_norm "none"; a dense twin                                                       |
| dsmoe    | DS-MoE       | every model; loading it needs the `dsmoe` package                                  |

OLMoE and Qwen2-MoE keep the K largest of the softmax over all N experts and weight them with those probabilities
(norm_topk_prob false: gates "softmax") or with those divided by their sum (true: "renormalized"), so both equal
DS-MoE's sparse inference once the gate scale is folded into down_proj. Read in transformers 5.16 to 5.23. Mixtral,
JetMoE and GraniteMoE always renormalise, so they are no targets.
"""

from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import is_dense
from dsmoe.errors import UserError

ARCHITECTURES = {"olmoe": "OLMoE", "qwen2moe": "Qwen2-MoE", "llama": "Llama", "dsmoe": "DS-MoE"}
FORMATS = tuple(ARCHITECTURES)
QK_NORM_OF = {"olmoe": "full", "qwen2moe": "none", "llama": "none"}
_KEEP = "`--format dsmoe` keeps it"
_SPARSIFY = "`dsmoe sparsify CHECKPOINT --policy top_k --k K --output DIR`"


def check_exportable(config: DSMoEConfig, target: str) -> None:
    """Refuse a model that the target architecture cannot hold.

    Args:
        config: the model's.
        target: one of FORMATS.

    Raises:
        UserError: the reason, and what would be right.
    """
    if target not in FORMATS:
        raise UserError(f"export format {target!r}: must be one of {', '.join(FORMATS)}")
    if target == "dsmoe":
        return
    _check_kind(config, target)
    _check_attention(config, target)
    _check_experts(config, target)
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
    name = ARCHITECTURES[target]
    ks = []
    for layer in range(config.num_hidden_layers):
        policy = config.routing("mlp", layer)
        if is_dense(policy, config.num_experts):
            ks.append(config.num_experts)
        elif policy.get("k") is not None:
            ks.append(policy["k"])
        else:
            raise UserError(
                f"layer {layer} has routing policy {policy}, under which the number of experts varies from token to "
                f"token; {name} keeps one K for all. Fix K with {_SPARSIFY}; {_KEEP}"
            )
    if len(set(ks)) > 1:
        raise UserError(
            f"the layers keep K = {', '.join(map(str, ks))} experts; {name} has one K for all layers. Choose one with "
            f"{_SPARSIFY}; {_KEEP}"
        )
    return ks[0]


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
