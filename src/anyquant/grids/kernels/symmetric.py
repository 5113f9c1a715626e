"""The search for one scale per group, values scale * level: fast twin of `grids.scales.slow_scales`.

Sixty-four groups are searched side by side: lane = group, `u[r, lane]` is weight r of a group divided by its largest
magnitude, `w[r, lane]` the weight of its squared error, so that every loop over lanes is contiguous and becomes vector
code whatever the instruction set. What is known per lane lies in ONE flat float32 array at constant offsets: between
several arrays LLVM would have to prove at run time that none overlaps another. Sums are never reassociated, so results
do not depend on the width of vectors (only on whether the processor fuses multiplication and addition).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import CACHE

Single = Any  # one float32: mypy knows no type that is both NumPy's scalar and what its arithmetic gives
Limits = tuple[Single, Single, Single, bool]

LANES = 64
UNIT, LEVEL_SCALE, SUM_X, SUM_L, GAIN, ERROR, LEAST, TRIED, CHOSEN, SPREAD = (LANES * i for i in range(10))
SCRATCH = LANES * 10

MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest even integer
ZERO, ONE = np.float32(0), np.float32(1)
TINY = np.float32(1e-30)
HUGE = np.float32(1e30)
LARGEST_HALF = np.float32(65504)
LARGEST_BRAIN = np.float32(2.0**100)  # far above any weight, and its split stays finite
SMALLEST_NORMAL_HALF = np.float32(2.0**-14)
FAST = {"contract", "nnan", "nsz"}


@njit(forceinline=True, fastmath={"nnan", "nsz"}, error_model="numpy")
def to_half(value: Single) -> Single:
    """The float16 nearest to a float32, as float32, saturating (Veltkamp's splitting, which fusing would break)."""
    kept = min(max(value, -LARGEST_HALF), LARGEST_HALF)
    split = kept * np.float32(8193)
    normal = split - (split - kept)
    tiny = (kept + np.float32(0.75)) - np.float32(0.75)  # an ulp of 0.75 in float32 is 2^-24
    return normal if abs(kept) >= SMALLEST_NORMAL_HALF else tiny


@njit(forceinline=True, fastmath={"nnan", "nsz"}, error_model="numpy")
def to_brain(value: Single) -> Single:
    """The bfloat16 nearest to a float32, as float32, saturating."""
    kept = min(max(value, -LARGEST_BRAIN), LARGEST_BRAIN)
    split = kept * np.float32(65537)
    return split - (split - kept)


@njit(forceinline=True, fastmath={"nnan", "nsz"}, error_model="numpy")
def to_stored(value: Single, half: bool) -> Single:
    """The value as the format stores it."""
    return to_half(value) if half else to_brain(value)


@njit(forceinline=True, fastmath=FAST, error_model="numpy")
def nearest(value: Single, low: Single, high: Single) -> Single:
    """The nearest integer within limits, kept in floating point."""
    return (min(max(value, low), high) + MAGIC) - MAGIC


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def load(weights: Float32, count: int, signed: bool, u: Float32, s: Float32) -> None:
    """`count` groups of flat `weights` to lanes of `u`, divided by UNIT: the largest magnitude, `signed` or not.

    Of two equal magnitudes the positive one counts. A group of zeros gets a huge unit.
    """
    size = u.shape[0]
    for lane in range(count):
        source = weights[lane * size : (lane + 1) * size]
        for r in range(size):
            u[r, lane] = source[r]
    for lane in range(LANES):
        s[GAIN + lane], s[ERROR + lane] = ZERO, ZERO
    for r in range(size):
        for lane in range(LANES):
            value = u[r, lane]
            s[GAIN + lane] = value if value > s[GAIN + lane] else s[GAIN + lane]
            s[ERROR + lane] = value if value < s[ERROR + lane] else s[ERROR + lane]
    for lane in range(LANES):
        top, bottom = s[GAIN + lane], s[ERROR + lane]
        unit = top if top >= -bottom else bottom
        unit = unit if signed else abs(unit)
        s[UNIT + lane] = unit if abs(unit) > TINY else HUGE
        s[SUM_X + lane] = ONE / s[UNIT + lane]
    for r in range(size):
        for lane in range(LANES):
            u[r, lane] *= s[SUM_X + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def weigh(importance: Float32, spread: bool, u: Float32, w: Float32, s: Float32) -> None:
    """w = importance * sqrt(SPREAD + u^2), or importance alone; `importance` (size, lanes or more)."""
    for r in range(u.shape[0]):
        some = importance[r]
        if spread:
            for lane in range(LANES):
                w[r, lane] = some[lane] * np.sqrt(s[SPREAD + lane] + u[r, lane] * u[r, lane])
        else:
            for lane in range(LANES):
                w[r, lane] = some[lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def accumulate(u: Float32, w: Float32, low: Single, high: Single, s: Float32) -> None:
    """SUM_X = sum w u l and SUM_L = sum w l^2 under the scale LEVEL_SCALE of levels per unit, eight rows per step."""
    for lane in range(LANES):
        s[SUM_X + lane], s[SUM_L + lane] = ZERO, ZERO
    for r in range(0, u.shape[0], 8):
        u8, w8 = u[r : r + 8], w[r : r + 8]
        for lane in range(LANES):
            inverse = s[LEVEL_SCALE + lane]
            mixed, square = s[SUM_X + lane], s[SUM_L + lane]
            for i in range(8):
                level = nearest(u8[i, lane] * inverse, low, high)
                product = level * w8[i, lane]
                mixed, square = mixed + product * u8[i, lane], square + product * level
            s[SUM_X + lane], s[SUM_L + lane] = mixed, square


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def climb(u: Float32, w: Float32, ladder: Float32, low: Single, high: Single, s: Float32) -> None:
    """TRIED = the least-squares scale, per unit, of the candidate in `ladder` (levels per unit) that gains most.

    The gain (sum w u l)^2 / sum w l^2 is the weighted squared error that the least-squares scale removes.
    """
    for lane in range(LANES):
        s[GAIN + lane], s[TRIED + lane] = ZERO, ZERO
    for step in range(ladder.size):
        for lane in range(LANES):
            s[LEVEL_SCALE + lane] = ladder[step]
        accumulate(u, w, low, high, s)
        for lane in range(LANES):
            scale = s[SUM_X + lane] / (s[SUM_L + lane] if s[SUM_L + lane] > ZERO else HUGE)
            gain = scale * s[SUM_X + lane]
            better = gain > s[GAIN + lane]
            s[GAIN + lane] = gain if better else s[GAIN + lane]
            s[TRIED + lane] = scale if better else s[TRIED + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def measure(u: Float32, w: Float32, low: Single, high: Single, s: Float32) -> None:
    """ERROR = sum w (u - TRIED l)^2 with the nearest levels, and SUM_X, SUM_L of those levels."""
    for lane in range(LANES):
        s[LEVEL_SCALE + lane] = ONE / (s[TRIED + lane] if s[TRIED + lane] != ZERO else HUGE)
        s[ERROR + lane] = ZERO
    accumulate(u, w, low, high, s)
    for r in range(u.shape[0]):
        for lane in range(LANES):
            level = nearest(u[r, lane] * s[LEVEL_SCALE + lane], low, high)
            difference = u[r, lane] - s[TRIED + lane] * level
            s[ERROR + lane] += w[r, lane] * difference * difference


@njit(nogil=True, cache=CACHE, error_model="numpy")
def store(half: bool, s: Float32) -> None:
    """Round TRIED, times UNIT, to what the format stores."""
    for lane in range(LANES):
        s[TRIED + lane] = to_stored(s[TRIED + lane] * s[UNIT + lane], half) / s[UNIT + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def improve(u: Float32, w: Float32, ladder: Float32, limits: Limits, s: Float32) -> None:
    """CHOSEN = the best scale found for each lane, per unit: the ladder's best, that refitted, or plain rounding.

    `limits` = (lowest level, highest level, levels per unit of plain rounding, stored as float16).
    """
    low, high, plain, half = limits
    climb(u, w, ladder, low, high, s)
    for lane in range(LANES):
        s[LEAST + lane], s[CHOSEN + lane] = HUGE, ZERO
    for attempt in range(3):
        store(half, s)
        measure(u, w, low, high, s)
        for lane in range(LANES):
            better = s[ERROR + lane] < s[LEAST + lane]
            s[LEAST + lane] = s[ERROR + lane] if better else s[LEAST + lane]
            s[CHOSEN + lane] = s[TRIED + lane] if better else s[CHOSEN + lane]
            refitted = s[SUM_X + lane] / (s[SUM_L + lane] if s[SUM_L + lane] > ZERO else HUGE)
            s[TRIED + lane] = ONE / plain if attempt == 1 else refitted


@njit(nogil=True, cache=CACHE, error_model="numpy")
def search(
    weights: Float32,
    importance: Float32,
    ladder: Float32,
    limits: Limits,
    signed: bool,
    spread: Float32,
    scales: Float32,
) -> None:
    """`scales` of all groups of `weights`, both flat.

    `importance` (size, groups of a row + 64): of weight r in group g of a row, repeated cyclically beyond the row's
    end; none may be zero for a whole group. `signed`: a negative scale is allowed. `spread` (rows,): weigh by
    importance * sqrt(spread + w^2); empty: by importance alone.
    """
    size, period = importance.shape[0], importance.shape[1] - LANES
    s = np.zeros(SCRATCH, np.float32)
    u, w = np.zeros((size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    for first in range(0, scales.size, LANES):
        count = min(LANES, scales.size - first)
        load(weights[first * size : (first + count) * size], count, signed, u, s)
        if spread.size:
            for lane in range(count):
                unit = s[UNIT + lane]
                s[SPREAD + lane] = min(spread[(first + lane) // period] / unit / unit, HUGE)
        start = first % period
        weigh(importance[:, start : start + LANES], spread.size > 0, u, w, s)
        improve(u, w, ladder, limits, s)
        for lane in range(count):
            scales[first + lane] = to_stored(s[CHOSEN + lane] * s[UNIT + lane], limits[3])


@njit(nogil=True, cache=CACHE, fastmath={"nnan", "nsz"}, error_model="numpy")
def largest_magnitudes(weights: Float32, out: Float32) -> None:
    """max |w| of every group, both flat. Exact: the flags only allow vectors."""
    size = weights.size // out.size
    for group in range(out.size):
        source = weights[group * size : (group + 1) * size]
        largest = ZERO
        for j in range(size):
            magnitude = abs(source[j])
            largest = magnitude if magnitude > largest else largest
        out[group] = largest


@njit(nogil=True, cache=CACHE, fastmath={"contract"}, error_model="numpy")
def mean_squares(weights: Float32, out: Float32) -> None:
    """Mean of w^2 of every row of `weights` (rows, in), in multiples of 16, summed up in a fixed order."""
    columns = weights.shape[1]
    for row in range(out.size):
        total = 0.0
        for first in range(0, columns, 16):
            x = weights[row, first : first + 16]
            even, odd = ZERO, ZERO
            for j in range(0, 16, 2):
                even += x[j] * x[j]
                odd += x[j + 1] * x[j + 1]
            total += np.float64(even) + np.float64(odd)
        out[row] = np.float32(total / columns)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def encode(
    weights: Float32, scales: Float32, low: Single, high: Single, zero: Single, codes: npt.NDArray[np.int8]
) -> None:
    """codes = clamp(rint(w / scale)) + zero, all flat; `codes` int8 or uint8, one scale per group."""
    size = weights.size // scales.size
    for group in range(scales.size):
        scale = scales[group]
        inverse = ONE / scale if scale != ZERO else ZERO
        source, target = weights[group * size : (group + 1) * size], codes[group * size : (group + 1) * size]
        for j in range(size):
            level = (min(max(source[j] * inverse, low), high) + MAGIC) - MAGIC
            target[j] = np.int32(level + zero)
