"""One chunk of super-blocks in scratch memory: its layout, how weights get there and how each error is weighted.

A chunk is one column of super-blocks over DEPTH consecutive rows, its sub-blocks side by side: lane = sub-block * DEPTH
+ row. `x[r, lane]` is weight r of a lane, `w[r, lane]` the weight of its squared error, so every loop over lanes is
contiguous and becomes SIMD code whatever the instruction set. What is known per lane or per row lies in ONE flat
float32 array at constant offsets: between many arrays LLVM would have to prove at run time that none overlaps another,
and gives up on vectorising.

Sums are never reassociated (that would make the result depend on the vector width); the other fast-math liberties are
safe because NaN and infinity never arise: weights are clipped to what the grid can hold, and divisions are guarded.
"""

import numpy as np
from numba import njit

from anyquant.grids.kernels import CACHE
from anyquant.grids.kquant_search import ABSOLUTE, IMPORTANCE, IMPORTANCE_SPREAD, LARGEST_HALF, SQUARE, SUPER, TINY

FAST = {"nnan", "ninf", "nsz", "contract"}

DEPTH = 16
LANES = 256  # at most: sixteen sub-blocks

# offsets in the scratch array, LANES values each; what belongs to a super-block is repeated in each of its lanes
LOW, HIGH, SUM_W, SUM_WX, BEST, SCALE, MINIMUM, INVERSE, SHIFT = (i * LANES for i in range(9))
SUM_L, SUM_LL, SUM_XL, SUM_R, SUM_RL, ERROR = (i * LANES for i in range(9, 15))
BEST_L, BEST_LL, INT_SCALE, INT_MINIMUM = (i * LANES for i in range(15, 19))
D, D_MINIMUM, TOP, TRIAL, LOSS, LEAST = (i * LANES for i in range(19, 25))
N_SS, N_SM, N_MM, R_S, R_M = (i * LANES for i in range(25, 30))
EXTREME, OLD, OLD_L, TRIAL_MINIMUM, BEST_XL = HIGH, LOW, SUM_R, ERROR, SUM_RL
SCRATCH = 30 * LANES

LARGE = np.float32(3e38)
ZERO = np.float32(0)
ONE = np.float32(1)
TWO = np.float32(2)
HALF_MAX = np.float32(LARGEST_HALF)
SMALLEST = np.float32(TINY)
HALF_LEAST = np.float32(2.0**-24)
HALF_NORMAL = np.float32(2.0**-14)
HALF_SPLIT = np.float32(2.0**13 + 1)
HALF_FLOOR = np.float32(0.75)  # adding and removing it rounds to a multiple of 2**-24, the spacing below HALF_NORMAL
MAGIC = np.float32(12582912.0)  # adding and removing 1.5 * 2**23 rounds to the nearest integer, ties to even


@njit(fastmath={"nnan", "ninf", "nsz"}, forceinline=True)
def half(value):  # type: ignore[no-untyped-def]
    """`value` rounded to float16, saturating (Veltkamp's splitting; `contract` would break it)."""
    spread = value * HALF_SPLIT
    normal = spread - (spread - value)
    tiny = (value + HALF_FLOOR) - HALF_FLOOR
    rounded = normal if abs(value) >= HALF_NORMAL else tiny
    return min(max(rounded, -HALF_MAX), HALF_MAX)


@njit(fastmath={"nnan", "ninf", "nsz"}, forceinline=True)
def half_step(value):  # type: ignore[no-untyped-def]
    """`value` rounded to float16, but to the smallest one instead of 0: a step of 0 would lose the super-block."""
    rounded = half(value)
    if value > ZERO:
        rounded = max(rounded, HALF_LEAST)
    elif value < ZERO:
        rounded = min(rounded, -HALF_LEAST)
    return rounded


@njit(fastmath=FAST, forceinline=True)
def nearest(value, lowest, highest):  # type: ignore[no-untyped-def]
    """The nearest integer within limits, kept in floating point."""
    return min(max((value + MAGIC) - MAGIC, lowest), highest)


@njit(fastmath=FAST, forceinline=True)
def ratio(numerator, denominator):  # type: ignore[no-untyped-def]
    """numerator / denominator, 0 where the denominator is not positive."""
    return numerator / denominator if denominator > ZERO else ZERO


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def load(weights, row, rows, column, limit, x):  # type: ignore[no-untyped-def]
    """Rows [row, row + rows) of the super-blocks that start at `column`, clipped to +-limit, tiny ones flushed."""
    width, lanes = x.shape
    for lane_row in range(rows):
        source = weights[row + lane_row, column : column + SUPER]
        for r in range(width):
            for block in range(lanes // DEPTH):
                x[r, block * DEPTH + lane_row] = source[block * width + r]
    for r in range(width):
        for block in range(lanes // DEPTH):
            for lane_row in range(rows, DEPTH):
                x[r, block * DEPTH + lane_row] = ZERO
    for r in range(width):
        for lane in range(lanes):
            value = min(max(x[r, lane], -limit), limit)
            x[r, lane] = value if abs(value) > SMALLEST else ZERO


@njit(fastmath=FAST, forceinline=True)
def share_sum(source, lanes, scratch):  # type: ignore[no-untyped-def]
    """Every lane of a super-block gets the sum over its lanes, added in halves."""
    reach = lanes // 2
    while reach >= DEPTH:
        for lane in range(reach):
            scratch[source + lane] += scratch[source + reach + lane]
        reach //= 2
    reach = DEPTH
    while reach < lanes:
        for lane in range(reach):
            scratch[source + reach + lane] = scratch[source + lane]
        reach *= 2


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def super_mean_square(x, scratch):  # type: ignore[no-untyped-def]
    """Mean of x^2 over each super-block, into every lane of ERROR."""
    width, lanes = x.shape
    for lane in range(lanes):
        scratch[ERROR + lane] = ZERO
    for r in range(width):
        for lane in range(lanes):
            scratch[ERROR + lane] += x[r, lane] * x[r, lane]
    share_sum(ERROR, lanes, scratch)
    for lane in range(lanes):
        scratch[ERROR + lane] /= np.float32(SUPER)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def weigh(kind, importance, column, factor, x, w, scratch):  # type: ignore[no-untyped-def]
    """Fill `w` with the weight of each squared error, as `kind` says."""
    width, lanes = x.shape
    if kind in (IMPORTANCE, IMPORTANCE_SPREAD):
        for r in range(width):
            for block in range(lanes // DEPTH):
                value = importance[column + block * width + r]
                for row in range(DEPTH):
                    w[r, block * DEPTH + row] = value
    if kind == IMPORTANCE_SPREAD:
        super_mean_square(x, scratch)
        for r in range(width):
            for lane in range(lanes):
                w[r, lane] *= np.sqrt(factor * scratch[ERROR + lane] + x[r, lane] * x[r, lane])
    elif kind == ABSOLUTE:
        for lane in range(lanes):
            scratch[ERROR + lane] = ZERO
        for r in range(width):
            for lane in range(lanes):
                scratch[ERROR + lane] += x[r, lane] * x[r, lane]
        for lane in range(lanes):
            scratch[ERROR + lane] = np.sqrt(scratch[ERROR + lane] / np.float32(width))
        for r in range(width):
            for lane in range(lanes):
                w[r, lane] = factor * scratch[ERROR + lane] + abs(x[r, lane])
    elif kind == SQUARE:
        super_mean_square(x, scratch)
        for r in range(width):
            for lane in range(lanes):
                w[r, lane] = factor * scratch[ERROR + lane] + x[r, lane] * x[r, lane]
