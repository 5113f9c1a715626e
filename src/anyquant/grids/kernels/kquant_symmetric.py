"""Kernel of the K-quants without a minimum (Q3_K, Q6_K): value = d * scale * level, level in -highest .. highest - 1.

The stages are those of kquant_affine, with one unknown less: per sub-block a search over trial scales, each rounding
judged by its weighted least-squares scale; per super-block the float16 step d by trials; then rounds of refinement on
the stored values. Scales are signed: the range has one level more on the negative side, and uses it.
"""

import numpy as np
from numba import njit

from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.kquant_chunk import (
    BEST,
    BEST_LL,
    DEPTH,
    EXTREME,
    FAST,
    HALF_MAX,
    INT_SCALE,
    INVERSE,
    LANES,
    LARGE,
    LEAST,
    LOSS,
    N_SS,
    OLD,
    ONE,
    R_S,
    SCALE,
    SCRATCH,
    SUM_LL,
    SUM_XL,
    TOP,
    TRIAL,
    TWO,
    ZERO,
    D,
    half,
    half_step,
    load,
    nearest,
    ratio,
    share_sum,
    weigh,
)
from anyquant.grids.kquant_search import SUPER

WIDTH = 16


@njit(fastmath=FAST, forceinline=True)
def reciprocal(value):  # type: ignore[no-untyped-def]
    """1 / value, 0 for 0."""
    return ONE / value if value != ZERO else ZERO


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def summarize(x, scratch):  # type: ignore[no-untyped-def]
    """The weight of largest magnitude of each lane."""
    for lane in range(LANES):
        scratch[EXTREME + lane] = ZERO
        scratch[SCALE + lane] = ZERO
        scratch[BEST + lane] = ZERO
        scratch[BEST_LL + lane] = ZERO
    for r in range(WIDTH):
        for lane in range(LANES):
            larger = abs(x[r, lane]) > abs(scratch[EXTREME + lane])
            scratch[EXTREME + lane] = x[r, lane] if larger else scratch[EXTREME + lane]


