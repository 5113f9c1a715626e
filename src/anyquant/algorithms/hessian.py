"""The Hessian of a matrix's input, damped and factorised, as error feedback needs it.

With H = R R^T, R upper triangular, and the errors E of the columns before `a` known, the best real-valued weights for
the columns B that follow them are target_B + E R_(:a, B) R_BB^-1, and within B they go on as in GPTQ with the upper
Cholesky factor R_BB^-1 of the inverse Hessian of what is left. So the inverse of H itself is never formed.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.extras import require

Order = npt.NDArray[np.intp]
Matrix = npt.NDArray[Any]
MOST_DAMPENING = 1.0
PANEL = 512  # columns of a Cholesky factor computed at once
ORDERS = ("natural", "activation", "groups")
SEED = 0  # of the order "random"


@dataclass(frozen=True)
class Route:
    """In which order columns are handled, and how many at once.

    `unit` columns have one code, `span` columns stay together, `block` columns are handled before the rest is
    corrected. `order`: "natural"; "activation", units by falling mean of the diagonal, for which the span is one unit;
    "groups", spans by falling mean, and the units within a span too; "random", spans in an order that is always the
    same.
    """

    order: str
    unit: int = 1
    span: int = 1
    block: int = 128

    def columns(self, diagonal: Float32) -> Order:
        """The columns in the order in which they are handled."""
        if self.order == "natural":
            return np.arange(diagonal.size)
        units = _means(diagonal, self.unit)
        if self.order == "random":
            whole = diagonal.size // self.span * self.span
            spans = np.random.default_rng(SEED).permutation(np.arange(whole).reshape(-1, self.span))
            return np.append(spans, np.arange(whole, diagonal.size))
        if self.order == "activation":
            ranks = np.argsort(-units, kind="stable")
        else:
            spans = _means(diagonal, self.span)
            if diagonal.size % self.span:
                spans[-1] = -1  # the span that is not whole stays behind the others
            group = np.arange(units.size) * self.unit // self.span
            ranks = np.lexsort((-units, group, -spans[group]))
        columns = (ranks[:, None] * self.unit + np.arange(self.unit)).reshape(-1)
        return columns[columns < diagonal.size]

    def edges(self, columns: int) -> tuple[int, ...]:
        """Where blocks begin, and the end of the last: whole spans, at least `block` columns where there are."""
        step = self.span * -(-self.block // self.span)
        return (*range(0, columns, step), columns)


@dataclass(frozen=True)
class Factor:
    """`columns` (in,) is the order of handling, in which everything else is. `edges` are those of the blocks.

    `feedback` (in, in) float32: a diagonal block is R_BB^-1, what lies above it R_(:a, B) R_BB^-1, the rest 0.
    `dampening` is what was added to the diagonal, relative to its mean; `dead` (in,) the channels that were always 0:
    they are rounded and send no error.
    """

    route: Route
    columns: Order
    edges: tuple[int, ...]
    feedback: Float32
    dampening: float
    dead: npt.NDArray[np.bool_]

    def arranged(self, matrix: Matrix) -> Matrix:
        """The columns of `matrix` (rows, in) in the order of handling."""
        return matrix if self.route.order == "natural" else np.take(matrix, self.columns, axis=1)

    def restored(self, matrix: Matrix) -> Matrix:
        """Undoes `arranged`."""
        return matrix if self.route.order == "natural" else np.take(matrix, np.argsort(self.columns), axis=1)


def factor(moments: Moments, route: Route, dampening: float, place: str) -> Factor:
    """The factor of the Hessian in the order of `route`; computed once for all matrices with this input.

    What `hessian_of` refuses must not come here. `dampening` times the mean of the diagonal (dead channels apart) is
    added to the diagonal; where that does not make the matrix positive definite, ten times as much, and so on. Raises
    BadInputError when 1.0 is not enough, or the Hessian holds a value that cannot be one.
    """
    return moments.once(("factor", route, dampening), lambda: factorise(moments.hessian, route, dampening, place))


def hessian_of(moments: Moments | None, columns: int, place: str, algorithm: str) -> Float32:
    """The Hessian. Raises UsageError where there is none, BadInputError for a wrong shape."""
    if moments is None or moments.hessian is None:
        raise UsageError(f"{place}: {algorithm} needs the Hessian of the input; calibrate with a text")
    if moments.hessian.shape != (columns, columns):
        raise BadInputError(f"{place}: the Hessian has shape {moments.hessian.shape}, the matrix {columns} columns")
    return moments.hessian


def damped(hessian: Float32, columns: Order, dampening: float, dtype: type = np.float64) -> npt.NDArray[Any]:
    """The Hessian with its diagonal raised, in the order `columns`; a dead channel meets only itself."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean(dtype=np.float64)) if live.any() else 1.0
    steps = np.diff(columns)
    if (steps == 1).all() or (steps == -1).all():
        step = 1 if columns[0] == 0 else -1
        result: npt.NDArray[Any] = hessian[::step, ::step].astype(dtype, order="C")
    else:
        result = np.take(np.take(hessian, columns, axis=0), columns, axis=1).astype(dtype)
    at = ~live[columns]
    if at.any():
        result[at, :] = 0
        result[:, at] = 0
    result[np.diag_indices_from(result)] += np.where(at, mean, dampening * mean)
    return result


