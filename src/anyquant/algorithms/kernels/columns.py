"""Rounding one column after the other while the columns behind it are corrected: error feedback, coordinate descent.

Sixty-four rows lie side by side in the first-level cache, transposed: lane = row, so that rounding and correcting are
contiguous loops over lanes and become vector code whatever the instruction set.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.algorithms.kernels import CACHE
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Lattice

Single = Any  # one float32: mypy knows no type that is both NumPy's scalar and what its arithmetic gives
Indices = npt.NDArray[np.int16]

LANES = 64
ZERO, ONE = np.float32(0), np.float32(1)
FAST = {"contract", "nnan", "nsz"}


class Points(NamedTuple):
    """A lattice as the kernels take it: `levels` (1 or rows, n) and the `middles` (1 or rows, n - 1) between them."""

    levels: Float32
    middles: Float32
    scale: Float32
    shift: Float32
    uniform: bool


def points(lattice: Lattice, rows: int) -> Points:
    """The same values; a code is replaced by its place among the levels. What all rows share is repeated."""
    levels = np.ascontiguousarray(np.atleast_2d(lattice.levels), dtype=np.float32)
    middles = (levels[:, :-1] + levels[:, 1:]) / np.float32(2)
    scale, shift = (
        np.ascontiguousarray(np.broadcast_to(array, (rows, array.shape[1])), dtype=np.float32)
        for array in (lattice.scale, lattice.shift)
    )
    if len(levels) not in (1, rows):
        raise ValueError(f"a lattice has levels for {len(levels)} rows, the matrix has {rows}")
    return Points(levels, middles, scale, shift, lattice.uniform)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def load(source: Float32, first: int, count: int, tile: Float32) -> None:
    """Rows [first, first + count) of `source` to lanes of `tile` (columns, LANES); the lanes beyond are zeros."""
    for column in range(source.shape[1]):
        for lane in range(count):
            tile[column, lane] = source[first + lane, column]
        for lane in range(count, LANES):
            tile[column, lane] = ZERO


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def store(tile: Float32, first: int, count: int, target: Float32) -> None:
    """The lanes back to their rows."""
    for lane in range(count):
        for column in range(target.shape[1]):
            target[first + lane, column] = tile[column, lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def gather(scale: Float32, shift: Float32, first: int, count: int, owner: int, unit: Float32) -> None:
    """Scale, its inverse (0 for a scale of 0) and shift of the rows' blocks `owner` to the three rows of `unit`."""
    for lane in range(count):
        unit[0, lane] = scale[first + lane, owner]
        unit[2, lane] = shift[first + lane, owner]
    for lane in range(count, LANES):
        unit[0, lane], unit[2, lane] = ZERO, ZERO
    for lane in range(LANES):
        unit[1, lane] = ONE / unit[0, lane] if unit[0, lane] != ZERO else ZERO


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def round_even(
    wanted: Float32, unit: Float32, lowest: Single, highest: Single, found: Indices, values: Float32
) -> None:
    """Nearest of consecutive integers, ties to even, for every lane."""
    for lane in range(LANES):
        level = (wanted[lane] - unit[2, lane]) * unit[1, lane]
        level = np.rint(min(max(level, lowest), highest))
        found[lane] = np.int16(level - lowest)
        values[lane] = unit[0, lane] * level + unit[2, lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def round_uneven(
    wanted: Float32, unit: Float32, middles: Float32, levels: Float32, own: Any, found: Indices, values: Float32
) -> None:
    """Nearest of any ascending levels; `own` are the first row and the number of rows with levels of their own."""
    first, count = own
    many = middles.shape[1] > 32
    for lane in range(LANES):
        row = first + lane if lane < count else 0
        level = (wanted[lane] - unit[2, lane]) * unit[1, lane]
        place = 0
        if many:
            place = np.searchsorted(middles[row], level)
        else:
            for middle in middles[row]:
                place += level > middle
        found[lane] = np.int16(place)
        values[lane] = unit[0, lane] * levels[row, place] + unit[2, lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def feed_back(
    weights: Float32,
    upper: Float32,
    lattice: Points,
    owners: npt.NDArray[np.int64],
    keep: npt.NDArray[np.bool_],
    results: tuple[Indices, Float32],
) -> None:
    """Round `weights` (rows, columns) to the lattice, column by column; they become the errors to be passed on.

    The error e of a column, divided by the diagonal of `upper` (columns, columns), is taken off the columns behind it
    in proportion to its row of `upper`. Column j takes scale and shift at `owners[j]`. `keep` (rows, columns), or
    empty: False where the value must be 0. `results`: places of the levels, and values, both (rows, columns).
    """
    rows, columns = weights.shape
    tile, values = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
    found, unit = np.empty((columns, LANES), np.int16), np.empty((3, LANES), np.float32)
    lowest, highest = lattice.levels[0, 0], lattice.levels[0, -1]
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        own = (first, count) if len(lattice.levels) > 1 else (0, 0)
        load(weights, first, count, tile)
        owner = -1
        for j in range(columns):
            if owners[j] != owner:
                owner = owners[j]
                gather(lattice.scale, lattice.shift, first, count, owner, unit)
            if lattice.uniform:
                round_even(tile[j], unit, lowest, highest, found[j], values[j])
            else:
                round_uneven(tile[j], unit, lattice.middles, lattice.levels, own, found[j], values[j])
            if keep.size:
                for lane in range(count):
                    if not keep[first + lane, j]:
                        values[j, lane] = ZERO
            inverse = ONE / upper[j, j]
            for lane in range(LANES):
                tile[j, lane] = (tile[j, lane] - values[j, lane]) * inverse
            for k in range(j + 1, columns):
                factor = upper[j, k]
                for lane in range(LANES):
                    tile[k, lane] -= factor * tile[j, lane]
        store(tile, first, count, weights)
        store(values, first, count, results[1])
        for lane in range(count):
            for j in range(columns):
                results[0][first + lane, j] = found[j, lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def descend(
    pull: Float32,
    hessian: Float32,
    lattice: Points,
    owners: npt.NDArray[np.int64],
    keep: npt.NDArray[np.bool_],
    results: tuple[Indices, Float32],
) -> None:
    """Choose every value of some columns anew, given all others: one sweep of exact coordinate descent.

    `pull` (rows, columns) is (target - values) @ Hessian of the whole row, at these columns; `hessian` (columns,
    columns) the Hessian among them. Values (`results[1]`) and places (`results[0]`) are updated; `pull` becomes the
    change of the values. The rest as in `feed_back`.
    """
    rows, columns = pull.shape
    tile, values = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
    found, unit = np.empty((columns, LANES), np.int16), np.empty((3, LANES), np.float32)
    wanted, chosen = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    lowest, highest = lattice.levels[0, 0], lattice.levels[0, -1]
    for first in range(0, rows, LANES):
        count = min(LANES, rows - first)
        own = (first, count) if len(lattice.levels) > 1 else (0, 0)
        load(pull, first, count, tile)
        load(results[1], first, count, values)
        owner = -1
        for j in range(columns):
            if owners[j] != owner:
                owner = owners[j]
                gather(lattice.scale, lattice.shift, first, count, owner, unit)
            inverse = ONE / hessian[j, j]
            for lane in range(LANES):
                wanted[lane] = values[j, lane] + tile[j, lane] * inverse
            if lattice.uniform:
                round_even(wanted, unit, lowest, highest, found[j], chosen)
            else:
                round_uneven(wanted, unit, lattice.middles, lattice.levels, own, found[j], chosen)
            if keep.size:
                for lane in range(count):
                    if not keep[first + lane, j]:
                        chosen[lane] = ZERO
            for lane in range(LANES):
                tile[j, lane] = chosen[lane] - values[j, lane]
                values[j, lane] = chosen[lane]
            for k in range(j + 1, columns):
                factor = hessian[j, k]
                for lane in range(LANES):
                    tile[k, lane] -= factor * tile[j, lane]
        store(tile, first, count, pull)
        store(values, first, count, results[1])
        for lane in range(count):
            for j in range(columns):
                results[0][first + lane, j] = found[j, lane]
