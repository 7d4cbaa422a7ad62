"""Kernels of the gated activation, chosen once per process (see `selection`)."""

from dsmoe.model.kernels.selection import (
    gated_activation,
    gated_activation_backward,
    reset_kernel,
    selected_kernel,
)

__all__ = ["gated_activation", "gated_activation_backward", "reset_kernel", "selected_kernel"]
