"""Which kernel computes the gated activation: DSMOE_KERNEL=auto|eager|compile|cpp."""

from torch import Tensor

from dsmoe.model.kernels import eager


def selected_kernel() -> str:
    """Name of the kernel in use: "eager", "compile" or "cpp"."""
    return eager.NAME


def gated_activation(h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str) -> Tensor:
    """See `eager.forward`."""
    return eager.forward(h_TNH, gates_TN, mlp_type)


def gated_activation_backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.backward`."""
    return eager.backward(grad_TNF, h_TNH, gates_TN, mlp_type)
