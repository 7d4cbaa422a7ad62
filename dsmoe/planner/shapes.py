"""Families of shapes and their parameter counts, as functions of the hidden size d alone.

The joint law's own counting: layers = heads = d / 64, SwiGLU MLPs of 3 d hidden units, untied embeddings, and neither
norms nor routers::

    N_total = 2 d V + (4 + 9 E) L d^2        N_act = 2 d V + 13 L d^2        (SMoE, top-1 full-size experts)

A DS-MoE is its dense twin cut into N experts of 3 d / N units, of which a mean share s runs::

    N_total = 2 d V + 13 L d^2               N_act = 2 d V + (4 + 9 s) L d^2

d is real in the optimiser and a multiple of 64 in a `Shape`.

Source: arXiv 2502.05172 (counting); arXiv 2404.05567 (DS-MoE).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dsmoe.errors import UserError

LAW_VOCAB_SIZE = 50_257  # the GPT-2 tokenizer of the law's runs
HEAD_DIM = 64
MLP_RATIO = 3
ATTENTION, MLP = 4, 9  # matrices of d x d per layer: q, k, v, o; and three of d x 3d
KINDS = ("dense", "smoe", "dsmoe")
MOST_EXPERTS = 1_000_000  # far beyond any law


@dataclass(frozen=True)
class Shape:
    """A model that can be built.

    Args:
        hidden_size: d, a multiple of 64.
        num_layers: d / 64.
        num_heads: d / 64.
        intermediate_size: hidden units of all experts of a layer together.
        moe_intermediate_size: hidden units of one expert.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    moe_intermediate_size: int


@dataclass(frozen=True)
class Family:
    """All models of one kind and number of experts; they differ in the hidden size.

    Args:
        kind: "dense", "smoe" (top-1, full-size experts) or "dsmoe".
        num_experts: experts of a layer; 1 for a dense model.
        active_share: wanted mean share of MLP experts that a token runs; only for a DS-MoE. A token keeps at least
            one expert, so the share is at least 1 / num_experts.
        vocab_size: entries of each of the two embedding tables.

    Raises:
        UserError: an impossible combination.
    """

    kind: str
    num_experts: int = 1
    active_share: float = 1.0
    vocab_size: int = LAW_VOCAB_SIZE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind {self.kind!r} is unknown; known are {', '.join(KINDS)}")
        if self.num_experts < 1 or (self.kind == "dense" and self.num_experts != 1):
            raise UserError(
                f"{self.kind} with {self.num_experts} experts: a dense model has 1, others at least 1"
            )
        if self.num_experts > MOST_EXPERTS:
            raise UserError(
                f"{self.kind} with {self.num_experts:.4g} experts: at most {MOST_EXPERTS:,} are planned"
            )
        share = max(self.active_share, 1 / self.num_experts) if self.kind == "dsmoe" else 1.0
        object.__setattr__(self, "active_share", min(1.0, share))

    @property
    def name(self) -> str:
        """For tables and legends."""
        if self.kind == "dense":
            return "dense"
        return f"SMoE E={self.num_experts}" if self.kind == "smoe" else f"DS-MoE N={self.num_experts}"

    @property
    def mean_k(self) -> float:
        """Mean number of experts that a token runs."""
        return self.active_share * self.num_experts if self.kind == "dsmoe" else 1.0

    def _count(self, hidden_size: float, mlps: float) -> float:
        cubic = (ATTENTION + MLP * mlps) / HEAD_DIM
        return 2.0 * self.vocab_size * hidden_size + cubic * hidden_size**3

    def num_params_total(self, hidden_size: float) -> float:
        """All parameters as the law counts them, embeddings included; memory holds `num_params_stored`."""
        return self._count(hidden_size, self.num_experts if self.kind == "smoe" else 1)

    def num_params_stored(self, hidden_size: float) -> float:
        """`num_params_total` with what the law leaves out: routers and norms, as the configurations that a plan writes.

        Those have RMSNorms before attention and MLP, of queries and of keys, and one at the end.
        """
        router = self.num_experts if self.num_experts > 1 else 0
        per_layer = (router + 4) * hidden_size
        return self.num_params_total(hidden_size) + hidden_size / HEAD_DIM * per_layer + hidden_size

    def num_params_active(self, hidden_size: float) -> float:
        """Parameters that a token uses in inference, embeddings included."""
        return self._count(hidden_size, self.active_share)

    def num_params_trained(self, hidden_size: float) -> float:
        """Parameters that a training token goes through: all of a DS-MoE, the active ones otherwise.

        The dense law of a DS-MoE and the law of the others are read at this size as well.
        """
        return (
            self.num_params_total(hidden_size)
            if self.kind == "dsmoe"
            else self.num_params_active(hidden_size)
        )

    def num_params_non_embedding(self, hidden_size: float) -> float:
        """`num_params_trained` without the two embedding tables."""
        return self.num_params_trained(hidden_size) - 2.0 * self.vocab_size * hidden_size

    def hidden_size_of(self, num_params_total: float) -> float:
        """The real d with that many total parameters."""
        return largest(self.num_params_total, num_params_total)

    @property
    def step(self) -> int:
        """Smallest multiple of 64 whose multiples can be built: a DS-MoE's 3 d divides into its experts."""
        if self.kind != "dsmoe":
            return HEAD_DIM
        return HEAD_DIM * self.num_experts // math.gcd(self.num_experts, MLP_RATIO * HEAD_DIM)

    def shape(self, hidden_size: int) -> Shape:
        """The model of that hidden size, a multiple of `step`."""
        if hidden_size < 1 or hidden_size % self.step:
            raise UserError(f"hidden size {hidden_size} of {self.name} is not a multiple of {self.step}")
        layers, width = hidden_size // HEAD_DIM, MLP_RATIO * hidden_size
        if self.kind == "dsmoe":
            return Shape(hidden_size, layers, layers, width, width // self.num_experts)
        return Shape(hidden_size, layers, layers, width * self.num_experts, width)


def largest(quantity: Callable[[float], float], limit: float) -> float:
    """Largest x >= 0 with quantity(x) <= limit, of a function that grows from quantity(0) <= limit.

    Bisection to the last bit.
    """
    low, high = 0.0, 1.0
    while quantity(high) <= limit:
        low, high = high, 2 * high
        if high > 1e15:  # beyond anything that is built, and still exact in floating point
            return low
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return low
        low, high = (middle, high) if quantity(middle) <= limit else (low, middle)
