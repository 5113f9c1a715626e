"""Kernel of the K-quants with a minimum (Q2_K, Q4_K, Q5_K): value = d * scale * level - d_minimum * minimum.

Three stages per chunk (see kquant_chunk for its layout):

1. `search`: per sub-block, round with a range of trial scales; for each rounding the weighted least-squares scale and
   minimum in closed form; keep what explains most. The minimum found so far is the one the next trial rounds with.
2. `settle`: per super-block, d and d_minimum by trials, then the small integers. The minimum is chosen after the
   scale, so that it makes up for the scale's rounding.
3. rounds of refinement on the stored values: re-round the levels, move the integers of each sub-block, solve the
   2 x 2 least squares for (d, d_minimum), round to float16; each step is taken only when the error falls.

Sums are over levels counted from the middle of their range (`centre`): the 2 x 2 systems are then well conditioned, and
rounding noise does not decide between trials that are nearly equal (from 0, it cost 0.5 % of error at 5 bits).
"""

import numpy as np
from numba import njit

from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.kquant_chunk import (
    BEST,
    BEST_L,
    BEST_LL,
    BEST_XL,
    D_MINIMUM,
    DEPTH,
    ERROR,
    FAST,
    HALF_MAX,
    HIGH,
    INT_MINIMUM,
    INT_SCALE,
    INVERSE,
    LARGE,
    LEAST,
    LOSS,
    LOW,
    MAGIC,
    MINIMUM,
    N_MM,
    N_SM,
    N_SS,
    OLD,
    OLD_L,
    ONE,
    R_M,
    R_S,
    SCALE,
    SCRATCH,
    SHIFT,
    SUM_L,
    SUM_LL,
    SUM_W,
    SUM_WX,
    SUM_XL,
    TOP,
    TRIAL,
    TRIAL_MINIMUM,
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

SINGULAR = np.float32(1e-6)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def summarize(highest, x, w, scratch):  # type: ignore[no-untyped-def]
    """Range, sum of weights and weighted sum of each lane; the search starts from the whole range."""
    width, lanes = x.shape
    for lane in range(lanes):
        scratch[LOW + lane] = ZERO
        scratch[HIGH + lane] = x[0, lane]
        scratch[SUM_W + lane] = ZERO
        scratch[SUM_WX + lane] = ZERO
    for r in range(width):
        for lane in range(lanes):
            scratch[LOW + lane] = min(scratch[LOW + lane], x[r, lane])
            scratch[HIGH + lane] = max(scratch[HIGH + lane], x[r, lane])
            scratch[SUM_W + lane] += w[r, lane]
            scratch[SUM_WX + lane] += w[r, lane] * x[r, lane]
    for lane in range(lanes):
        scratch[SCALE + lane] = (scratch[HIGH + lane] - scratch[LOW + lane]) / highest
        scratch[MINIMUM + lane] = scratch[LOW + lane]
        scratch[BEST + lane] = ZERO
        scratch[BEST_L + lane] = ZERO
        scratch[BEST_LL + lane] = ZERO


@njit(fastmath=FAST, forceinline=True)
def middle(highest):  # type: ignore[no-untyped-def]
    """The level that sums count from; highest is 2^n - 1."""
    return (highest + ONE) / TWO


@njit(fastmath=FAST, forceinline=True)
def eight(x, w, first, lane, minimum, inverse, highest, sums):  # type: ignore[no-untyped-def]
    sum_l, sum_ll, sum_xl = sums
    centre = middle(highest)
    for r in range(8):
        value = x[first + r, lane]
        level = ((value - minimum) * inverse + MAGIC) - (MAGIC + centre)
        level = min(max(level, -centre), highest - centre)
        weighted = w[first + r, lane] * level
        sum_l += weighted
        sum_ll += weighted * level
        sum_xl += weighted * value
    return sum_l, sum_ll, sum_xl


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def search(steps, highest, x, w, scratch):  # type: ignore[no-untyped-def]
    width, lanes = x.shape
    centre = middle(highest)
    for step in steps:
        for lane in range(lanes):
            scratch[INVERSE + lane] = ratio(highest + step, scratch[HIGH + lane] - scratch[MINIMUM + lane])
            scratch[SUM_L + lane] = ZERO
            scratch[SUM_LL + lane] = ZERO
            scratch[SUM_XL + lane] = ZERO
        for part in range(width // 16):
            for lane in range(lanes):
                inverse, minimum = scratch[INVERSE + lane], scratch[MINIMUM + lane]
                sums = scratch[SUM_L + lane], scratch[SUM_LL + lane], scratch[SUM_XL + lane]
                sums = eight(x, w, 16 * part, lane, minimum, inverse, highest, sums)
                sums = eight(x, w, 16 * part + 8, lane, minimum, inverse, highest, sums)
                scratch[SUM_L + lane], scratch[SUM_LL + lane], scratch[SUM_XL + lane] = sums
        for lane in range(lanes):
            sum_l, sum_ll, sum_xl = scratch[SUM_L + lane], scratch[SUM_LL + lane], scratch[SUM_XL + lane]
            total, moment = scratch[SUM_W + lane], scratch[SUM_WX + lane]
            determinant = total * sum_ll - sum_l * sum_l
            inverse = ratio(ONE, determinant)
            scale = (total * sum_xl - moment * sum_l) * inverse
            offset = (sum_ll * moment - sum_l * sum_xl) * inverse
            bounded = offset > scale * centre or determinant < SINGULAR * total * sum_ll
            through_zero = ratio(sum_xl + centre * moment, sum_ll + centre * (TWO * sum_l + centre * total))
            scale = through_zero if bounded else scale
            offset = scale * centre if bounded else offset
            minimum = offset - scale * centre
            explained = scale * (TWO * (sum_xl - offset * sum_l) - scale * sum_ll)
            explained += offset * (TWO * moment - offset * total)
            better = explained > scratch[BEST + lane]
            scratch[BEST + lane] = explained if better else scratch[BEST + lane]
            scratch[SCALE + lane] = scale if better else scratch[SCALE + lane]
            scratch[MINIMUM + lane] = minimum if better else scratch[MINIMUM + lane]
            scratch[BEST_L + lane] = sum_l if better else scratch[BEST_L + lane]
            scratch[BEST_LL + lane] = sum_ll if better else scratch[BEST_LL + lane]


@njit(fastmath=FAST, forceinline=True, error_model="numpy")
def step_by_trial(source, metric, target, trials, most, depth, lanes, scratch):  # type: ignore[no-untyped-def]
    """Float16 step per super-block so that integers 0..most times it are near the lanes of `source`."""
    for row in range(depth):
        scratch[TOP + row] = ZERO
        scratch[LEAST + row] = LARGE
        scratch[target + row] = ZERO
    for block in range(lanes // DEPTH):
        for row in range(depth):
            scratch[TOP + row] = max(scratch[TOP + row], scratch[source + block * DEPTH + row])
    for row in range(depth):
        scratch[INVERSE + row] = ratio(ONE, scratch[TOP + row])
    for trial in trials:
        span = most + trial
        for row in range(depth):
            scratch[TRIAL + row] = half_step(scratch[TOP + row] / span)
            scratch[LOSS + row] = ZERO
        for block in range(lanes // DEPTH):
            for row in range(depth):
                wanted = scratch[source + block * DEPTH + row]
                integer = nearest(wanted * (scratch[INVERSE + row] * span), ZERO, most)
                missed = wanted - scratch[TRIAL + row] * integer
                scratch[LOSS + row] += missed * missed * scratch[metric + block * DEPTH + row]
        for row in range(depth):
            better = scratch[LOSS + row] < scratch[LEAST + row]
            scratch[LEAST + row] = scratch[LOSS + row] if better else scratch[LEAST + row]
            scratch[target + row] = scratch[TRIAL + row] if better else scratch[target + row]
    for block in range(1, lanes // DEPTH):
        for row in range(depth):
            scratch[target + block * DEPTH + row] = scratch[target + row]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def settle(trials, highest, most, depth, lanes, scratch):  # type: ignore[no-untyped-def]
    """Stored parameters from the ideal ones; what rounding the scale costs, once the minimum has adapted, is
    (change of scale)^2 * (sum w l^2 - (sum w l)^2 / sum w)."""
    for lane in range(lanes):
        mean = ratio(scratch[BEST_L + lane], scratch[SUM_W + lane])
        scratch[ERROR + lane] = max(scratch[BEST_LL + lane] - mean * scratch[BEST_L + lane], ZERO)
    step_by_trial(SCALE, ERROR, D, trials, most, depth, lanes, scratch)
    for lane in range(lanes):
        wanted = scratch[SCALE + lane]
        integer = nearest(ratio(wanted, scratch[D + lane]), ZERO, most)
        mean = middle(highest) + ratio(scratch[BEST_L + lane], scratch[SUM_W + lane])
        change = (scratch[D + lane] * integer - wanted) * mean
        scratch[INT_SCALE + lane] = integer
        scratch[SHIFT + lane] = max(change - scratch[MINIMUM + lane], ZERO)
    step_by_trial(SHIFT, SUM_W, D_MINIMUM, trials, most, depth, lanes, scratch)
    for lane in range(lanes):
        integer = nearest(ratio(scratch[SHIFT + lane], scratch[D_MINIMUM + lane]), ZERO, most)
        scratch[INT_MINIMUM + lane] = integer


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def evaluate(highest, x, w, scratch):  # type: ignore[no-untyped-def]
    """Round every weight with (TRIAL, TRIAL_MINIMUM); keep those integers, and the sums, where they explain more."""
    width, lanes = x.shape
    centre = middle(highest)
    for lane in range(lanes):
        scratch[SCALE + lane] = scratch[D + lane] * scratch[TRIAL + lane]
        scratch[SHIFT + lane] = scratch[D_MINIMUM + lane] * scratch[TRIAL_MINIMUM + lane]
        scratch[INVERSE + lane] = ratio(ONE, scratch[SCALE + lane])
        scratch[SUM_L + lane], scratch[SUM_LL + lane], scratch[SUM_XL + lane] = ZERO, ZERO, ZERO
    for part in range(width // 16):
        for lane in range(lanes):
            inverse, minimum = scratch[INVERSE + lane], -scratch[SHIFT + lane]
            sums = scratch[SUM_L + lane], scratch[SUM_LL + lane], scratch[SUM_XL + lane]
            sums = eight(x, w, 16 * part, lane, minimum, inverse, highest, sums)
            sums = eight(x, w, 16 * part + 8, lane, minimum, inverse, highest, sums)
            scratch[SUM_L + lane], scratch[SUM_LL + lane], scratch[SUM_XL + lane] = sums
    for lane in range(lanes):
        scale, shift = scratch[SCALE + lane], scratch[SHIFT + lane]
        sum_l, sum_ll, sum_xl = scratch[SUM_L + lane], scratch[SUM_LL + lane], scratch[SUM_XL + lane]
        offset = scale * centre - shift
        explained = scale * (TWO * (sum_xl - offset * sum_l) - scale * sum_ll)
        explained += offset * (TWO * scratch[SUM_WX + lane] - offset * scratch[SUM_W + lane])
        better = explained > scratch[BEST + lane]
        scratch[BEST + lane] = explained if better else scratch[BEST + lane]
        scratch[INT_SCALE + lane] = scratch[TRIAL + lane] if better else scratch[INT_SCALE + lane]
        scratch[INT_MINIMUM + lane] = scratch[TRIAL_MINIMUM + lane] if better else scratch[INT_MINIMUM + lane]
        scratch[BEST_L + lane] = sum_l if better else scratch[BEST_L + lane]
        scratch[BEST_LL + lane] = sum_ll if better else scratch[BEST_LL + lane]
        scratch[BEST_XL + lane] = sum_xl if better else scratch[BEST_XL + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def neighbours(highest, most, x, w, scratch):  # type: ignore[no-untyped-def]
    """Per sub-block the stored pair, or the scale one more, one less or the same with the minimum that suits it."""
    lanes = x.shape[1]
    for lane in range(lanes):
        scratch[BEST + lane] = -LARGE
        scratch[OLD + lane] = scratch[INT_SCALE + lane]
        scratch[TRIAL + lane] = scratch[INT_SCALE + lane]
        scratch[TRIAL_MINIMUM + lane] = scratch[INT_MINIMUM + lane]
    evaluate(highest, x, w, scratch)
    for lane in range(lanes):
        scratch[OLD_L + lane] = scratch[BEST_L + lane]
    for change in range(-1, 2):
        for lane in range(lanes):
            integer = min(max(scratch[OLD + lane] + np.float32(change), ZERO), most)
            scale = scratch[D + lane] * integer
            offset = ratio(scratch[SUM_WX + lane] - scale * scratch[OLD_L + lane], scratch[SUM_W + lane])
            shift = scale * middle(highest) - offset
            scratch[TRIAL + lane] = integer
            scratch[TRIAL_MINIMUM + lane] = nearest(ratio(shift, scratch[D_MINIMUM + lane]), ZERO, most)
        evaluate(highest, x, w, scratch)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def refit(highest, lanes, scratch):  # type: ignore[no-untyped-def]
    """Least squares for (d, d_minimum) with levels and integers kept, rounded to float16, taken only if better."""
    centre = middle(highest)
    for lane in range(lanes):
        integer, minimum = scratch[INT_SCALE + lane], scratch[INT_MINIMUM + lane]
        total, sum_l, sum_ll = scratch[SUM_W + lane], scratch[BEST_L + lane], scratch[BEST_LL + lane]
        scale = scratch[D + lane] * integer
        offset = scale * centre - scratch[D_MINIMUM + lane] * minimum
        left = scratch[SUM_WX + lane] - scale * sum_l - offset * total
        left_l = scratch[BEST_XL + lane] - scale * sum_ll - offset * sum_l + centre * left
        scratch[N_SS + lane] = integer * integer * (sum_ll + centre * (TWO * sum_l + centre * total))
        scratch[N_SM + lane] = -integer * minimum * (sum_l + centre * total)
        scratch[N_MM + lane] = minimum * minimum * total
        scratch[R_S + lane] = integer * left_l
        scratch[R_M + lane] = -minimum * left
    share_sum(N_SS, lanes, scratch)
    share_sum(N_SM, lanes, scratch)
    share_sum(N_MM, lanes, scratch)
    share_sum(R_S, lanes, scratch)
    share_sum(R_M, lanes, scratch)
    for lane in range(lanes):
        ss, sm, mm = scratch[N_SS + lane], scratch[N_SM + lane], scratch[N_MM + lane]
        right_s, right_m = scratch[R_S + lane], scratch[R_M + lane]
        determinant = ss * mm - sm * sm
        regular = determinant > SINGULAR * ss * mm
        inverse = ratio(ONE, determinant)
        up = (mm * right_s - sm * right_m) * inverse if regular else ratio(right_s, ss)
        down = (ss * right_m - sm * right_s) * inverse if regular else ZERO
        d, d_minimum = scratch[D + lane], scratch[D_MINIMUM + lane]
        new_d, new_minimum = half(max(d + up, ZERO)), half(max(d_minimum + down, ZERO))
        up, down = new_d - d, new_minimum - d_minimum
        change = up * (ss * up + TWO * (sm * down - right_s)) + down * (mm * down - TWO * right_m)
        better = change < ZERO
        scratch[D + lane] = new_d if better else d
        scratch[D_MINIMUM + lane] = new_minimum if better else d_minimum


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def emit(weights, row, rows, column, width, limit, highest, scratch, out, codes):  # type: ignore[no-untyped-def]
    """Write the stored parameters, and the nearest levels of the weights, row by row."""
    d_out, minimum_out, int_scale_out, int_minimum_out = out
    inverse, shift = np.empty(SUPER, np.float32), np.empty(SUPER, np.float32)
    for lane_row in range(rows):
        d_out[row + lane_row, column // SUPER] = scratch[D + lane_row]
        minimum_out[row + lane_row, column // SUPER] = scratch[D_MINIMUM + lane_row]
        for block in range(SUPER // width):
            lane = block * DEPTH + lane_row
            int_scale_out[row + lane_row, column // width + block] = np.uint8(scratch[INT_SCALE + lane])
            int_minimum_out[row + lane_row, column // width + block] = np.uint8(scratch[INT_MINIMUM + lane])
            per_level = ratio(ONE, scratch[D + lane] * scratch[INT_SCALE + lane])
            lowest = scratch[D_MINIMUM + lane] * scratch[INT_MINIMUM + lane]
            inverse[block * width : (block + 1) * width] = per_level
            shift[block * width : (block + 1) * width] = lowest
        source = weights[row + lane_row, column : column + SUPER]
        target = codes[row + lane_row, column : column + SUPER]
        for i in range(SUPER):
            value = min(max(source[i], -limit), limit)
            target[i] = np.uint8(np.int32(nearest((value + shift[i]) * inverse[i], ZERO, highest)))


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def quantize(weights, importance, kind, factor, shape, steps, trials, rounds, out, codes):  # type: ignore[no-untyped-def]
    """Quantize a matrix whose columns are a multiple of 256. `shape` is (width, highest level, largest integer),
    `out` the arrays (d, d_minimum, scale, minimum); all float arguments are float32."""
    width, highest, most = shape
    highest, most = np.float32(highest), np.float32(most)
    limit = HALF_MAX * highest * most
    lanes = SUPER // width * DEPTH
    x, w = np.empty((width, lanes), np.float32), np.empty((width, lanes), np.float32)
    scratch = np.zeros(SCRATCH, np.float32)
    for row in range(0, weights.shape[0], DEPTH):
        rows = min(DEPTH, weights.shape[0] - row)
        for column in range(0, weights.shape[1], SUPER):
            load(weights, row, rows, column, limit, x)
            weigh(kind, importance, column, factor, x, w, scratch)
            summarize(highest, x, w, scratch)
            search(steps, highest, x, w, scratch)
            settle(trials, highest, most, DEPTH if len(trials) else 0, lanes, scratch)
            for _ in range(rounds):
                neighbours(highest, most, x, w, scratch)
                refit(highest, lanes, scratch)
            emit(weights, row, rows, column, width, limit, highest, scratch, out, codes)
