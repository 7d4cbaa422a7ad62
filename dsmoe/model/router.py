"""The router: logits over experts, in at least float32."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Router(nn.Module):
    """Linear, or an MLP with one hidden layer of SiLU units; no biases.

    Args:
        hidden_size: width D of the tokens.
        num_experts: N.
        router_hidden_size: hidden units of the MLP; 0 for a linear router.
        role: "mlp_router" or "attention_router" (for its initial weights).
        layer_idx: the layer.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, router_hidden_size: int, role: str, layer_idx: int
    ) -> None:
        super().__init__()
        self.role = role
        self.layer_idx = layer_idx
        if router_hidden_size:
            self.in_proj = nn.Parameter(torch.empty(router_hidden_size, hidden_size))
            self.out_proj = nn.Parameter(torch.empty(num_experts, router_hidden_size))
        else:
            self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Router logits [..., N] of tokens [..., D], in float32, or float64 for float64 tokens.

        Routing decides on small differences of probabilities, so it stays out of autocast.
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x = x_TD.to(dtype)
            if hasattr(self, "weight"):
                return functional.linear(x, self.weight.to(dtype))
            hidden = functional.silu(functional.linear(x, self.in_proj.to(dtype)))
            return functional.linear(hidden, self.out_proj.to(dtype))
