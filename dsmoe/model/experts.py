"""The stack of MLP experts: parameters, and the choice between the dense and the sparse path. Knows no router."""

import torch
from torch import Tensor, nn

from dsmoe.config import DSMoEConfig
from dsmoe.model.grouped import grouped_experts
from dsmoe.model.wide import wide_experts


class Experts(nn.Module):
    """N MLPs of one shape, stacked; N counts those that the config keeps, where others were removed.

    In memory `gate_up_proj` is [N, 2F, D] (for gelu `up_proj` [N, F, D]) and `down_proj` [N, F, D]: flattening the
    first two dimensions gives the wide GEMM of dense mode, a slice gives one expert, both without a copy. On disk
    `down_proj` is [N, D, F] as in transformers (see `dsmoe.model.weights`).

    Attributes:
        recompute: in dense mode, compute the pre-activations again in the backward pass instead of keeping them (see
            `dsmoe.model.recompute`).
    """

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        num_experts = config.num_kept_experts("mlp", layer_idx)
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.mlp_type = config.mlp_type
        self.recompute = False
        if self.mlp_type == "swiglu":
            self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        else:
            self.up_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, hidden))

    @property
    def stacked(self) -> tuple[str, str]:
        """Names of the stacked Parameters."""
        return ("gate_up_proj" if self.mlp_type == "swiglu" else "up_proj", "down_proj")

    @property
    def input_proj(self) -> nn.Parameter:
        """[N, H, D]: `gate_up_proj` or `up_proj`."""
        return self.gate_up_proj if self.mlp_type == "swiglu" else self.up_proj

    def forward(self, x_TD: Tensor, gates_TN: Tensor | None, expert_mask_TN: Tensor | None = None) -> Tensor:
        """Sum over experts of gate times output.

        Args:
            x_TD: [T, D] tokens.
            gates_TN: [T, N] gates; None: gates of one.
            expert_mask_TN: [T, N] bool: compute the kept experts only; None: all, as one wide MLP.

        Returns:
            [T, D].
        """
        if expert_mask_TN is None or gates_TN is None:
            return wide_experts(
                x_TD, gates_TN, self.input_proj, self.down_proj, self.mlp_type, recompute=self.recompute
            )
        return grouped_experts(x_TD, gates_TN, expert_mask_TN, self.input_proj, self.down_proj, self.mlp_type)
