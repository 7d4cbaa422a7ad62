"""The robust objective: a weighted Huber loss of ln loss, summed over runs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsmoe.planner.fit.forms import Array, Design, predict

HUBER_DELTA = 1e-2  # arXiv 2502.05172; in units of ln loss


@dataclass(frozen=True)
class Objective:
    """S objectives over the same design; a constant factor on the weights moves no minimum.

    Args:
        design: the runs.
        log_loss: observed ln loss, [S, R] or [1, R] for all problems alike.
        weights: of the runs, [S, R] or [1, R].
        huber_delta: residuals beyond it count linearly.
    """

    design: Design
    log_loss: Array
    weights: Array
    huber_delta: float = HUBER_DELTA

    def of(self, rows: NDArray[np.intp]) -> "Objective":
        """The objectives with these numbers."""
        log_loss, weights = (
            values if len(values) == 1 else values[rows] for values in (self.log_loss, self.weights)
        )
        return Objective(self.design, log_loss, weights, self.huber_delta)

    def value(self, theta_SP: Array) -> Array:
        """The objectives, [S]; infinite where a loss is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            residual = np.abs(predict(theta_SP, self.design)[0] - self.log_loss)
            near = np.minimum(residual, self.huber_delta)
            found = np.sum(self.weights * near * (residual - 0.5 * near), axis=1)
        return np.where(np.isfinite(found), found, np.inf)

    def expansion(self, theta_SP: Array) -> tuple[Array, Array, Array]:
        """Jacobian [S, P, R], gradient [S, P] and Gauss-Newton weights [S, R] of the objectives."""
        log_loss, jacobian = predict(theta_SP, self.design, jacobian=True)
        assert jacobian is not None
        residual = log_loss - self.log_loss
        share = np.minimum(1.0, self.huber_delta / np.maximum(np.abs(residual), 1e-300))
        weights = np.broadcast_to(self.weights * share, residual.shape)
        return jacobian, np.einsum("spr,sr->sp", jacobian, weights * residual), weights
