"""The same levels on another grid: what transcoding does instead of rounding again."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid
from anyquant.core.qtensor import QTensor

Int32 = npt.NDArray[np.int32]


def recoded(rows: QTensor, target: Grid) -> QTensor | None:
    """`rows` on `target` with the levels that they have, or None where the grid has no place for them.

    Codes are taken over; scales and shifts are rounded to what the target stores, and may be exactly what they were.
    Corrections and reordered columns are not taken over: then None, too.
    """
    if rows.grid.name == target.name:
        return rows
    if rows.corrections or rows.column_groups is not None or target.refuses(rows.shape) is not None:
        return None
    lattice = rows.grid.lattice(rows.params)
    if lattice is None or not lattice.uniform or lattice.levels.ndim > 1:
        return None
    order = np.argsort(lattice.codes)
    places = np.searchsorted(lattice.codes[order], rows.codes)
    levels = lattice.levels[order][places].astype(np.int32)
    high = (rows.shape[0], lattice.scale.shape[1])
    scale, shift = (np.broadcast_to(values, high).astype(np.float32) for values in (lattice.scale, lattice.shift))
    found = target.hold(levels, scale, shift)
    if found is None:
        return None
    params, codes = found
    return replace(rows, grid=target, codes=codes, params=params)


def regrouped(values: Float32, groups: int) -> Float32 | None:
    """Values by group (rows, n) for `groups` groups of the same rows; None where neighbours that become one differ."""
    have = values.shape[1]
    if groups % have == 0:
        return np.repeat(values, groups // have, axis=1)
    if have % groups:
        return None
    together = values.reshape(len(values), groups, -1)
    return together[:, :, 0].copy() if (together == together[:, :, :1]).all() else None


def without_shift(levels: Int32, scale: Float32, shift: Float32) -> tuple[Int32, Float32, Int32] | None:
    """(levels, scales of at least 0, zero-points) with value = scale * levels, from scale * level + shift.

    The levels are then counted from zero, and `zero-points` are the levels that zero had. None where a shift is no
    whole number of scales. All by group: `scale` and `shift` (rows, groups).
    """
    safe = np.where(scale == 0, np.float32(1), scale)
    zero = np.rint(-shift / safe)
    if not np.array_equal(zero * scale, -shift):
        return None
    apart = levels.reshape(len(levels), scale.shape[1], -1) - zero[:, :, None].astype(np.int32)
    sign = np.where(scale < 0, -1, 1).astype(np.int32)
    return (apart * sign[:, :, None]).reshape(levels.shape), np.abs(scale), (zero * sign).astype(np.int32)


def fitting_zero(levels: Int32, preferred: Int32, highest: int) -> Int32 | None:
    """For each group of `levels` (rows, groups, n) the zero-point nearest to the preferred one (rows, groups) under
    which all levels are codes from 0 to `highest`; None where a group spans more, or its zero were no code."""
    least = np.maximum(-levels.min(axis=2), 0)
    most = np.minimum(highest - levels.max(axis=2), highest)
    if (least > most).any():
        return None
    return np.clip(preferred, least, most)