def factorise(hessian: Any, route: Route, dampening: float, place: str) -> Factor:
    """As `factor`, of any second moment, and not remembered."""
    diagonal = _checked_diagonal(hessian, place)
    columns = route.columns(diagonal)
    lower, used = _lower_reversed(hessian, columns, dampening, place)
    edges = route.edges(diagonal.size)
    feedback = _feedback(lower, edges)
    return Factor(route, columns, edges, feedback, used, diagonal == 0)


def _checked_diagonal(hessian: Float32, place: str) -> Float32:
    diagonal: Float32 = hessian.diagonal()
    if not np.isfinite(hessian.sum(dtype=np.float64)) and not np.isfinite(hessian).all():
        channel = int(np.flatnonzero(~np.isfinite(hessian).all(axis=0))[0])
        raise BadInputError(f"{place}: the Hessian is not finite at channel {channel}; calibrate again")
    if (diagonal < 0).any():
        channel = int(np.flatnonzero(diagonal < 0)[0])
        raise BadInputError(
            f"{place}: the Hessian is {diagonal[channel]:.6g} at channel {channel}, but a mean of squares is not "
            "negative; calibrate again"
        )
    return diagonal


def _lower_reversed(hessian: Float32, columns: Order, dampening: float, place: str) -> tuple[Any, float]:
    """The lower Cholesky factor of the damped Hessian in *reversed* order, float64, and the dampening that it took."""
    torch = require("torch")
    used = dampening
    while True:
        lower = torch.from_numpy(damped(hessian, columns[::-1], used))
        if cholesky(lower):
            return lower, used
        if used >= MOST_DAMPENING:
            raise BadInputError(
                f"{place}: the Hessian is not positive definite even with dampening {used:g}; calibrate again"
            )
        used = min(max(used * 10, 1e-6), MOST_DAMPENING)


def cholesky(square: Any) -> bool:
    """The lower Cholesky factor takes the place of the lower triangle of a torch matrix; what is above it stays.

    In place, as matrices are large: torch's own makes one copy or two. False where the matrix is not positive definite.
    """
    torch = require("torch")
    size = len(square)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        corner, failed = torch.linalg.cholesky_ex(square[start:stop, start:stop])
        if failed.item() or not bool(torch.isfinite(corner.diagonal()).all()):
            return False
        square[start:stop, start:stop] = corner
        below = square[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
        for first in range(stop, size, PANEL):
            last = min(first + PANEL, size)
            square[first:last, stop:last].addmm_(below[first - stop : last - stop], below[: last - stop].mT, alpha=-1)
    return True


def _feedback(lower: Any, edges: tuple[int, ...]) -> Float32:
    """See Factor. Reversing both axes of `lower` gives R, block by block, so that R is never whole in memory."""
    torch = require("torch")
    size = len(lower)
    feedback = torch.zeros((size, size), dtype=torch.float32)
    for start, stop in pairwise(edges):
        upper = lower[size - stop :, size - stop : size - start].flip(0, 1)
        identity = torch.eye(stop - start, dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(upper[start:], identity, upper=True)
        feedback[start:stop, start:stop] = inverse
        feedback[:start, start:stop] = upper[:start] @ inverse
    result: Float32 = feedback.numpy()
    return result


def _means(values: Float32, width: int) -> npt.NDArray[np.float64]:
    """Means of `width` consecutive values each; the last ones may be fewer."""
    starts = np.arange(0, values.size, width)
    sums = np.add.reduceat(values.astype(np.float64), starts)
    means: npt.NDArray[np.float64] = sums / np.diff(np.append(starts, values.size))
    return means
