"""Sites: the experts of one part of one layer, what one of them costs, and what its router says on calibration text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsmoe.accounting import layer_sizes
from dsmoe.config.routing import Policy
from dsmoe.model import DSMoEForCausalLM
from dsmoe.model.routing import gate_values, keep_experts
from dsmoe.sparsify.compare import Policies, with_policies
from dsmoe.sparsify.suffix import layers_from, run_layers

PARTS = ("mlp", "attention")
COSTS = ("parameters", "flops")


@dataclass
class Site:
    """The experts of one part of one layer.

    Attributes:
        part: "mlp" or "attention".
        layer: its index.
        num_experts: N.
        kept_experts: those that are stored; None: all.
        cost: of one active expert, in parameters or FLOPs per token.
        reference: the policy that a sparse one is compared with.
        probs_TN: [T, N] router probabilities over calibration tokens, under the reference.
        reference_count: mean active experts of the reference.
        weights: score weights, or None.
    """

    part: str
    layer: int
    num_experts: int
    kept_experts: list[int] | None
    cost: float
    reference: Policy
    probs_TN: Tensor
    reference_count: float
    weights: list[float] | None = None

    @property
    def name(self) -> str:
        """For progress and reports."""
        return f"{self.part} {self.layer}"

    def count(self, policy: Policy) -> float:
        """Mean active experts under a policy, on the reference's probabilities."""
        return float(keep_experts(self.probs_TN, policy, self.kept_experts).sum(-1).double().mean())


def expert_cost(config: Any, part: str, cost: str, context_length: int) -> float:
    """What one active expert costs: its parameters, or its FLOPs per token at a context (2 per parameter, and scores).

    Args:
        config: a DSMoEConfig.
        part: "mlp" or "attention".
        cost: "parameters" or "flops".
        context_length: tokens of context, for the FLOPs of attention scores.
    """
    sizes = layer_sizes(config)
    if part == "mlp":
        parameters, scores = sizes.mlp / sizes.num_experts, 0.0
    else:
        experts = sizes.num_attention_experts
        parameters = sizes.query_output / experts
        scores = 4.0 * context_length * sizes.head_dim * sizes.num_heads / experts
    return parameters if cost == "parameters" else 2 * parameters + scores


def find_sites(
    model: DSMoEForCausalLM,
    batches: Sequence[dict[str, Tensor]],
    reference: Policies,
    cost: str = "parameters",
    context_length: int = 256,
) -> list[Site]:
    """All sites of a model, with the routers' probabilities on the batches' tokens that are not padding."""
    config = model.config
    seen: dict[tuple[str, int], list[Tensor]] = {}
    with torch.inference_mode(), with_policies(model, reference):
        for batch in batches:
            mask = batch["attention_mask"].to(model.device).bool()
            for part, per_layer in run_layers(model, batch).router_logits.items():
                for layer, logits in enumerate(per_layer):
                    seen.setdefault((part, layer), []).append(logits[mask].softmax(-1))
    sites = []
    for (part, layer), probs in seen.items():
        kept_experts = config.kept_experts(part, layer)
        price = expert_cost(config, part, cost, context_length)
        probs_TN, policy = torch.cat(probs), reference[part][layer]
        site = Site(
            part, layer, probs_TN.shape[-1], kept_experts, price, policy, probs_TN, reference_count=0.0
        )
        site.reference_count = site.count(site.reference)
        sites.append(site)
    return sites


def output_norms(
    model: DSMoEForCausalLM, batches: Sequence[dict[str, Tensor]], sites: Sequence[Site], reference: Policies
) -> list[list[float]]:
    """Mean norm of each expert's output, weighted by its gate, per site.

    Each expert is run alone: a policy that keeps one expert whose score outweighs all others. What the block then
    gives out is gate times output. Removed experts get the weight 1.
    """
    found = []
    with torch.inference_mode(), with_policies(model, reference):
        passes = [run_layers(model, batch, keep_inputs=True) for batch in batches]
        for site in sites:
            norms = [1.0] * site.num_experts
            for expert in site.kept_experts or range(site.num_experts):
                norms[expert] = _output_norm(model, batches, passes, site, reference, expert)
            mean = sum(norms) / len(norms)
            # a weight must be positive; an expert without output may as well come last
            found.append([round(max(norm / mean, 1e-4), 4) for norm in norms])
    return found


def _output_norm(
    model: DSMoEForCausalLM, batches: Any, passes: Any, site: Site, reference: Policies, expert: int
) -> float:
    alone = [1.0] * site.num_experts
    alone[expert] = 1e30
    policies = {part: list(per_layer) for part, per_layer in reference.items()}
    policies[site.part][site.layer] = {"policy": "top_k", "k": 1, "score_weights": alone}
    config, outputs = model.config, []
    layer: Any = model.model.layers[site.layer]
    block = layer.mlp if site.part == "mlp" else layer.self_attn
    hook = block.register_forward_hook(lambda module, args, out: outputs.append(out))
    scale: Any = config.mlp_gate_scale if site.part == "mlp" else config.attention_gate_scale
    constant = config.gate_constant if site.part == "mlp" else 0.0
    stored = site.kept_experts or list(range(site.num_experts))
    total = weight = 0.0
    try:
        with with_policies(model, policies), layers_from(model, 0, site.layer + 1):
            for batch, done in zip(batches, passes):
                outputs.clear()
                run_layers(model, batch, site.layer, done.inputs[site.layer])
                probs_TN = outputs[0][-1].flatten(0, 1).softmax(-1)
                chosen_TM = torch.zeros(len(probs_TN), len(stored), dtype=torch.bool, device=probs_TN.device)
                chosen_TM[:, stored.index(expert)] = True
                gates_TM = gate_values(
                    probs_TN, chosen_TM, config.gate_normalization, scale, site.kept_experts, constant
                )
                gates_T = gates_TM.sum(-1)
                labelled_T = batch["attention_mask"].flatten().to(gates_T.device).bool()
                total += float(outputs[0][0].flatten(0, 1).float().norm(dim=-1)[labelled_T].double().sum())
                weight += float(gates_T[labelled_T].double().sum())
    finally:
        hook.remove()
    return total / max(weight, 1e-30)
