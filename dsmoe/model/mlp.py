"""The MLP of a decoder layer: router, gates and experts; a dense twin has one expert and no router."""

from torch import Tensor, nn

from dsmoe.config import DSMoEConfig
from dsmoe.model.experts import Experts
from dsmoe.model.router import Router
from dsmoe.model.routing import route


class MixtureMLP(nn.Module):
    """Mixture of MLP experts, run densely or sparsely as the layer's routing policy in the config says."""

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.experts = Experts(config, layer_idx)
        self.router = None
        if config.num_experts > 1:
            self.router = Router(
                config.hidden_size, config.num_experts, config.router_hidden_size, "mlp_router", layer_idx
            )

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor | None]:
        """MLP output [B, S, D] and router logits [B, S, N] (None in a dense twin)."""
        x_TD = x_BSD.flatten(0, 1)
        if self.router is None:
            return self.experts(x_TD, None).view(x_BSD.shape), None
        logits_TN = self.router(x_TD)
        out_TD = self.experts(x_TD, *route(logits_TN.softmax(-1), self.config, "mlp", self.layer_idx))
        return out_TD.view(x_BSD.shape), logits_TN.view(*x_BSD.shape[:2], -1)