@njit(fastmath=FAST, forceinline=True)
def eight(x, w, first, lane, inverse, highest, sum_ll, sum_xl):  # type: ignore[no-untyped-def]
    for r in range(8):
        value = x[first + r, lane]
        level = nearest(value * inverse, -highest, highest - ONE)
        weighted = w[first + r, lane] * level
        sum_ll += weighted * level
        sum_xl += weighted * value
    return sum_ll, sum_xl


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def search(steps, highest, x, w, scratch):  # type: ignore[no-untyped-def]
    for step in steps:
        for lane in range(LANES):
            inverse = -(highest + step) * reciprocal(scratch[EXTREME + lane])
            sum_ll, sum_xl = eight(x, w, 0, lane, inverse, highest, ZERO, ZERO)
            sum_ll, sum_xl = eight(x, w, 8, lane, inverse, highest, sum_ll, sum_xl)
            scale = ratio(sum_xl, sum_ll)
            explained = scale * sum_xl
            better = explained > scratch[BEST + lane]
            scratch[BEST + lane] = explained if better else scratch[BEST + lane]
            scratch[SCALE + lane] = scale if better else scratch[SCALE + lane]
            scratch[BEST_LL + lane] = sum_ll if better else scratch[BEST_LL + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def settle(trials, most, depth, scratch):  # type: ignore[no-untyped-def]
    """Float16 d per super-block so that integers -most .. most - 1 times it are near the ideal scales; the integers.

    `depth` is DEPTH: passed in, so that LLVM turns the loops over rows into SIMD code instead of unrolling them.
    """
    for row in range(depth):
        scratch[TOP + row] = ZERO
        scratch[LEAST + row] = LARGE
        scratch[D + row] = ZERO
    for block in range(LANES // DEPTH):
        for row in range(depth):
            scale = scratch[SCALE + block * DEPTH + row]
            scratch[TOP + row] = scale if abs(scale) > abs(scratch[TOP + row]) else scratch[TOP + row]
    for row in range(depth):
        scratch[INVERSE + row] = reciprocal(scratch[TOP + row])
    for trial in trials:
        span = -(most + trial)
        for row in range(depth):
            scratch[TRIAL + row] = half_step(scratch[TOP + row] / span)
            scratch[LOSS + row] = ZERO
        for block in range(LANES // DEPTH):
            for row in range(depth):
                wanted = scratch[SCALE + block * DEPTH + row]
                integer = nearest(wanted * (scratch[INVERSE + row] * span), -most, most - ONE)
                missed = wanted - scratch[TRIAL + row] * integer
                scratch[LOSS + row] += missed * missed * scratch[BEST_LL + block * DEPTH + row]
        for row in range(depth):
            better = scratch[LOSS + row] < scratch[LEAST + row]
            scratch[LEAST + row] = scratch[LOSS + row] if better else scratch[LEAST + row]
            scratch[D + row] = scratch[TRIAL + row] if better else scratch[D + row]
    for block in range(1, LANES // DEPTH):
        for row in range(depth):
            scratch[D + block * DEPTH + row] = scratch[D + row]
    for lane in range(LANES):
        integer = nearest(scratch[SCALE + lane] * reciprocal(scratch[D + lane]), -most, most - ONE)
        scratch[INT_SCALE + lane] = integer


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def neighbours(highest, most, x, w, scratch):  # type: ignore[no-untyped-def]
    """Per sub-block the stored scale, one more or one less: whichever leaves the least error once levels re-round."""
    for lane in range(LANES):
        scratch[BEST + lane] = -LARGE
        scratch[OLD + lane] = scratch[INT_SCALE + lane]
    for offset in range(-1, 2):
        for lane in range(LANES):
            integer = min(max(scratch[OLD + lane] + np.float32(offset), -most), most - ONE)
            scale = scratch[D + lane] * integer
            inverse = reciprocal(scale)
            sum_ll, sum_xl = eight(x, w, 0, lane, inverse, highest, ZERO, ZERO)
            sum_ll, sum_xl = eight(x, w, 8, lane, inverse, highest, sum_ll, sum_xl)
            explained = scale * (TWO * sum_xl - scale * sum_ll)
            better = explained > scratch[BEST + lane]
            scratch[BEST + lane] = explained if better else scratch[BEST + lane]
            scratch[INT_SCALE + lane] = integer if better else scratch[INT_SCALE + lane]
            scratch[SUM_LL + lane] = sum_ll if better else scratch[SUM_LL + lane]
            scratch[SUM_XL + lane] = sum_xl if better else scratch[SUM_XL + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def refit(scratch):  # type: ignore[no-untyped-def]
    """Least squares for d with levels and integers kept, rounded to float16, taken only if better."""
    for lane in range(LANES):
        integer = scratch[INT_SCALE + lane]
        scratch[N_SS + lane] = integer * integer * scratch[SUM_LL + lane]
        scratch[R_S + lane] = integer * scratch[SUM_XL + lane]
    share_sum(N_SS, LANES, scratch)
    share_sum(R_S, LANES, scratch)
    for lane in range(LANES):
        d, squares = scratch[D + lane], scratch[N_SS + lane]
        ideal = ratio(scratch[R_S + lane], squares)
        trial = half(ideal)
        scratch[D + lane] = trial if abs(trial - ideal) < abs(d - ideal) else d


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def emit(weights, row, rows, column, limit, highest, scratch, out, codes):  # type: ignore[no-untyped-def]
    """Write the stored parameters, and the nearest levels of the weights, row by row."""
    d_out, int_scale_out = out
    inverse = np.empty(SUPER, np.float32)
    for lane_row in range(rows):
        d_out[row + lane_row, column // SUPER] = scratch[D + lane_row]
        for block in range(LANES // DEPTH):
            lane = block * DEPTH + lane_row
            int_scale_out[row + lane_row, column // WIDTH + block] = np.int8(scratch[INT_SCALE + lane])
            per_level = reciprocal(scratch[D + lane] * scratch[INT_SCALE + lane])
            inverse[block * WIDTH : (block + 1) * WIDTH] = per_level
        source = weights[row + lane_row, column : column + SUPER]
        target = codes[row + lane_row, column : column + SUPER]
        for i in range(SUPER):
            value = min(max(source[i], -limit), limit)
            target[i] = np.uint8(np.int32(nearest(value * inverse[i], -highest, highest - ONE) + highest))


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def quantize(weights, importance, kind, factor, shape, steps, trials, rounds, out, codes):  # type: ignore[no-untyped-def]
    """Quantize a matrix whose columns are a multiple of 256. `shape` is (16, highest, most), `out` the arrays
    (d, scale); all float arguments are float32."""
    _, highest, most = shape
    highest, most = np.float32(highest), np.float32(most)
    limit = HALF_MAX * highest * most
    depth = DEPTH if len(trials) else 0
    x, w = np.empty((WIDTH, LANES), np.float32), np.empty((WIDTH, LANES), np.float32)
    scratch = np.zeros(SCRATCH, np.float32)
    for row in range(0, weights.shape[0], DEPTH):
        rows = min(DEPTH, weights.shape[0] - row)
        for column in range(0, weights.shape[1], SUPER):
            load(weights, row, rows, column, limit, x)
            weigh(kind, importance, column, factor, x, w, scratch)
            summarize(x, scratch)
            search(steps, highest, x, w, scratch)
            settle(trials, most, depth, scratch)
            for _ in range(rounds):
                neighbours(highest, most, x, w, scratch)
                refit(scratch)
            emit(weights, row, rows, column, limit, highest, scratch, out, codes)
