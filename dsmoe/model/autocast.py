"""The dtype that products are computed in."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype on the device of `x` where autocast is on there, otherwise that of `x`.

    Float64 stays float64, as it does in torch.
    """
    if x.dtype == torch.float64:
        return x.dtype
    # with cold caches, asking a tensor for its device's name takes as long as reading 500 kB of weights
    device = "cpu" if x.is_cpu else x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
