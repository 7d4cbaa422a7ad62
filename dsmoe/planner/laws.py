"""The joint scaling law of dense models and sparse mixtures of experts, and how it is extended to DS-MoE.

N is the number of ACTIVE parameters with embeddings, D the number of training tokens, E the number of experts; the loss
is in nats per token. The experts are the law's: full-size, top-1, so that N hardly depends on E.

Source: arXiv 2502.05172 ("Joint MoE Scaling Laws"), equations 1 and 4, tables 3 and 4.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe.errors import UserError

PUBLISHED_RMSE = 0.0062  # of the published fit on its training runs, in nats; also the width of the tie band
TIE_BAND = 0.006
PUBLISHED_RANGE = {
    "num_params_active": (1e7, 2.7e9),
    "num_experts": (1, 32),
    "tokens_per_param": (1.0, 400.0),
}


def tie_band(rmse: float) -> float:
    """Differences in nats up to this are ties by a law fitted with that error on its own runs."""
    return max(TIE_BAND, rmse)


@dataclass(frozen=True)
class ReducedLaw:
    """The law at one number of experts: loss = m * N**mu + n * D**nu + c, with mu and nu negative.

    Source: arXiv 2502.05172, table 4.
    """

    m: float
    mu: float
    n: float
    nu: float
    c: float

    def loss(self, num_params_active: float, tokens: float) -> float:
        """Loss in nats per token (numpy arrays work too)."""
        return self.m * num_params_active**self.mu + self.n * tokens**self.nu + self.c


@dataclass(frozen=True)
class JointLaw:
    """All numbers of experts at once; `e_max` is not identified by any fit (a noiseless one misses it too).

    Source: arXiv 2502.05172, equations 1 and 4; the defaults are its table 3.
    """

    a: float = 35.91
    alpha: float = -0.1889
    delta: float = -0.2285
    gamma: float = 0.0098
    b: float = 35.98
    beta: float = -0.1775
    omega: float = 0.5529
    zeta: float = -0.0259
    e_start: float = 2.0732
    e_max: float = 290.4521
    c: float = 1.3637

    def effective_experts(self, num_experts: float) -> float:
        """E hat of equation 4: e_start at E = 1, saturating towards e_max."""
        inner = num_experts - 1 + 1 / (1 / self.e_start - 1 / self.e_max)
        return 1 / (1 / inner + 1 / self.e_max)

    def at(self, num_experts: float) -> ReducedLaw:
        """The law at a fixed number of experts (at least 1; may be fractional)."""
        if num_experts < 1:
            raise UserError(f"the number of experts is {num_experts}; it must be at least 1")
        effective = self.effective_experts(num_experts)
        log_effective = math.log(effective)
        return ReducedLaw(
            m=self.a * effective**self.delta,
            mu=self.alpha + self.gamma * log_effective,
            n=self.b * effective**self.omega,
            nu=self.beta + self.zeta * log_effective,
            c=self.c,
        )

    def loss(self, num_params_active: float, tokens: float, num_experts: float) -> float:
        """Loss in nats per token."""
        return self.at(num_experts).loss(num_params_active, tokens)


@dataclass(frozen=True)
class TabulatedLaw:
    """Separate reduced laws at the numbers of experts that were trained; more exact there, and undefined elsewhere."""

    table: Mapping[int, ReducedLaw]

    def at(self, num_experts: float) -> ReducedLaw:
        """The law at a tabulated number of experts; raises UserError at another one."""
        if num_experts not in self.table:
            known = ", ".join(str(value) for value in sorted(self.table))
            raise UserError(f"this law has no entry for {num_experts:g} experts; it knows {known}")
        return self.table[int(num_experts)]

    def loss(self, num_params_active: float, tokens: float, num_experts: float) -> float:
        """Loss in nats per token."""
        return self.at(num_experts).loss(num_params_active, tokens)


PUBLISHED_JOINT = JointLaw()
PUBLISHED_TABULATED = TabulatedLaw(
    {
        experts: ReducedLaw(m, mu, n, nu, 1.3637)
        for experts, m, mu, n, nu in (
            (1, 30.3640, -0.1817, 53.9838, -0.1965),
            (2, 27.7982, -0.1780, 66.8401, -0.2065),
            (4, 24.8462, -0.1731, 87.7022, -0.2192),
            (8, 21.8330, -0.1676, 119.9126, -0.2338),
            (16, 19.0159, -0.1617, 167.5073, -0.2494),
            (32, 16.5424, -0.1557, 234.6726, -0.2652),
        )
    }
)


@dataclass(frozen=True)
class DSMoETerm:
    """How DS-MoE's loss follows from the dense law: loss = dense(eta * N_total, D).

    An ASSUMPTION (eta = 1: as good as its dense twin) until it was fitted on own runs; tables say which.
    """

    eta: float = 1.0
    fitted: bool = False

    def loss(self, law: JointLaw | TabulatedLaw, num_params_total: float, tokens: float) -> float:
        """Loss in nats per token of a DS-MoE of that total size."""
        return law.at(1).loss(self.eta * num_params_total, tokens)


COEFFICIENTS = tuple(field.name for field in dataclasses.fields(JointLaw))
