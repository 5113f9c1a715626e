"""Coordinate descent under the full Hessian, after error feedback: what one pass in one order could not know.

Each code is chosen anew given all others, exactly: the objective tr((T - Q) H (T - Q)^T) is a parabola in one value
(QuantEase, arXiv 2309.01885; CDQuant, arXiv 2406.17542). Before that, the parameters of each span of columns are
fitted anew, where that lowers the objective, to two proposals: the best real-valued weights given all other columns,
and the present values, stretched and shifted as is best. No step makes the objective of a row larger.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from anyquant.algorithms.base import Task
from anyquant.algorithms.error_feedback import NO_KEEP, PIECE, SLOW_PIECE, correct, round_columns
from anyquant.algorithms.hessian import Route, damped, hessian_of
from anyquant.algorithms.on_grid import Keep, OnGrid, Slot
from anyquant.core.dtypes import Float32
from anyquant.core.extras import require
from anyquant.core.grid import Scope


@dataclass
class Descent:
    """The matrix while it is refined, in logical order: `values` (rows, in) belong to the codes in `state`.

    `hessian` (in, in) is the damped one. `importance` (in,) steers fits; None: parameters stay. `inverses` are those of
    its diagonal blocks, and their upper Cholesky factors, by columns.
    """

    state: OnGrid
    values: Float32
    hessian: Float32
    keep: Keep | None
    importance: Float32 | None
    inverses: dict[tuple[int, int], tuple[Float32, Float32]]
    row_block: int = field(init=False)

    def __post_init__(self) -> None:
        sizes = [p.rows for p in self.state.grid.parameters if p.scope is Scope.BLOCK]
        self.row_block = int(np.lcm.reduce(sizes)) if sizes else 1

    def inverse(self, at: slice) -> tuple[Float32, Float32]:
        """The inverse of `hessian[at, at]`, and its upper Cholesky factor."""
        key = (at.start, at.stop)
        if key not in self.inverses:
            inner = self.hessian[at, at].astype(np.float64)
            reversed_lower = np.linalg.cholesky(inner[::-1, ::-1])
            upper = np.linalg.inv(reversed_lower[::-1, ::-1])
            self.inverses[key] = ((upper.T @ upper).astype(np.float32), upper.astype(np.float32))
        return self.inverses[key]


def refine(
    state: OnGrid, target: Float32, values: Float32, task: Task, dampening: float, sweeps: int, refit: bool
) -> None:
    """Improve the codes and, with `refit`, the parameters in `state`, and their `values`, in place."""
    torch = require("torch")
    columns = target.shape[1]
    hessian = hessian_of(task.stats, columns, task.place, "gptq")
    square, inverses = _derived(task, hessian, dampening)
    importance = np.ascontiguousarray(hessian.diagonal()) if refit else None
    work = Descent(state, values, square, task.keep, importance, inverses)
    step = state.span if refit else PIECE if state.compiled(None) else SLOW_PIECE * state.grid.vector
    edges = Route("natural", state.grid.vector, step, PIECE).edges(columns)
    errors = torch.from_numpy(target - values)
    wide = torch.from_numpy(square)
    for _ in range(sweeps):
        for start, stop in pairwise(edges):
            pull = (errors @ wide[:, start:stop]).numpy()
            for first in range(start, stop, step):
                at, behind = slice(first, min(first + step, stop)), slice(first + step, stop)
                change = _improve(work, at, np.ascontiguousarray(pull[:, first - start :][:, :step]))
                correct(pull[:, first - start + step :], change, square[at, behind])
            errors[:, start:stop] = torch.from_numpy(target[:, start:stop] - values[:, start:stop])


def _derived(task: Task, hessian: Float32, dampening: float) -> tuple[Float32, dict[Any, Any]]:
    """The damped Hessian and room for `Descent.inverses`, one for all matrices with this input."""

    def compute() -> tuple[Float32, dict[Any, Any]]:
        return damped(hessian, np.arange(len(hessian)), dampening, np.float32), {}

    return compute() if task.stats is None else task.stats.once(("damped", dampening), compute)


def _improve(work: Descent, at: slice, pull: Float32) -> Float32:
    """Improve the columns `at`; `pull` (rows, columns) is (target - values) @ hessian there. Returns their change."""
    before = work.values[:, at].copy()
    if work.importance is not None:
        _refit(work, at, pull, _best_reals(work, at, pull), work.importance[at])
        _refit(work, at, pull, _stretched(work, at, pull), work.importance[at])
    slot = work.state.slot(at.start) if work.importance is not None else None
    width = at.stop - at.start
    step = PIECE if work.state.compiled(slot) else width
    for first in range(0, width, step):
        piece = slice(at.start + first, min(at.start + first + step, at.stop))
        change = _descend(work, slot, piece, np.ascontiguousarray(pull[:, first:][:, :step]))
        correct(pull[:, first + step :], change, work.hessian[piece, piece.stop : at.stop])
    return work.values[:, at] - before


def _refit(work: Descent, at: slice, pull: Float32, wanted: Float32, importance: Float32) -> None:
    """Fit parameters to `wanted` (rows, columns) and take them, with new codes, in the rows that this improves."""
    state, inner = work.state, work.hessian[at, at]
    keep = NO_KEEP if work.keep is None else np.ascontiguousarray(work.keep[:, at])
    kept = np.where(keep, wanted, np.float32(0)) if keep.size else wanted
    slot = state.fit(kept, at.start, importance)
    codes = state.codes[:, places(state, at)].copy()
    values = round_columns(state, slot, np.arange(at.start, at.stop), wanted.copy(), work.inverse(at)[1], keep)
    change = values - work.values[:, at]
    gain = ((change @ inner - 2 * pull) * change).sum(axis=1, dtype=np.float64)
    starts = np.arange(0, gain.size, work.row_block)
    better = np.repeat(np.add.reduceat(gain, starts) < 0, work.row_block)[: gain.size]
    state.codes[~better, places(state, at)] = codes[~better]
    state.put(slot, better)
    change[~better] = 0
    work.values[:, at] += change
    pull -= change @ inner


def _best_reals(work: Descent, at: slice, pull: Float32) -> Float32:
    """The best real-valued weights for the columns `at`, given all others."""
    wanted: Float32 = work.values[:, at] + pull @ work.inverse(at)[0]
    return wanted


def _stretched(work: Descent, at: slice, pull: Float32) -> Float32:
    """The values of the columns `at`, each block that shares a scale stretched as is best, one after the other."""
    lattice = work.state.lattice(work.state.slot(at.start))
    width = lattice.width if lattice is not None else at.stop - at.start
    wanted, left = work.values[:, at].copy(), pull.copy()
    inner = work.hessian[at, at]
    for first in range(0, wanted.shape[1], width):
        part = slice(first, first + width)
        block = wanted[:, part]
        passed = block @ inner[part]
        along, across = (left[:, part] * block).sum(axis=1), (passed[:, part] * block).sum(axis=1)
        factor = np.divide(along, across, out=np.zeros_like(along), where=across > 0)[:, None]
        wanted[:, part] += factor * block
        left -= factor * passed
    return wanted


def _descend(work: Descent, slot: Slot | None, at: slice, pull: Float32) -> Float32:
    """One sweep over the columns `at`. Returns the change of their values."""
    lattice = work.state.lattice(slot)
    inner = np.ascontiguousarray(work.hessian[at, at])
    if lattice is None:
        return _descend_slowly(work, slot, at, pull, inner)
    from anyquant.algorithms.kernels import columns

    keep = NO_KEEP if work.keep is None else np.ascontiguousarray(work.keep[:, at])
    owners = (np.arange(at.start, at.stop) - (slot.first if slot else 0)) // lattice.width
    values = np.ascontiguousarray(work.values[:, at])
    found = np.empty(values.shape, dtype=np.int16)
    columns.descend(pull, inner, columns.points(lattice, len(values)), owners, keep, (found, values))
    work.values[:, at] = values
    work.state.codes[:, at] = lattice.codes[found]
    return pull


def _descend_slowly(work: Descent, slot: Slot | None, at: slice, pull: Float32, inner: Float32) -> Float32:
    """The same through the grid's own functions; a code for several weights is changed only where that is better."""
    state, vector = work.state, work.state.grid.vector
    before = work.values[:, at].copy()
    for first in range(0, at.stop - at.start, vector):
        part, column = slice(first, first + vector), at.start + first
        own, current = inner[part, part], work.values[:, column : column + vector]
        inverse = np.linalg.inv(own.astype(np.float64)).astype(np.float32)
        code, value = state.nearest(column, np.ascontiguousarray(current + pull[:, part] @ inverse), slot)
        if work.keep is not None:
            value = np.where(work.keep[:, column : column + vector], value, np.float32(0))
        change = value - current
        better = ((change @ own - 2 * pull[:, part]) * change).sum(axis=1) < 0
        change[~better] = 0
        state.codes[better, column // vector] = code[better, 0]
        current += change
        pull[:, part.stop :] -= change @ inner[part, part.stop :]
    return work.values[:, at] - before


def places(state: OnGrid, at: slice) -> slice:
    """Where the codes of the columns `at` lie."""
    return slice(at.start // state.grid.vector, at.stop // state.grid.vector)
