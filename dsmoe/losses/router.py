"""Mutual-information, load-balancing and z-loss of routers, exact over the global batch.

Each of the three is a function of sums over the tokens of the global batch:

- mutual information (arXiv 2404.05567, eq. 4): L = -H(p) + mean_x H(e|x), p = mean_x p(e|x). For balanced one-hot
  routing it is -log N, for collapse onto one expert 0.
- load balancing (Switch Transformer, arXiv 2101.03961, eq. 4 to 6): L = N * sum_e f_e p_e, f_e = the share of
  assignments (kept pairs) that expert e got. It is 1 when balanced.
- z-loss (ST-MoE, arXiv 2202.08906, eq. 5): L = mean_x logsumexp(logits_x)^2.

A batch is spread over processes and micro-batches, which never see each other's tokens. That doesn't need a
differentiable collective: the gradient of -H(p) with respect to the local share of p is log p + 1 at the GLOBAL p,
so the surrogate sum_x p(e|x) * stopgrad(log p + 1) has the exact gradient, token by token. So the procedure is:
first `router_statistics` of every part without gradients, added up over processes and micro-batches; then, for each
part, `router_losses` with those global statistics, whose gradients add up to the exact one.

Shapes: L layers, T tokens, N experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RouterStatistics:
    """Sums over tokens, per layer; the statistics of two sets of tokens add up by `+`.

    Attributes:
        probs_LN: [L, N] sum of p(e|x).
        load_LN: [L, N] number of tokens that keep the expert.
        entropy_L: [L] sum of H(e|x) in nats.
        square_lse_L: [L] sum of logsumexp(logits)^2.
        num_tokens: scalar tensor, number of tokens.
        above_L: [L] sum of the number of experts with N * p(e|x) above a threshold; None: not asked for.
    """

    probs_LN: Tensor
    load_LN: Tensor
    entropy_L: Tensor
    square_lse_L: Tensor
    num_tokens: Tensor
    above_L: Tensor | None = None

    def __add__(self, other: "RouterStatistics") -> "RouterStatistics":
        """Statistics of both sets of tokens."""
        return RouterStatistics(*(a + b for a, b in zip(self.tensors(), other.tensors())))

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums that there are, in order."""
        always = (self.probs_LN, self.load_LN, self.entropy_L, self.square_lse_L, self.num_tokens)
        return always if self.above_L is None else (*always, self.above_L)

    def flatten(self) -> Tensor:
        """All sums as one vector, for one all-reduce."""
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors()])

    def unflatten(self, vector: Tensor) -> "RouterStatistics":
        """The inverse of `flatten`, with the shapes of these statistics."""
        parts = vector.split([tensor.numel() for tensor in self.tensors()])
        return RouterStatistics(*(part.view(old.shape) for part, old in zip(parts, self.tensors())))


