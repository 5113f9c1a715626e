"""The search for scale and minimum of a group, values d * level + m: fast twin of `grids.scales.slow_pairs`.

Laid out as in `grids.kernels.symmetric`: lane = group, all that is known per lane in one flat array. `u` are weights
from the middle of their group's range, divided by its length: between -1/2 and 1/2.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.symmetric import FAST, HUGE, LANES, MAGIC, ONE, TINY, ZERO, Single, nearest, to_half

MIDDLE, RANGE, SUM_W, SUM_U, LEVELS, SHIFT = (LANES * i for i in range(6))
SUM_L, SUM_LL, SUM_UL, ERROR, BEST = (LANES * i for i in range(6, 11))
SCALE, OFFSET, CHOSEN_SCALE, CHOSEN_OFFSET, SPREAD, TEMPORARY = (LANES * i for i in range(11, 17))
SCRATCH = LANES * 17

WIDEST = np.float32(1e38)  # the range of a group must stay finite; float16 parameters saturate long before


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def load(weights: Float32, count: int, u: Float32, s: Float32) -> None:
    """`count` groups of flat `weights` to lanes of `u`, with their MIDDLE and RANGE.

    A constant group has u = 0, whatever its range is taken to be.
    """
    size = u.shape[0]
    for lane in range(count):
        source = weights[lane * size : (lane + 1) * size]
        for r in range(size):
            u[r, lane] = min(max(source[r], -WIDEST), WIDEST)
    first = u[0]
    for lane in range(LANES):
        s[SCALE + lane], s[OFFSET + lane] = first[lane], first[lane]
    for r in range(size):
        for lane in range(LANES):
            value = u[r, lane]
            s[SCALE + lane] = value if value > s[SCALE + lane] else s[SCALE + lane]
            s[OFFSET + lane] = value if value < s[OFFSET + lane] else s[OFFSET + lane]
    for lane in range(LANES):
        top, bottom = s[SCALE + lane], s[OFFSET + lane]
        middle = np.float32(0.5) * top + np.float32(0.5) * bottom
        constant = abs(middle) if abs(middle) > TINY else HUGE
        s[MIDDLE + lane] = middle
        s[RANGE + lane] = top - bottom if top - bottom > TINY else constant
        s[TEMPORARY + lane] = ONE / s[RANGE + lane]
    for r in range(size):
        for lane in range(LANES):
            u[r, lane] = (u[r, lane] - s[MIDDLE + lane]) * s[TEMPORARY + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def weigh(importance: Float32, spread: bool, u: Float32, w: Float32, s: Float32) -> None:
    """w = importance * sqrt(SPREAD + (weight / range)^2), or importance alone; SUM_W and SUM_U under it."""
    for lane in range(LANES):
        s[SUM_W + lane], s[SUM_U + lane] = ZERO, ZERO
        s[TEMPORARY + lane] = s[MIDDLE + lane] / s[RANGE + lane]
    for r in range(u.shape[0]):
        some = importance[r]
        if spread:
            for lane in range(LANES):
                value = u[r, lane] + s[TEMPORARY + lane]
                w[r, lane] = some[lane] * np.sqrt(s[SPREAD + lane] + value * value)
        else:
            for lane in range(LANES):
                w[r, lane] = some[lane]
    for r in range(u.shape[0]):
        for lane in range(LANES):
            s[SUM_W + lane] += w[r, lane]
            s[SUM_U + lane] += w[r, lane] * u[r, lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def accumulate(u: Float32, w: Float32, high: Single, s: Float32) -> None:
    """SUM_L = sum w l, SUM_LL = sum w l^2, SUM_UL = sum w u l, where l = nearest(u * LEVELS + SHIFT)."""
    for lane in range(LANES):
        s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane] = ZERO, ZERO, ZERO
    for r in range(0, u.shape[0], 8):
        u8, w8 = u[r : r + 8], w[r : r + 8]
        for lane in range(LANES):
            levels, shift = s[LEVELS + lane], s[SHIFT + lane]
            first, second, mixed = s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane]
            for i in range(8):
                level = nearest(u8[i, lane] * levels + shift, ZERO, high)
                product = level * w8[i, lane]
                first, second, mixed = first + product, second + product * level, mixed + product * u8[i, lane]
            s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane] = first, second, mixed


@njit(forceinline=True, fastmath=FAST, error_model="numpy")
def solve(lane: int, s: Float32) -> tuple[Single, Single]:
    """Least-squares scale and offset for the levels summed up; the mean where all levels are equal."""
    weight, mean = s[SUM_W + lane], s[SUM_U + lane]
    first, second, mixed = s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane]
    determinant = weight * second - first * first
    regular = determinant > np.float32(1e-6) * weight * second
    below = determinant if regular else HUGE
    scale = (weight * mixed - mean * first) / below if regular else ZERO
    offset = (second * mean - first * mixed) / below if regular else mean / (weight if weight > ZERO else HUGE)
    return scale, offset


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def climb(u: Float32, w: Float32, ladder: Float32, high: Single, s: Float32) -> None:
    """SCALE, OFFSET = the least-squares pair of the candidate (levels per range, shift) in `ladder` that gains most."""
    for lane in range(LANES):
        s[BEST + lane], s[SCALE + lane], s[OFFSET + lane] = -HUGE, ZERO, ZERO
    for step in range(ladder.shape[0]):
        for lane in range(LANES):
            s[LEVELS + lane], s[SHIFT + lane] = ladder[step, 0], ladder[step, 1]
        accumulate(u, w, high, s)
        for lane in range(LANES):
            scale, offset = solve(lane, s)
            gain = scale * s[SUM_UL + lane] + offset * s[SUM_U + lane]
            better = gain > s[BEST + lane]
            s[BEST + lane] = gain if better else s[BEST + lane]
            s[SCALE + lane] = scale if better else s[SCALE + lane]
            s[OFFSET + lane] = offset if better else s[OFFSET + lane]


@njit(nogil=True, cache=CACHE, error_model="numpy")
def store(s: Float32) -> None:
    """Round SCALE and OFFSET to what float16 d and m can hold."""
    for lane in range(LANES):
        unit, middle = s[RANGE + lane], s[MIDDLE + lane]
        s[OFFSET + lane] = (to_half(middle + s[OFFSET + lane] * unit) - middle) / unit
        s[SCALE + lane] = to_half(s[SCALE + lane] * unit) / unit


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def measure(u: Float32, w: Float32, high: Single, s: Float32) -> None:
    """ERROR = sum w (u - SCALE l - OFFSET)^2 with the nearest levels, and the sums over those levels."""
    for lane in range(LANES):
        scale = s[SCALE + lane]
        s[LEVELS + lane] = ONE / scale if scale != ZERO else ZERO
        s[SHIFT + lane] = -s[OFFSET + lane] * s[LEVELS + lane]
        s[ERROR + lane] = ZERO
    accumulate(u, w, high, s)
    for r in range(u.shape[0]):
        for lane in range(LANES):
            level = nearest(u[r, lane] * s[LEVELS + lane] + s[SHIFT + lane], ZERO, high)
            difference = u[r, lane] - s[SCALE + lane] * level - s[OFFSET + lane]
            s[ERROR + lane] += w[r, lane] * difference * difference


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def improve(u: Float32, w: Float32, ladder: Float32, high: Single, s: Float32) -> None:
    """CHOSEN_* = the best pair found for each lane: the ladder's best, that refitted twice, or minimum to maximum."""
    climb(u, w, ladder, high, s)
    for lane in range(LANES):
        s[BEST + lane], s[CHOSEN_SCALE + lane], s[CHOSEN_OFFSET + lane] = HUGE, ZERO, ZERO
    for attempt in range(4):
        store(s)
        measure(u, w, high, s)
        for lane in range(LANES):
            better = s[ERROR + lane] < s[BEST + lane]
            s[BEST + lane] = s[ERROR + lane] if better else s[BEST + lane]
            s[CHOSEN_SCALE + lane] = s[SCALE + lane] if better else s[CHOSEN_SCALE + lane]
            s[CHOSEN_OFFSET + lane] = s[OFFSET + lane] if better else s[CHOSEN_OFFSET + lane]
            scale, offset = solve(lane, s)
            s[SCALE + lane] = ONE / high if attempt == 2 else scale
            s[OFFSET + lane] = np.float32(-0.5) if attempt == 2 else offset


