"""Error feedback (GPTQ; Frantar et al. 2022, arXiv 2210.17323) on any grid.

A column is rounded, and the columns behind it take up its error as well as real numbers can: w_k -= e U_jk for k > j,
with e = (w_j - q_j) / U_jj and U the upper Cholesky factor of the inverse Hessian. Codes for several weights send the
error of all of them, e = (w_V - q_V) U_VV^-1 (GPTVQ, arXiv 2402.15319). Here `weights` are always in the order of
handling, while parameters and codes have their logical places.
"""

from itertools import pairwise
from typing import Protocol

import numpy as np

from anyquant.algorithms.hessian import Factor, Order
from anyquant.algorithms.on_grid import Keep, OnGrid, Slot, arrange
from anyquant.core.dtypes import Float32
from anyquant.core.extras import require

PIECE = 128  # columns that the compiled code handles before the rest of a block is corrected by a matrix product
SLOW_PIECE = 32  # the same where the grid rounds by itself
STEERINGS = ("conditional", "diagonal")
NO_KEEP: Keep = np.empty((0, 0), dtype=np.bool_)


class Rounder(Protocol):
    """What happens to a block of columns."""

    def round(self, start: int, block: Float32, upper: Float32) -> Float32:
        """The values that the columns [start, start + width) take, (rows, width).

        `block` (rows, width) are their best real-valued weights given all columns before, and may be overwritten;
        `upper` (width, width) is the block of U that passes errors on within.
        """
        ...


def feed_errors_back(target: Float32, factor: Factor, rounder: Rounder) -> Float32:
    """The values (rows, in) that `rounder` chooses block by block; they and `target` are in the order of handling."""
    torch = require("torch")
    feedback = torch.from_numpy(factor.feedback)
    errors = torch.zeros(target.shape, dtype=torch.float32)
    wanted = torch.from_numpy(target)
    values = np.empty(target.shape, dtype=np.float32)
    for start, stop in pairwise(factor.edges):
        block = torch.addmm(wanted[:, start:stop], errors[:, :start], feedback[:start, start:stop])
        upper = np.ascontiguousarray(factor.feedback[start:stop, start:stop])
        values[:, start:stop] = rounder.round(start, block.numpy(), upper)
        errors[:, start:stop] = wanted[:, start:stop] - torch.from_numpy(values[:, start:stop])
    return values


class GridRounder:
    """Rounds to a grid; where `steering` is given, parameters are fitted to each span when it is reached.

    `columns` (in,) is the order of handling; `keep` (rows, in), in this order, is False where a value must be 0.
    `steering`: the Hessian's diagonal, in logical order, and "diagonal" when it is the importance of the channels. In
    "conditional" that is 1 / U_jj^2, what an error of w_j costs after the columns behind it were adapted.
    """

    def __init__(self, state: OnGrid, columns: Order, keep: Keep | None, steering: tuple[Float32, str] | None) -> None:
        self.state = state
        self.columns = columns
        self.keep = keep
        self.steering = steering

    def round(self, start: int, block: Float32, upper: Float32) -> Float32:
        width = block.shape[1]
        if self.steering is None:
            return self._columns(start, block, upper, None)
        values = np.empty_like(block)
        span = self.state.span
        for first in range(0, width, span):
            at, rest = slice(first, first + span), slice(first + span, width)
            part = np.ascontiguousarray(block[:, at])
            slot = self._fit(start + first, part, upper[at, at].diagonal(), self.steering)
            self.state.put(slot)
            values[:, at] = self._columns(start + first, part, upper[at, at], slot)
            correct(block[:, rest], part, upper[at, rest])
        return values

    def _fit(self, start: int, weights: Float32, diagonal: Float32, steering: tuple[Float32, str]) -> Slot:
        logical = self.columns[start : start + weights.shape[1]]
        keep = None if self.keep is None else self.keep[:, start : start + weights.shape[1]]
        kept = weights if keep is None else np.where(keep, weights, np.float32(0))
        importance, kind = steering
        if kind == "conditional":
            live = importance[logical] > 0
            importance = np.where(live, diagonal**-2, np.float32(0))[None]
            importance = arrange(importance, logical)[0]
        else:
            importance = importance[np.sort(logical)]
        return self.state.fit(arrange(kept, logical), int(logical.min()), importance)

    def _columns(self, start: int, weights: Float32, upper: Float32, slot: Slot | None) -> Float32:
        """Values of consecutive columns; `weights` become the errors to pass on, divided by the diagonal."""
        values = np.empty_like(weights)
        width = weights.shape[1]
        step = PIECE if self.state.compiled(slot) else SLOW_PIECE * self.state.grid.vector
        for first in range(0, width, step):
            at, rest = slice(first, min(first + step, width)), slice(first + step, width)
            logical = self.columns[start:][at]
            keep = NO_KEEP if self.keep is None else np.ascontiguousarray(self.keep[:, start:][:, at])
            part = np.ascontiguousarray(weights[:, at])
            values[:, at] = round_columns(self.state, slot, logical, part, np.ascontiguousarray(upper[at, at]), keep)
            correct(weights[:, rest], part, upper[at, rest])
            weights[:, at] = part
        return values


def correct(behind: Float32, errors: Float32, upper: Float32) -> None:
    """behind -= errors @ upper, in place."""
    if behind.size:
        torch = require("torch")
        torch.from_numpy(behind).addmm_(torch.from_numpy(errors), torch.from_numpy(upper), alpha=-1)


def round_columns(
    state: OnGrid, slot: Slot | None, logical: Order, weights: Float32, upper: Float32, keep: Keep
) -> Float32:
    """Round the columns `logical`, one code after the other. Codes go to `state`, `weights` become errors.

    `slot` holds the parameters of all of them, None: those of the whole matrix are looked up. Returns the values.
    """
    lattice = state.lattice(slot)
    if lattice is None:
        return _round_slowly(state, slot, logical, weights, upper, keep)
    from anyquant.algorithms.kernels import columns

    owners = (logical - (slot.first if slot else 0)) // lattice.width
    found, values = np.empty(weights.shape, dtype=np.int16), np.empty_like(weights)
    columns.feed_back(weights, upper, columns.points(lattice, len(weights)), owners, keep, (found, values))
    state.codes[:, logical] = lattice.codes[found]
    return values


def _round_slowly(
    state: OnGrid, slot: Slot | None, logical: Order, weights: Float32, upper: Float32, keep: Keep
) -> Float32:
    """The same through the grid's own functions."""
    torch = require("torch")
    vector = state.grid.vector
    work = np.ascontiguousarray(weights.T)
    behind = torch.from_numpy(work)
    values = np.empty_like(weights)
    for first in range(0, len(work), vector):
        at = slice(first, first + vector)
        code, value = state.nearest(int(logical[first]), np.ascontiguousarray(work[at].T), slot)
        if keep.size:
            value = np.where(keep[:, at], value, np.float32(0))
        state.codes[:, logical[first] // vector] = code[:, 0]
        values[:, at] = value
        inverse = np.linalg.inv(upper[at, at].astype(np.float64)).astype(np.float32)
        work[at] = inverse.T @ (work[at] - value.T)
        if at.stop < len(work):
            passed = torch.from_numpy(np.ascontiguousarray(upper[at, at.stop :].T))
            behind[at.stop :].addmm_(passed, behind[at], alpha=-1)
    weights[:] = work.T
    return values