def stack_layers(logits: Sequence[Tensor], token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """[L, T, N] logits and the [T] mask of tokens that count, from L tensors [B, S, N] and a mask [B, S]."""
    logits_LTN = torch.stack([layer.flatten(0, -2) for layer in logits])
    if token_mask is None:
        return logits_LTN, logits_LTN.new_ones(logits_LTN.shape[1])
    return logits_LTN, token_mask.flatten().to(logits_LTN.dtype)


@torch.no_grad()
def router_statistics(
    logits: Sequence[Tensor],
    token_mask: Tensor | None = None,
    kept: Sequence[Tensor] | None = None,
    threshold: float | None = None,
) -> RouterStatistics:
    """Statistics of one part of the batch, in float64 and without gradients.

    Args:
        logits: L tensors [B, S, N].
        token_mask: [B, S], nonzero where a token counts (padding doesn't); None: all do.
        kept: L masks [T, N] of the kept experts, for the loads; None: the share of p in place of counts. The
            load-balancing loss is then N * sum p^2, and its gradient, which holds the shares fixed, half of that value's.
        threshold: on N * p, for `above_L`; None: without it.

    Returns:
        RouterStatistics in float64.
    """
    logits_LTN, mask_T = stack_layers(logits, token_mask)
    logits_LTN, mask_T = logits_LTN.double(), mask_T.double()
    log_probs = logits_LTN.log_softmax(-1)
    probs = log_probs.exp()
    load = probs if kept is None else torch.stack(list(kept)).double()
    above_L = None
    if threshold is not None:
        above_L = torch.einsum("ltn,t->l", (probs * probs.shape[-1] > threshold).double(), mask_T)
    return RouterStatistics(
        probs_LN=torch.einsum("ltn,t->ln", probs, mask_T),
        load_LN=torch.einsum("ltn,t->ln", load, mask_T),
        entropy_L=-torch.einsum("ltn,ltn,t->l", probs, log_probs, mask_T),
        square_lse_L=torch.einsum("lt,t->l", logits_LTN.logsumexp(-1).square(), mask_T),
        num_tokens=mask_T.sum(),
        above_L=above_L,
    )


def statistics_values(statistics: RouterStatistics) -> dict[str, Tensor]:
    """The losses' values and what explains them, per layer.

    Returns:
        [L] tensors: "mutual_information" (the loss, -H(e) + H(e|x)), "entropy" (H(e)), "conditional_entropy" (mean
        H(e|x)), "load_balancing", "z_loss"; "load" [L, N], the share of tokens that keep each expert; and where it was
        asked for "above_threshold" [L], the mean share of experts with N * p above the threshold.
    """
    n = statistics.num_tokens.clamp(min=1)
    probs_LN = statistics.probs_LN / n
    entropy = -torch.xlogy(probs_LN, probs_LN).sum(-1)
    conditional = statistics.entropy_L / n
    load = statistics.load_LN
    share = load / load.sum(-1, keepdim=True).clamp(min=1e-12)
    found = {
        "mutual_information": conditional - entropy,
        "entropy": entropy,
        "conditional_entropy": conditional,
        "load_balancing": probs_LN.shape[-1] * (share * probs_LN).sum(-1),
        "z_loss": statistics.square_lse_L / n,
        "load": load / n,
    }
    if statistics.above_L is not None:
        found["above_threshold"] = statistics.above_L / (n * probs_LN.shape[-1])
    return found


@dataclass
class RouterLosses:
    """Differentiable scalars of one part of the batch, summed over layers.

    Their gradients, summed over all parts of the batch, are exact; their VALUES are those of a surrogate and mean
    nothing: report `statistics_values`.
    """

    mutual_information: Tensor
    load_balancing: Tensor
    z_loss: Tensor


def router_losses(
    logits: Sequence[Tensor],
    statistics: RouterStatistics,
    token_mask: Tensor | None = None,
    mean_probs_LN: Tensor | None = None,
    layer_weights_L: Tensor | None = None,
) -> RouterLosses:
    """Surrogates of the three losses for one part of the batch.

    Args:
        logits: L tensors [B, S, N] of this part, with gradients.
        statistics: those of the global batch, this part included.
        token_mask: [B, S] as for `router_statistics`.
        mean_probs_LN: [L, N] p(e) to use in place of that of `statistics` (for running averages).
        layer_weights_L: [L] factors of the layers in the sum of the mutual information; None: ones.

    Returns:
        RouterLosses, in the dtype of the logits, also where autocast is on.
    """
    with torch.autocast(logits[0].device.type, enabled=False):
        return _router_losses(logits, statistics, token_mask, mean_probs_LN, layer_weights_L)


def _router_losses(
    logits: Sequence[Tensor],
    statistics: RouterStatistics,
    token_mask: Tensor | None,
    mean_probs_LN: Tensor | None,
    layer_weights_L: Tensor | None,
) -> RouterLosses:
    logits_LTN, mask_T = stack_layers(logits, token_mask)
    dtype = logits_LTN.dtype
    total = statistics.num_tokens.clamp(min=1)
    mean_probs = statistics.probs_LN / total if mean_probs_LN is None else mean_probs_LN
    # an expert without any probability gets a large, finite push
    log_mean = mean_probs.clamp(min=torch.finfo(dtype).tiny).log().to(dtype)
    share = statistics.load_LN / statistics.load_LN.sum(-1, keepdim=True).clamp(min=1e-12)
    weight_T = mask_T / total.to(dtype)
    log_probs = logits_LTN.log_softmax(-1)
    probs = log_probs.exp()
    num_experts = logits_LTN.shape[-1]
    # -H(p) gives log p + 1 (the 1 has no gradient, since p sums to one), H(e|x) gives -log p(e|x)
    difference = log_mean[:, None] - log_probs
    if layer_weights_L is None:
        mutual_information = torch.einsum("ltn,ltn,t->", probs, difference, weight_T)
    else:
        weight_LT = layer_weights_L.to(weight_T)[:, None] * weight_T
        mutual_information = torch.einsum("ltn,ltn,lt->", probs, difference, weight_LT)
    return RouterLosses(
        mutual_information=mutual_information,
        load_balancing=num_experts * torch.einsum("ltn,ln,t->", probs, share.to(dtype), weight_T),
        z_loss=torch.einsum("lt,t->", logits_LTN.logsumexp(-1).square(), weight_T),
    )
