"""The search for scale and integer zero-point of a group, values scale * (level - zero), levels 0 to `high`.

Laid out as in `grids.kernels.symmetric`: lane = group, all that is known per lane in one flat array. Symmetric grids
are the case of one fixed zero-point. A `wide` group (a row, a matrix) takes all lanes for itself: its weights lie
across them in as many chunks as it needs, and sums are over lanes and chunks too, so that every lane knows the same.
`u` are weights over their group's UNIT. Sums are over what a tried scale leaves, not over the weights: least squares
then only has to tell a correction of that scale, and single precision is enough for eight bits.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.symmetric import FAST, HUGE, LANES, ONE, TINY, ZERO, Single, nearest, to_brain

UNIT, TOP, BOTTOM, STEP, PIVOT, INVERSE = (LANES * i for i in range(6))
LEFT, MIXED, SQUARE, BEST, BEST_STEP, BEST_PIVOT = (LANES * i for i in range(6, 12))
LEAST, CHOSEN_STEP, CHOSEN_PIVOT, START_STEP, START_PIVOT = (LANES * i for i in range(12, 17))
SCRATCH = LANES * 17
Trials = tuple[Float32, Float32]
Grid = tuple[Single, Single, Single]
HALF = np.float32(0.5)
WIDEST = np.float32(1e38)  # the range of a group must stay finite
SMALLEST = np.float32(2.0**-126)  # of the scales: the first normal float32


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def lay_out(weights: Float32, count: int, u: Float32, s: Float32) -> None:
    """`count` groups of flat `weights` to lanes of `u` (size, lanes), and TOP and BOTTOM of each, 0 included."""
    size = u.shape[0]
    for lane in range(count):
        source = weights[lane * size : (lane + 1) * size]
        for r in range(size):
            u[r, lane] = min(max(source[r], -WIDEST), WIDEST)
    for lane in range(LANES):
        s[TOP + lane], s[BOTTOM + lane] = ZERO, ZERO
    limits(u, s)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def limits(u: Float32, s: Float32) -> None:
    """Widen TOP and BOTTOM of each lane to what lies in it."""
    for r in range(u.shape[0]):
        for lane in range(LANES):
            value = u[r, lane]
            s[TOP + lane] = value if value > s[TOP + lane] else s[TOP + lane]
            s[BOTTOM + lane] = value if value < s[BOTTOM + lane] else s[BOTTOM + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def spread(weights: Float32, u: Float32, s: Float32) -> None:
    """One group `weights` (chunks, size, lanes) to `u`, and its TOP and BOTTOM to every lane."""
    for lane in range(LANES):
        s[TOP + lane], s[BOTTOM + lane] = ZERO, ZERO
    for chunk in range(u.shape[0]):
        for r in range(u.shape[1]):
            for lane in range(LANES):
                u[chunk, r, lane] = min(max(weights[chunk, r, lane], -WIDEST), WIDEST)
        limits(u[chunk], s)
    top, bottom = ZERO, ZERO
    for lane in range(LANES):
        top, bottom = max(top, s[TOP + lane]), min(bottom, s[BOTTOM + lane])
    for lane in range(LANES):
        s[TOP + lane], s[BOTTOM + lane] = top, bottom


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def divide(symmetric: bool, u: Float32, s: Float32) -> None:
    """`u` (chunks, size, lanes), TOP and BOTTOM over UNIT: the largest magnitude where `symmetric`, else the range.

    A group of zeros gets a huge unit.
    """
    for lane in range(LANES):
        top, bottom = s[TOP + lane], s[BOTTOM + lane]
        unit = max(top, -bottom) if symmetric else top - bottom
        unit = unit if unit > TINY else HUGE
        s[UNIT + lane], s[INVERSE + lane] = unit, ONE / unit
        s[TOP + lane], s[BOTTOM + lane] = top / unit, bottom / unit
    for chunk in range(u.shape[0]):
        for r in range(u.shape[1]):
            for lane in range(LANES):
                u[chunk, r, lane] *= s[INVERSE + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def accumulate(u: Float32, w: Float32, high: Single, s: Float32) -> None:
    """LEFT = sum w e^2, MIXED = sum w e l, SQUARE = sum w l^2, e = u - STEP l, l = nearest level - PIVOT."""
    for lane in range(LANES):
        s[LEFT + lane], s[MIXED + lane], s[SQUARE + lane] = ZERO, ZERO, ZERO
    for r in range(0, u.shape[0], 8):
        u8, w8 = u[r : r + 8], w[r : r + 8]
        for lane in range(LANES):
            inverse, step, lowest, highest = s[INVERSE + lane], s[STEP + lane], -s[PIVOT + lane], high - s[PIVOT + lane]
            left, mixed, square = s[LEFT + lane], s[MIXED + lane], s[SQUARE + lane]
            for i in range(8):
                level = nearest(u8[i, lane] * inverse, lowest, highest)
                rest = u8[i, lane] - step * level
                weighted, product = w8[i, lane] * rest, w8[i, lane] * level
                left, mixed, square = left + weighted * rest, mixed + weighted * level, square + product * level
            s[LEFT + lane], s[MIXED + lane], s[SQUARE + lane] = left, mixed, square


@njit(nogil=True, cache=CACHE, error_model="numpy")
def sums(u: Float32, w: Float32, high: Single, wide: bool, s: Float32) -> None:
    """LEFT, MIXED and SQUARE under STEP and PIVOT, of lanes, or of all lanes together."""
    for lane in range(LANES):
        s[INVERSE + lane] = ONE / s[STEP + lane] if s[STEP + lane] > ZERO else ZERO
    left, mixed, square = 0.0, 0.0, 0.0
    for chunk in range(u.shape[0]):
        accumulate(u[chunk], w, high, s)
        if wide:
            for lane in range(LANES):
                left += s[LEFT + lane]
                mixed += s[MIXED + lane]
                square += s[SQUARE + lane]
    if wide:
        for lane in range(LANES):
            s[LEFT + lane], s[MIXED + lane], s[SQUARE + lane] = left, mixed, square


@njit(forceinline=True, fastmath=FAST, error_model="numpy")
def correction(lane: int, s: Float32) -> Single:
    """What least squares adds to STEP for the levels summed up."""
    return s[MIXED + lane] / (s[SQUARE + lane] if s[SQUARE + lane] > ZERO else HUGE)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def climb(u: Float32, w: Float32, ladder: Float32, high: Single, fixed: Single, wide: bool, s: Float32) -> None:
    """BEST_STEP, BEST_PIVOT = the refitted candidate that leaves least error.

    `ladder` (candidates, 2): levels per unit, and where the middle of the range lies, counted from the middle level.
    The zero-point is the integer nearest to what follows, or `fixed` where that is not negative.
    """
    for lane in range(LANES):
        s[BEST + lane], s[BEST_STEP + lane], s[BEST_PIVOT + lane] = HUGE, ZERO, ZERO
    for k in range(ladder.shape[0]):
        levels, shift = ladder[k, 0], ladder[k, 1] + HALF * (high - ladder[k, 0])
        for lane in range(LANES):
            s[STEP + lane] = ONE / levels
            free = nearest(shift - s[BOTTOM + lane] * levels, ZERO, high)
            s[PIVOT + lane] = free if fixed < ZERO else fixed
        sums(u, w, high, wide, s)
        keep(s)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def keep(s: Float32) -> None:
    """BEST_STEP, BEST_PIVOT = the candidate summed up, refitted, where it leaves less error than the BEST."""
    for lane in range(LANES):
        more = correction(lane, s)
        left = s[LEFT + lane] - more * s[MIXED + lane]
        better = left < s[BEST + lane]
        s[BEST + lane] = left if better else s[BEST + lane]
        s[BEST_STEP + lane] = s[STEP + lane] + more if better else s[BEST_STEP + lane]
        s[BEST_PIVOT + lane] = s[PIVOT + lane] if better else s[BEST_PIVOT + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def look_around(u: Float32, w: Float32, nearby: Float32, high: Single, wide: bool, s: Float32) -> None:
    """Try BEST_STEP and BEST_PIVOT changed as `nearby` (candidates, 2) says: factor of the one, term of the other."""
    for lane in range(LANES):
        s[START_STEP + lane], s[START_PIVOT + lane] = s[BEST_STEP + lane], s[BEST_PIVOT + lane]
    for k in range(nearby.shape[0]):
        factor, term = nearby[k, 0], nearby[k, 1]
        for lane in range(LANES):
            s[STEP + lane] = s[START_STEP + lane] * factor
            s[PIVOT + lane] = min(max(s[START_PIVOT + lane] + term, ZERO), high)
        sums(u, w, high, wide, s)
        keep(s)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def settle(u: Float32, w: Float32, high: Single, wide: bool, rounds: int, s: Float32) -> None:
    """CHOSEN_* = STEP, as it is stored, and PIVOT, or STEP refitted, where they leave the LEAST error."""
    for _ in range(rounds + 1):
        for lane in range(LANES):
            s[STEP + lane] = to_brain(s[STEP + lane] * s[UNIT + lane]) / s[UNIT + lane]
        sums(u, w, high, wide, s)
        for lane in range(LANES):
            better = s[LEFT + lane] < s[LEAST + lane]
            s[LEAST + lane] = s[LEFT + lane] if better else s[LEAST + lane]
            s[CHOSEN_STEP + lane] = s[STEP + lane] if better else s[CHOSEN_STEP + lane]
            s[CHOSEN_PIVOT + lane] = s[PIVOT + lane] if better else s[CHOSEN_PIVOT + lane]
            s[STEP + lane] += correction(lane, s)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def improve(u: Float32, w: Float32, trials: Trials, grid: Grid, wide: bool, s: Float32) -> None:
    """CHOSEN_* = the best found: the ladder's best, that refitted, its neighbours' zero-points, or plain rounding.

    `grid` = (highest level, fixed zero-point or -1, levels per unit of plain rounding).
    """
    high, fixed, plain = grid
    climb(u, w, trials[0], high, fixed, wide, s)
    look_around(u, w, trials[1], high, wide, s)
    for lane in range(LANES):
        s[LEAST + lane], s[CHOSEN_STEP + lane], s[CHOSEN_PIVOT + lane] = HUGE, ZERO, ZERO
        s[STEP + lane], s[PIVOT + lane] = s[BEST_STEP + lane], s[BEST_PIVOT + lane]
    settle(u, w, high, wide, 2, s)
    for lane in range(LANES):
        step = to_brain(s[UNIT + lane] / plain) / s[UNIT + lane]
        s[STEP + lane] = step
        free = nearest(-s[BOTTOM + lane] / (step if step > ZERO else ONE), ZERO, high)
        s[PIVOT + lane] = free if fixed < ZERO else fixed
    settle(u, w, high, wide, 0, s)


@njit(forceinline=True, error_model="numpy")
def stored_scale(lane: int, s: Float32) -> Single:
    """The chosen scale; 1 for a group of zeros, since a scale must be positive."""
    scale = to_brain(s[CHOSEN_STEP + lane] * s[UNIT + lane])
    if s[UNIT + lane] == HUGE or scale <= ZERO:
        return ONE
    return max(scale, SMALLEST)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def search(
    weights: Float32,
    importance: Float32,
    trials: Trials,
    grid: Grid,
    scales: Float32,
    zeros: Float32,
) -> None:
    """`scales` and `zeros` of all groups of `weights`, all flat; `importance` as in `grids.kernels.symmetric.search`.

    `grid` as in `improve`.
    """
    size, period = importance.shape[0], importance.shape[1] - LANES
    s = np.zeros(SCRATCH, np.float32)
    u, w = np.zeros((1, size, LANES), np.float32), np.zeros((size, LANES), np.float32)
    for first in range(0, scales.size, LANES):
        count = min(LANES, scales.size - first)
        lay_out(weights[first * size : (first + count) * size], count, u[0], s)
        divide(grid[1] >= ZERO, u, s)
        start = first % period
        w[:] = importance[:, start : start + LANES]
        improve(u, w, trials, grid, False, s)
        for lane in range(count):
            scales[first + lane] = stored_scale(lane, s)
            zeros[first + lane] = s[CHOSEN_PIVOT + lane]


@njit(nogil=True, cache=CACHE, error_model="numpy")
def search_wide(
    weights: Float32,
    importance: Float32,
    trials: Trials,
    grid: Grid,
    scales: Float32,
    zeros: Float32,
) -> None:
    """`scales` and `zeros` (groups,) of `weights` (groups, chunks, size, lanes), which all lie under `importance`
    (size, lanes). `size` is a multiple of 8; weights of importance 0 fill up. `grid` as in `improve`.
    """
    s = np.zeros(SCRATCH, np.float32)
    u = np.empty(weights.shape[1:], np.float32)
    for group in range(scales.size):
        spread(weights[group], u, s)
        divide(grid[1] >= ZERO, u, s)
        improve(u, importance, trials, grid, True, s)
        scales[group] = stored_scale(0, s)
        zeros[group] = s[CHOSEN_PIVOT]


@njit(nogil=True, cache=CACHE, fastmath={"nnan", "nsz"}, error_model="numpy")
def encode(
    weights: Float32, scales: Float32, zeros: Float32, high: Single, lowest: Single, codes: npt.NDArray[Any]
) -> None:
    """codes = clamp(rint(w / scale) + zero, 0, high) + `lowest`, of `weights` (rows, groups, width).

    `scales` and `zeros` (rows or 1, groups), `codes` as `weights`, int8 or uint8. A scale of 0 gives level 0.
    """
    step = 1 if scales.shape[0] == weights.shape[0] else 0
    for row in range(weights.shape[0]):
        for group in range(weights.shape[1]):
            scale, zero = scales[row * step, group], zeros[row * step, group]
            divisor = scale if scale != ZERO else HUGE
            source, target = weights[row, group], codes[row, group]
            for j in range(weights.shape[2]):
                target[j] = np.int32(nearest(source[j] / divisor, -zero, high - zero) + (zero + lowest))