@njit(nogil=True, cache=CACHE, error_model="numpy")
def search(
    weights: Float32,
    importance: Float32,
    ladder: Float32,
    high: Single,
    spread: Float32,
    scales: Float32,
    minima: Float32,
) -> None:
    """`scales` and `minima` of all groups of `weights`, all flat; levels are 0..`high`.

    `ladder` (candidates, 2): levels per range and the level of the middle. `importance` and `spread` as in
    `grids.kernels.symmetric.search`.
    """
    size, period = importance.shape[0], importance.shape[1] - LANES
    s = np.zeros(SCRATCH, np.float32)
    u, w = np.zeros((size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    for first in range(0, scales.size, LANES):
        count = min(LANES, scales.size - first)
        load(weights[first * size : (first + count) * size], count, u, s)
        if spread.size:
            for lane in range(count):
                unit = s[RANGE + lane]
                s[SPREAD + lane] = min(spread[(first + lane) // period] / unit / unit, HUGE)
        start = first % period
        weigh(importance[:, start : start + LANES], spread.size > 0, u, w, s)
        improve(u, w, ladder, high, s)
        for lane in range(count):
            scales[first + lane] = to_half(s[CHOSEN_SCALE + lane] * s[RANGE + lane])
            minima[first + lane] = to_half(s[MIDDLE + lane] + s[CHOSEN_OFFSET + lane] * s[RANGE + lane])


@njit(nogil=True, cache=CACHE, error_model="numpy")
def encode(weights: Float32, scales: Float32, minima: Float32, high: Single, codes: npt.NDArray[np.uint8]) -> None:
    """codes = clamp(rint((w - minimum) / scale), 0, high), all flat; `codes` uint8, one scale per group."""
    size = weights.size // scales.size
    for group in range(scales.size):
        scale, minimum = scales[group], minima[group]
        inverse = ONE / scale if scale != ZERO else ZERO
        source, target = weights[group * size : (group + 1) * size], codes[group * size : (group + 1) * size]
        for j in range(size):
            level = (min(max((source[j] - minimum) * inverse, ZERO), high) + MAGIC) - MAGIC
            target[j] = np.int32(level)
