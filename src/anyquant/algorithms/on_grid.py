"""A matrix on its way to any grid: parameters of some of its columns, and rounding one column after the other.

A grid is seen only through its functions. Where it tells its lattice, the columns are handled by compiled code; else
by its own `encode` and `decode`, one code after the other.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.algorithms.hessian import Order
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Codes, Grid, Lattice, Params, Scope

Keep = npt.NDArray[np.bool_]
MOST_LEVELS = 2**15 - 1  # more than that the compiled code cannot count


def parameter_span(grid: Grid, columns: int) -> int:
    """How many columns at least have parameters that no other columns use; all of them where there is no less."""
    widths = [p.columns for p in grid.parameters if p.scope is Scope.BLOCK]
    return min(columns, math.lcm(grid.block[1], grid.vector, *widths))


def refittable(grid: Grid, shared: Params | None) -> bool:
    """Whether parameters can be fitted for some columns alone: those that reach further are known beforehand."""
    known = shared or {}
    blocks = [p for p in grid.parameters if p.scope is Scope.BLOCK]
    return bool(blocks) and all(p in blocks or p.name in known for p in grid.parameters)


@dataclass(frozen=True)
class Slot:
    """The parameters of the columns [first, last), as if these were a matrix."""

    first: int
    last: int
    params: Params


class OnGrid:
    """Codes and parameters of a matrix (rows, in) while they are chosen; columns are named by their logical place."""

    def __init__(self, grid: Grid, shape: tuple[int, int], params: Params | None, shared: Params | None) -> None:
        """`params`: all of them, or None when `put` will bring those of each span; `shared` reach further."""
        self.grid = grid
        self.shape = shape
        self.codes: Codes = np.empty((shape[0], shape[1] // grid.vector), dtype=grid.code_dtype)
        self.params: dict[str, npt.NDArray[Any]] = {
            p.name: np.array({**(shared or {}), **(params or {})}[p.name])
            if params is not None or p.scope is not Scope.BLOCK
            else np.empty(p.shape(shape), dtype=p.dtype)
            for p in grid.parameters
        }
        self.span = parameter_span(grid, shape[1])
        self.shared = shared
        self._nearby: Slot | None = None
        self._known: tuple[Slot | None, Lattice | None] | None = None

    def slot(self, column: int) -> Slot:
        """The slot that the column lies in."""
        first = column // self.span * self.span
        last = min(first + self.span, self.shape[1])
        return Slot(first, last, {name: array[where] for name, array, where in self._parts(first, last)})

    def put(self, slot: Slot, rows: npt.NDArray[np.bool_] | None = None) -> None:
        """Take over the parameters of `slot`, for `rows` (rows,) only; these never part rows that share one."""
        self._nearby = self._known = None
        per_row = {p.name: p.rows for p in self.grid.parameters if p.scope is Scope.BLOCK}
        for name, array, where in self._parts(slot.first, slot.last):
            if name in per_row:
                chosen = slice(None) if rows is None else rows[:: per_row[name]]
                array[where][chosen] = slot.params[name][chosen]

    def _parts(self, first: int, last: int) -> list[tuple[str, npt.NDArray[Any], tuple[slice, slice]]]:
        """Name, whole array and place of what belongs to the columns [first, last)."""
        parts = []
        for p in self.grid.parameters:
            width = p.columns if p.scope is Scope.BLOCK else 1
            columns = slice(first // width, -(-last // width)) if p.scope is Scope.BLOCK else slice(None)
            parts.append((p.name, self.params[p.name], (slice(None), columns)))
        return parts

    def fit(self, weights: Float32, first: int, importance: Float32) -> Slot:
        """Parameters fitted to the `weights`, in logical order, of the slot that begins at column `first`, steered by
        the `importance` of its columns."""
        last = first + weights.shape[1]
        found = self.grid.fit(weights, importance, self.shared)
        return Slot(first, last, {name: np.asarray(found[name]) for name in self.params})

    def nearest(self, column: int, weights: Float32, slot: Slot | None) -> tuple[Codes, Float32]:
        """Nearest codes (rows, 1), and their values, for `weights` (rows, vector) that begin at `column`."""
        if slot is None:
            if self._nearby is None or not self._nearby.first <= column < self._nearby.last:
                self._nearby = self.slot(column)
            slot = self._nearby
        at = slice(column - slot.first, column - slot.first + weights.shape[1])
        codes = self.grid.encode(weights, slot.params, at)
        return codes, self.grid.decode(codes, slot.params, at)

    def lattice(self, slot: Slot | None) -> Lattice | None:
        """The lattice of the slot's columns, or of all; None where the grid has none that compiled code can take."""
        if self._known is None or self._known[0] is not slot:
            params = self.params if slot is None else slot.params
            self._known = (slot, lattice_of(self.grid, params, self.shape[0]))
        return self._known[1]

    def compiled(self, slot: Slot | None) -> bool:
        """Whether the columns have a lattice."""
        return self.lattice(slot) is not None


def lattice_of(grid: Grid, params: Params, rows: int) -> Lattice | None:
    """The lattice of a matrix with so many rows; None where the grid has none that compiled code can take."""
    found = grid.lattice(params) if grid.vector == 1 else None
    if found is None or found.codes.size > MOST_LEVELS:
        return None
    # blocks of several rows may reach beyond the last one
    return replace(found, scale=found.scale[:rows], shift=found.shift[:rows])


def arrange(weights: Float32, logical: Order) -> Float32:
    """Columns of one slot in logical order."""
    if bool((np.diff(logical) == 1).all()):
        return weights
    arranged = np.empty_like(weights)
    arranged[:, logical - logical.min()] = weights
    return arranged
