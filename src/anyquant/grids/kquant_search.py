"""How the K-quants are searched: what the fast kernels and the slow reference share, without either's machinery.

The trial scales and the weighting of errors follow ggml's encoder (github.com/ggml-org/ggml, src/ggml-quants.c,
quantize_row_q2_K .. q6_K), whose objective is the one to beat; the search for the stored integers goes further.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError

SUPER = 256
TINY = 2.0**-26  # every value a K-quant holds is a multiple of 2**-24 or more: smaller weights are zeros to the search
LARGEST_HALF = 65504.0
FLOOR = 1e-6  # of the mean importance: channels that never fired still prefer small errors

# how an error is weighted; x a weight, i the importance of its input channel
ABSOLUTE = 0  # |x| + factor * root mean square of the sub-block
SQUARE = 1  # x^2 + factor * mean square of the super-block
IMPORTANCE = 2  # i
IMPORTANCE_SPREAD = 3  # i * sqrt(x^2 + factor * mean square of the super-block)


@dataclass(frozen=True)
class Objective:
    """The weight of each squared error. `search_factor` replaces `factor` inside the search.

    |x| and x^2 alone ignore small weights; ggml's local search stays near plain rounding in spite of it, a better
    search does not and pays with plain squared error. Damping the weights lowers both below ggml's (measured).
    """

    kind: int
    factor: float
    search_factor: float


@dataclass(frozen=True)
class Effort:
    """`steps`: how many levels more than the range has a trial scale maps the extreme weight to; negative ones beyond
    twice the range map it to the other end. No step lies at a half: there the extreme weight itself would be a tie,
    and the platform's last bit would choose. `rounds` of refinement on the stored values."""

    steps: tuple[float, ...]
    rounds: int


@dataclass(frozen=True)
class Layout:
    """Levels are 0..highest, or -highest..highest - 1 when symmetric; the integers that scale them 0..most, or
    -most..most - 1. `width` weights share one. `trials` are tried as the largest integer, relative to `most`."""

    symmetric: bool
    width: int
    highest: int
    most: int
    trials: tuple[float, ...]
    plain: Objective
    plain_effort: Effort
    important: Objective
    important_effort: Effort

    @property
    def limit(self) -> float:
        """The largest magnitude that float16 parameters can reach; larger weights are stored as it."""
        return LARGEST_HALF * self.highest * self.most


def span(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(float(value) for value in np.linspace(first, last, count))


def both_ends(highest: int, count: int) -> tuple[float, ...]:
    """Trials around the extreme weight on the lowest level, then on the highest."""
    around = np.linspace(-0.9, 0.9, count)
    return tuple(float(value) for value in np.concatenate([around, around - 2 * highest + 0.8]))


FINE, COARSE = span(-0.25, 0.03, 19), span(-0.25, 0.03, 10)
SPREAD_1, SPREAD_2 = Objective(IMPORTANCE_SPREAD, 1.0, 1.0), Objective(IMPORTANCE_SPREAD, 2.0, 2.0)
SEVERAL = Effort(span(-0.95, 0.85, 19), 2)

LAYOUTS = {
    "q2_k": Layout(
        *(False, 16, 3, 15, COARSE),
        *(Objective(ABSOLUTE, 0.0, 0.1), Effort(span(-0.55, 0.85, 8), 2)),
        *(SPREAD_1, Effort(span(-0.85, 0.8, 12), 2)),
    ),
    "q3_k": Layout(
        *(True, 16, 4, 32, span(-0.15, 0.0, 9)),
        *(Objective(SQUARE, 0.0, 1.0), Effort(both_ends(4, 5), 1)),
        *(SPREAD_2, Effort(both_ends(4, 7), 2)),
    ),
    "q4_k": Layout(
        *(False, 32, 15, 63, FINE),
        *(Objective(ABSOLUTE, 1.0, 1.0), Effort(span(-1.05, 0.95, 21), 1)),
        *(SPREAD_2, SEVERAL),
    ),
    "q5_k": Layout(
        *(False, 32, 31, 63, FINE),
        *(Objective(ABSOLUTE, 1.0, 1.0), Effort(span(-0.55, 0.95, 16), 2)),
        *(SPREAD_2, SEVERAL),
    ),
    "q6_k": Layout(
        *(True, 16, 32, 128, span(-0.25, 0.02, 11)),
        *(Objective(SQUARE, 0.0, 0.5), Effort(both_ends(32, 5), 1)),
        *(Objective(IMPORTANCE, 0.0, 0.0), Effort(both_ends(32, 5), 1)),
    ),
}


def relative_importance(importance: npt.NDArray[np.floating], columns: int, block: int = SUPER) -> Float32:
    """`importance` (in,) over its mean in each `block` (scales do not depend on its size), kept above FLOOR.

    A block whose importance is all zero counts as uniform. Raises BadInputError for a wrong length, negative or
    non-finite values.
    """
    if importance.shape != (columns,):
        raise BadInputError(f"importance has shape {importance.shape}, expected ({columns},): one per input channel")
    if not np.isfinite(importance).all() or (importance < 0).any():
        raise BadInputError("importance holds negative or non-finite values; it must be a mean of squares")
    blocks = importance.astype(np.float64).reshape(-1, block)
    mean = blocks.mean(axis=1, keepdims=True)
    relative = np.divide(blocks, mean, out=np.ones_like(blocks), where=mean > 0)
    floored: Float32 = np.maximum(relative, FLOOR).astype(np.float32).reshape(-1)
    return floored


def objective_weights(
    objective: Objective, factor: float, width: int, weights: Float32, importance: Float32
) -> Float32:
    """The weight of each squared error, shape of `weights` (rows, in); kinds without importance do not read it."""
    if objective.kind == IMPORTANCE:
        return np.broadcast_to(importance, weights.shape)
    size = width if objective.kind == ABSOLUTE else SUPER
    x = weights.reshape(weights.shape[0], -1, size)
    squares = x * x
    mean = squares.mean(axis=2, keepdims=True)
    scale = np.float32(factor)
    weighting: Float32
    if objective.kind == ABSOLUTE:
        weighting = np.abs(x) + scale * np.sqrt(mean)
    elif objective.kind == SQUARE:
        weighting = squares + scale * mean
    else:
        weighting = np.sqrt(squares + scale * mean).reshape(weights.shape) * importance
    return weighting.reshape(weights.shape)
