"""The search for one scale per group, values scale * level of a table of sixteen levels between -1 and 1.

Laid out as in `grids.kernels.symmetric`: lane = group, all that is known per lane in one flat array. `table` (31,)
holds the sixteen levels in ascending order, then the fifteen middles between them. Scales are float32 and positive.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.symmetric import (
    CHOSEN,
    ERROR,
    FAST,
    GAIN,
    HUGE,
    LANES,
    LEAST,
    LEVEL_SCALE,
    ONE,
    SCRATCH,
    SUM_L,
    SUM_X,
    TRIED,
    UNIT,
    ZERO,
    load,
    weigh,
)

Single = Any  # one float32: mypy knows no type that is both NumPy's scalar and what its arithmetic gives
LEVELS = 16
FEW = 8  # columns that are not worth a slice per row


@njit(forceinline=True, error_model="numpy")
def level_of(value: Single, table: Float32) -> Single:
    """The nearest level, of two equally near the lower one."""
    level = table[0]
    for step in range(LEVELS - 1):
        upper = table[step + 1]  # loaded in any case: a load under a condition would not become vector code
        level = upper if value > table[LEVELS + step] else level
    return level


@njit(forceinline=True, error_model="numpy")
def place_of(value: Single, table: Float32) -> Any:
    """The place of `level_of` in the table."""
    place = np.int32(0)
    for step in range(LEVELS - 1):
        place += np.int32(1) if value > table[LEVELS + step] else np.int32(0)
    return place


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def accumulate(u: Float32, w: Float32, table: Float32, s: Float32) -> None:
    """SUM_X = sum w u l and SUM_L = sum w l^2 under the scale LEVEL_SCALE of levels per unit."""
    for lane in range(LANES):
        s[SUM_X + lane], s[SUM_L + lane] = ZERO, ZERO
    for r in range(u.shape[0]):
        own, weight = u[r], w[r]
        for lane in range(LANES):
            level = level_of(own[lane] * s[LEVEL_SCALE + lane], table)
            product = level * weight[lane]
            s[SUM_X + lane] += product * own[lane]
            s[SUM_L + lane] += product * level


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def measure(u: Float32, w: Float32, table: Float32, s: Float32) -> None:
    """ERROR = sum w (u - TRIED l)^2 with the nearest levels, and SUM_X, SUM_L of those levels."""
    for lane in range(LANES):
        s[LEVEL_SCALE + lane] = ONE / (s[TRIED + lane] if s[TRIED + lane] != ZERO else HUGE)
        s[ERROR + lane], s[SUM_X + lane], s[SUM_L + lane] = ZERO, ZERO, ZERO
    for r in range(u.shape[0]):
        own, weight = u[r], w[r]
        for lane in range(LANES):
            level = level_of(own[lane] * s[LEVEL_SCALE + lane], table)
            product = level * weight[lane]
            difference = own[lane] - s[TRIED + lane] * level
            s[SUM_X + lane] += product * own[lane]
            s[SUM_L + lane] += product * level
            s[ERROR + lane] += weight[lane] * difference * difference


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def improve(u: Float32, w: Float32, table: Float32, ladder: Float32, s: Float32) -> None:
    """CHOSEN = the best scale of each lane, per unit: the ladder's best by least squares, that refitted, or 1.

    `ladder` are candidates of levels per unit; the gain (sum w u l)^2 / sum w l^2 is the error that least squares
    removes.
    """
    for lane in range(LANES):
        s[GAIN + lane], s[TRIED + lane] = ZERO, ZERO
        s[LEAST + lane], s[CHOSEN + lane] = HUGE, ZERO
    for step in range(ladder.size):
        for lane in range(LANES):
            s[LEVEL_SCALE + lane] = ladder[step]
        accumulate(u, w, table, s)
        for lane in range(LANES):
            scale = s[SUM_X + lane] / (s[SUM_L + lane] if s[SUM_L + lane] > ZERO else HUGE)
            gain = scale * s[SUM_X + lane]
            better = gain > s[GAIN + lane]
            s[GAIN + lane] = gain if better else s[GAIN + lane]
            s[TRIED + lane] = scale if better else s[TRIED + lane]
    for attempt in range(3):
        measure(u, w, table, s)
        for lane in range(LANES):
            better = s[ERROR + lane] < s[LEAST + lane]
            s[LEAST + lane] = s[ERROR + lane] if better else s[LEAST + lane]
            s[CHOSEN + lane] = s[TRIED + lane] if better else s[CHOSEN + lane]
            refitted = s[SUM_X + lane] / (s[SUM_L + lane] if s[SUM_L + lane] > ZERO else HUGE)
            s[TRIED + lane] = ONE if attempt == 1 else refitted


@njit(nogil=True, cache=CACHE, error_model="numpy")
def search(weights: Float32, importance: Float32, table: Float32, ladder: Float32, scales: Float32) -> None:
    """`scales` of all groups of `weights`, both flat; `importance` as in `symmetric.search`."""
    size, period = importance.shape[0], importance.shape[1] - LANES
    s = np.zeros(SCRATCH, np.float32)
    u, w = np.zeros((size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    for first in range(0, scales.size, LANES):
        count = min(LANES, scales.size - first)
        load(weights[first * size : (first + count) * size], count, False, u, s)
        start = first % period
        weigh(importance[:, start : start + LANES], False, u, w, s)
        improve(u, w, table, ladder, s)
        for lane in range(count):
            scales[first + lane] = s[CHOSEN + lane] * s[UNIT + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def errors(weights: Float32, importance: Float32, table: Float32, scales: Float32, out: Float32) -> None:
    """Weighted squared error of every group under `scales`, all flat, in units of the group's largest magnitude."""
    size, period = importance.shape[0], importance.shape[1] - LANES
    s = np.zeros(SCRATCH, np.float32)
    u, w = np.zeros((size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    for first in range(0, scales.size, LANES):
        count = min(LANES, scales.size - first)
        load(weights[first * size : (first + count) * size], count, False, u, s)
        start = first % period
        weigh(importance[:, start : start + LANES], False, u, w, s)
        for lane in range(count):
            s[TRIED + lane] = scales[first + lane] / s[UNIT + lane]
        measure(u, w, table, s)
        for lane in range(count):
            out[first + lane] = s[ERROR + lane]


@njit(nogil=True, cache=CACHE, error_model="numpy")
def encode(
    weights: Float32,
    scale: Float32,
    reach: tuple[int, int],
    table: Float32,
    order: npt.NDArray[np.uint8],
    codes: npt.NDArray[np.uint8],
) -> None:
    """codes = `order` at the level nearest to weights / scale, that of 0 where the scale is 0.

    `weights` (rows, columns) begin `reach[0]` columns into the first group of `reach[1]`; `scale` (rows, groups).
    """
    rows, columns = weights.shape
    first, width = reach
    if columns <= FEW:
        for row in range(rows):
            for j in range(columns):
                unit = scale[row, (first + j) // width]
                codes[row, j] = order[place_of(weights[row, j] / unit if unit != ZERO else ZERO, table)]
        return
    places = np.empty(width, np.int32)
    for row in range(rows):
        start, group = 0, 0
        while start < columns:
            stop = min(columns, (group + 1) * width - first)
            unit = scale[row, group]
            source, target = weights[row, start:stop], codes[row, start:stop]
            inside = places[: stop - start]
            for j in range(stop - start):
                inside[j] = place_of(source[j] / unit if unit != ZERO else ZERO, table)
            for j in range(stop - start):
                target[j] = order[inside[j]]
            start, group = stop, group + 1
