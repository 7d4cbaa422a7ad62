"""Kernels of the gated activation and of experts without gradients, chosen once per process (see `selection`)."""

from dsmoe.model.kernels.selection import (
    gated_activation,
    gated_activation_backward,
    inference_experts,
    inference_kernel,
    reset_kernel,
    selected_kernel,
)

__all__ = [
    "gated_activation",
    "gated_activation_backward",
    "inference_experts",
    "inference_kernel",
    "reset_kernel",
    "selected_kernel",
]
