"""Whether the C++ step can be used: loaded, asked for (DSMOE_KERNEL) and right on this machine."""

import logging
from typing import Any

import torch

from dsmoe.config import DSMoEConfig
from dsmoe.model.kernels import check, decoder, selection

NAME = "cpp"
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
}
# a threshold's kept set can hang on the last bit, so that numbers are compared where none is near
_MODELS: tuple[dict[str, Any], ...] = (
    {"kind": "dense", "num_experts": 1, "qk_norm": "full"},
    {"num_experts": 4, "num_attention_experts": 3, "qk_norm": "per_head", "gate_normalization": "l2"},
    {
        "num_experts": 4,
        "mlp_type": "gelu",
        "qk_norm": "none",
        "mlp_routing": {"policy": "top_p", "top_p": 1.0},
    },
)

_logger = logging.getLogger(__name__)
_told: set[str] = set()


def probe(device_type: str) -> None:
    """Load the library, compiling it if needed, and check its numbers against the model's own forward pass.

    Raises:
        check.KernelUnavailable: says what is missing or went wrong.
    """
    if device_type != "cpu":
        raise check.KernelUnavailable(f"it computes on CPU only, the tensors are on {device_type}")
    decoder.load()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        for overrides in _MODELS:
            for dtype in decoder.DTYPES:
                error = _error(overrides, dtype)
                if not error < _TOLERANCES[dtype]:
                    raise check.KernelUnavailable(f"its numbers are wrong here ({dtype}: error {error:.1e})")


def is_available() -> bool:
    """Whether models on CPU generate with the C++ step.

    Raises:
        UserError: DSMOE_KERNEL is no kernel, or asks for cpp where that can't be had.
    """
    return selection.whole_model_kernel(_Kernel) is not None


def tell_once(reason: str) -> None:
    """One line in the log for each reason why generation goes the slower way."""
    if reason not in _told:
        _told.add(reason)
        _logger.warning("generation: torch operations instead of %s, because %s; it is slower", NAME, reason)


class _Kernel:
    NAME = NAME
    probe = staticmethod(probe)


def _error(overrides: dict[str, Any], dtype: torch.dtype) -> float:
    """Largest error of two steps over the largest logit, against the forward pass in float64 with the same weights."""
    from dsmoe.model.generation.decoder import CppSteps
    from dsmoe.model.modeling import DSMoEForCausalLM

    torch.manual_seed(0)
    model: Any = DSMoEForCausalLM(DSMoEConfig(**_SIZES, **overrides))
    model = model.to(dtype).eval()
    ids = torch.randint(0, _SIZES["vocab_size"], (2, 5))
    steps = CppSteps(model, 2, 5)
    for slot in range(ids.shape[1]):
        actual = steps.step(ids[:, slot].contiguous(), torch.zeros(2, dtype=torch.int64), slot)
    expected = model.double()(ids, use_cache=False).logits[:, -1]
    return float((actual - expected).abs().max() / expected.abs().max())
