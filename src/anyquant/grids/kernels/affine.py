"""The search for scale and minimum of a group, values d * level + m: fast twin of `grids.scales.slow_pairs`.

Laid out as in `grids.kernels.symmetric`: lane = group, all that is known per lane in one flat array. `u` are weights
divided by the length of their group's range, counted from its middle by `load` (between -1/2 and 1/2), and then from
their weighted mean; sums are over levels counted from the level of that mean. A weight that matters ten thousand times
more than the others then adds little to the sums, and single precision is enough to tell what the others lose.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.symmetric import (
    FAST,
    HUGE,
    LANES,
    MAGIC,
    ONE,
    TINY,
    ZERO,
    Single,
    nearest,
    to_brain,
    to_half,
)

Limits = tuple[Single, bool]
Steps = tuple[Float32, Float32, Float32]

MIDDLE, RANGE, SUM_W, SUM_U, LEVELS, SHIFT = (LANES * i for i in range(6))
SUM_L, SUM_LL, SUM_UL, ERROR, BEST = (LANES * i for i in range(6, 11))
SCALE, OFFSET, CHOSEN_SCALE, CHOSEN_OFFSET, SPREAD, TEMPORARY = (LANES * i for i in range(11, 17))
TOP, BOTTOM, PIVOT, LEAST, BASE_SCALE, BASE_OFFSET = (LANES * i for i in range(17, 23))
SCRATCH = LANES * 23
QUARTER, HALF, TWO = np.float32(0.25), np.float32(0.5), np.float32(2)

LARGEST_COMMON = np.float32(65280)  # of bfloat16 numbers below float16's largest
LEAST_WHOLE = np.float32(2.0**-17)  # the least magnitude whose eight bits float16 holds
WIDEST = np.float32(1e38)  # the range of a group must stay finite; stored parameters saturate long before


@njit(forceinline=True, fastmath={"nnan", "nsz"}, error_model="numpy")
def to_common(value: Single) -> Single:
    """The nearest number that float16 and bfloat16 both hold, as float32, saturating."""
    kept = min(max(value, -LARGEST_COMMON), LARGEST_COMMON)
    tiny = (kept + np.float32(0.75)) - np.float32(0.75)  # an ulp of 0.75 in float32 is 2^-24, the least float16
    return to_brain(kept) if abs(kept) >= LEAST_WHOLE else tiny


@njit(forceinline=True, fastmath={"nnan", "nsz"}, error_model="numpy")
def to_stored(value: Single, half: bool) -> Single:
    """The value as the format stores it."""
    return to_half(value) if half else to_common(value)


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
        middle = HALF * top + HALF * bottom
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
def centre(u: Float32, w: Float32, s: Float32) -> None:
    """Count `u` from its weighted mean, which becomes MIDDLE; TOP and BOTTOM of the range as counted from there."""
    for lane in range(LANES):
        mean = s[SUM_U + lane] / (s[SUM_W + lane] if s[SUM_W + lane] > ZERO else HUGE)
        s[MIDDLE + lane] += mean * s[RANGE + lane]
        s[TOP + lane], s[BOTTOM + lane] = HALF - mean, -HALF - mean
        s[TEMPORARY + lane], s[SUM_U + lane] = mean, ZERO
    for r in range(u.shape[0]):
        for lane in range(LANES):
            u[r, lane] -= s[TEMPORARY + lane]
            s[SUM_U + lane] += w[r, lane] * u[r, lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def accumulate(u: Float32, w: Float32, high: Single, s: Float32) -> None:
    """SUM_L = sum w l, SUM_LL = sum w l^2, SUM_UL = sum w u l, where l = nearest(u * LEVELS + SHIFT) - PIVOT."""
    for lane in range(LANES):
        s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane] = ZERO, ZERO, ZERO
        s[PIVOT + lane] = nearest(s[SHIFT + lane], ZERO, high)
    for r in range(0, u.shape[0], 8):
        u8, w8 = u[r : r + 8], w[r : r + 8]
        for lane in range(LANES):
            levels, shift, pivot = s[LEVELS + lane], s[SHIFT + lane], MAGIC + s[PIVOT + lane]
            first, second, mixed = s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane]
            for i in range(8):
                level = (min(max(u8[i, lane] * levels + shift, ZERO), high) + MAGIC) - pivot
                product = level * w8[i, lane]
                first, second, mixed = first + product, second + product * level, mixed + product * u8[i, lane]
            s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane] = first, second, mixed


@njit(forceinline=True, fastmath=FAST, error_model="numpy")
def solve(lane: int, s: Float32) -> tuple[Single, Single]:
    """Least-squares scale and offset (of level 0) for the levels summed up; the mean where all levels are equal."""
    weight, mean = s[SUM_W + lane], s[SUM_U + lane]
    first, second, mixed = s[SUM_L + lane], s[SUM_LL + lane], s[SUM_UL + lane]
    determinant = weight * second - first * first
    regular = determinant > np.float32(1e-6) * weight * second
    below = determinant if regular else HUGE
    scale = (weight * mixed - mean * first) / below if regular else ZERO
    offset = (second * mean - first * mixed) / below if regular else mean / (weight if weight > ZERO else HUGE)
    return scale, offset - scale * s[PIVOT + lane]


@njit(forceinline=True, fastmath=FAST, error_model="numpy")
def take(lane: int, scale: Single, offset: Single, gain: Single, s: Float32) -> None:
    """SCALE, OFFSET = the given pair where it gains more than the BEST."""
    better = gain > s[BEST + lane]
    s[BEST + lane] = gain if better else s[BEST + lane]
    s[SCALE + lane] = scale if better else s[SCALE + lane]
    s[OFFSET + lane] = offset if better else s[OFFSET + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def refit(u: Float32, w: Float32, high: Single, s: Float32) -> None:
    """SCALE, OFFSET = the least-squares pair of the levels under LEVELS and SHIFT where it gains more than BEST."""
    accumulate(u, w, high, s)
    for lane in range(LANES):
        scale, offset = solve(lane, s)
        gain = scale * s[SUM_UL + lane] + (offset + scale * s[PIVOT + lane]) * s[SUM_U + lane]
        take(lane, scale, offset, gain, s)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def follow(u: Float32, w: Float32, path: Float32, high: Single, s: Float32) -> None:
    """SCALE, OFFSET = the best pair on a `path` of ranges, each of which begins where the best so far has level 0.

    The first of them is that from minimum to maximum, which a refitted pair has to beat.
    """
    for lane in range(LANES):
        s[SCALE + lane], s[OFFSET + lane] = ONE / high, s[BOTTOM + lane]
        s[LEVELS + lane], s[SHIFT + lane] = high, -high * s[BOTTOM + lane]
    accumulate(u, w, high, s)
    for lane in range(LANES):
        scale = s[SCALE + lane]
        offset = s[OFFSET + lane] + scale * s[PIVOT + lane]
        gain = scale * (TWO * (s[SUM_UL + lane] - offset * s[SUM_L + lane]) - scale * s[SUM_LL + lane])
        s[BEST + lane] = gain + offset * (TWO * s[SUM_U + lane] - offset * s[SUM_W + lane])
    for step in range(path.size):
        for lane in range(LANES):
            bottom = min(s[OFFSET + lane], s[TOP + lane] - QUARTER)
            s[LEVELS + lane] = (high + path[step]) / (s[TOP + lane] - bottom)
            s[SHIFT + lane] = -bottom * s[LEVELS + lane]
        refit(u, w, high, s)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def climb(u: Float32, w: Float32, ladder: Float32, high: Single, s: Float32) -> None:
    """SCALE, OFFSET = the least-squares pair of the candidate (levels per range, shift) in `ladder` that gains most."""
    for lane in range(LANES):
        s[BEST + lane], s[SCALE + lane], s[OFFSET + lane] = -HUGE, ZERO, ZERO
    for step in range(ladder.shape[0]):
        for lane in range(LANES):
            s[LEVELS + lane] = ladder[step, 0]
            s[SHIFT + lane] = ladder[step, 1] - ladder[step, 0] * (s[BOTTOM + lane] + HALF)
        refit(u, w, high, s)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def store(fitted: bool, half: bool, s: Float32) -> None:
    """Round SCALE and OFFSET to what scale and minimum are stored as: float16 (`half`), or what all 16-bit types hold.

    A `fitted` line passes through the mean of weights and levels; it is turned about it when the scale is rounded.
    """
    for lane in range(LANES):
        unit, middle, scale = s[RANGE + lane], s[MIDDLE + lane], s[SCALE + lane]
        s[SCALE + lane] = to_stored(scale * unit, half) / unit
        turn = s[SCALE + lane] / scale if fitted and scale != ZERO else ONE
        s[OFFSET + lane] = (to_stored(middle + s[OFFSET + lane] * turn * unit, half) - middle) / unit


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
def settle(u: Float32, w: Float32, limits: Limits, rounds: int, s: Float32) -> None:
    """CHOSEN_* = the stored SCALE and OFFSET, or those refitted and stored again, where they leave the LEAST error.

    No `rounds` of refitting: SCALE and OFFSET are not a fit, and stored as they are.
    """
    high, half = limits
    for _ in range(rounds + 1):
        store(rounds > 0, half, s)
        measure(u, w, high, s)
        for lane in range(LANES):
            better = s[ERROR + lane] < s[LEAST + lane]
            s[LEAST + lane] = s[ERROR + lane] if better else s[LEAST + lane]
            s[CHOSEN_SCALE + lane] = s[SCALE + lane] if better else s[CHOSEN_SCALE + lane]
            s[CHOSEN_OFFSET + lane] = s[OFFSET + lane] if better else s[CHOSEN_OFFSET + lane]
            s[SCALE + lane], s[OFFSET + lane] = solve(lane, s)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def vary(u: Float32, w: Float32, changes: Float32, limits: Limits, s: Float32) -> None:
    """CHOSEN_* = a pair near the one chosen so far, where it leaves less error.

    `changes` (n, 2): the factor of the scale, about the mean of the weights, and levels by which the minimum moves.
    """
    for lane in range(LANES):
        s[BASE_SCALE + lane], s[BASE_OFFSET + lane] = s[CHOSEN_SCALE + lane], s[CHOSEN_OFFSET + lane]
    for step in range(changes.shape[0]):
        for lane in range(LANES):
            scale = s[BASE_SCALE + lane] * changes[step, 0]
            s[SCALE + lane] = scale
            s[OFFSET + lane] = s[BASE_OFFSET + lane] * changes[step, 0] + scale * changes[step, 1]
        settle(u, w, limits, 0, s)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def improve(u: Float32, w: Float32, trials: Steps, limits: Limits, s: Float32) -> None:
    """CHOSEN_* = the best pair found for each lane, from the path, the ladder, or minimum to maximum; then varied."""
    path, ladder, changes = trials
    high = limits[0]
    for lane in range(LANES):
        s[LEAST + lane], s[CHOSEN_SCALE + lane], s[CHOSEN_OFFSET + lane] = HUGE, ZERO, ZERO
    if path.size:
        follow(u, w, path, high, s)
        settle(u, w, limits, 2, s)
    climb(u, w, ladder, high, s)
    settle(u, w, limits, 2, s)
    for lane in range(LANES):
        s[SCALE + lane], s[OFFSET + lane] = ONE / high, s[BOTTOM + lane]
    settle(u, w, limits, 0, s)
    vary(u, w, changes, limits, s)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def search(
    weights: Float32,
    importance: Float32,
    trials: Steps,
    limits: Limits,
    spread: Float32,
    scales: Float32,
    minima: Float32,
) -> None:
    """`scales` and `minima` of all groups of `weights`, all flat; levels are 0..high of `limits`.

    `trials`: path, ladder (candidates, 2), levels per range and the level of the middle, and changes of what they find.
    `limits`: the highest level, and whether parameters are stored as float16, else as
    numbers that float16 and bfloat16 both hold. `importance` and
    `spread` as in `grids.kernels.symmetric.search`.
    """
    size, period = importance.shape[0], importance.shape[1] - LANES
    half = limits[1]
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
        centre(u, w, s)
        improve(u, w, trials, limits, s)
        for lane in range(count):
            scales[first + lane] = to_stored(s[CHOSEN_SCALE + lane] * s[RANGE + lane], half)
            minima[first + lane] = to_stored(s[MIDDLE + lane] + s[CHOSEN_OFFSET + lane] * s[RANGE + lane], half)


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
