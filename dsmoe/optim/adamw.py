"""AdamW with the usual groups: no weight decay on vectors, a learning rate of their own for routers."""

import torch
from torch import nn

from dsmoe.config.run import OptimSettings


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the model's parameters.

    Args:
        model: its parameters' names tell routers ("router") from the rest.
        settings: learning rate, betas, epsilon, weight decay and `router_lr_scale`.

    Returns:
        The optimiser; each group has "lr_scale", its factor on the scheduled learning rate, and "names".
    """
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed, is_router = parameter.ndim >= 2, ".router." in name
        group = groups.setdefault(
            (decayed, is_router),
            {
                "params": [],
                "names": [],
                "weight_decay": settings.weight_decay if decayed else 0.0,
                "lr_scale": settings.router_lr_scale if is_router else 1.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(
        list(groups.values()),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
