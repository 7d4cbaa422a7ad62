"""One training run as the fit sees it, and its checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe.errors import UserError

KINDS = ("dense", "smoe", "dsmoe")


@dataclass(frozen=True)
class Run:
    """One trained model.

    Args:
        kind: "dense", "smoe" (trained sparsely) or "dsmoe" (trained densely, run sparsely).
        num_experts: of an SMoE the law's E: total experts per active one (full-size experts, top-1: their number); of a
            DS-MoE its MLP experts; of a dense model 1.
        num_params_active: parameters that a token uses, with embeddings.
        num_params_total: all parameters, with embeddings.
        tokens: training tokens.
        loss: validation loss in nats per token; of a DS-MoE at its sparse policy where that was measured.
        name: what to call it in messages.
        seed: of the run; runs that differ in it alone form a group in the bootstrap.
        active_share: mean share of its MLP experts that a DS-MoE runs; None: not known.
        corpus: fingerprint of the text; None: not known.
        windows: how the windows lie that the loss was measured on: "spread" over the split, or, before that, "first" of
            each source; None: not known.
        vocab_size: entries of the embedding table; None: not known.
    """

    kind: str
    num_experts: float
    num_params_active: float
    num_params_total: float
    tokens: float
    loss: float
    name: str = ""
    seed: int = 0
    active_share: float | None = None
    corpus: str | None = None
    windows: str | None = None
    vocab_size: int | None = None

    @property
    def training_flops(self) -> float:
        """6 N D with the N that training computes: the active parameters, in a DS-MoE all of them."""
        trained = self.num_params_total if self.kind == "dsmoe" else self.num_params_active
        return 6 * trained * self.tokens

    @property
    def configuration(self) -> tuple[str, float, float, float]:
        """What the law sees of the run; equal in runs that differ by their seed only."""
        size = self.num_params_total if self.kind == "dsmoe" else self.num_params_active
        return self.kind, self.num_experts, size, self.tokens


def checked(run: Run, where: str) -> Run:
    """The run itself.

    Args:
        run: the run.
        where: its file and row, for the message.

    Raises:
        UserError: a value that no run can have.
    """
    if run.kind not in KINDS:
        raise UserError(f"{where}: kind is {run.kind!r}; it must be one of {', '.join(KINDS)}")
    for name in ("num_experts", "num_params_active", "num_params_total", "tokens", "loss"):
        value = getattr(run, name)
        if not math.isfinite(value) or value <= 0:
            raise UserError(f"{where}: {name} is {value:g}; it must be a finite number above 0")
    if run.num_experts < 1:
        raise UserError(f"{where}: num_experts is {run.num_experts:g}; it must be at least 1")
    if run.kind == "dense" and run.num_experts != 1:
        raise UserError(f"{where}: a dense run has num_experts {run.num_experts:g}; it must be 1")
    if run.num_params_total < run.num_params_active * (1 - 1e-9):
        raise UserError(
            f"{where}: num_params_total {run.num_params_total:g} is below num_params_active {run.num_params_active:g}"
        )
    return run


def check_one_text(runs: Sequence[Run]) -> None:
    """Refuse losses that can't be compared, as far as runs say what theirs were measured on.

    Raises:
        UserError: of two texts, or of different parts of one; the message names a run of each.
    """
    for field, what in (("corpus", "text"), ("windows", "windows of the text")):
        first: Run | None = None
        for run in runs:
            value = getattr(run, field)
            if value is None:
                continue
            first = first or run
            if value != getattr(first, field):
                raise UserError(
                    f"{first.name} and {run.name}: their losses are of different {what} ({getattr(first, field)[:12]}, "
                    f"{value[:12]}) and can't be fitted together; give runs of one"
                )


def groups(runs: Sequence[Run]) -> list[int]:
    """Number of the group of each run; the seeds of one configuration form a group."""
    numbers: dict[tuple[str, float, float, float], int] = {}
    return [numbers.setdefault(run.configuration, len(numbers)) for run in runs]
