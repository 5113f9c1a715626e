"""Kernel of the I-quants with sixteen uneven levels (IQ4_NL, IQ4_XS): value = scale * level.

A chunk is LANES blocks of 32 weights, one per lane: `x[r, lane]` is weight r, `w[r, lane]` the weight of its squared
error, so every loop over lanes is contiguous and becomes SIMD code. With IQ4_XS eight lanes in a row share d. What is
known per lane lies in one flat float32 array at constant offsets, as in kquant_chunk, whose promises on floating point
hold here too.
"""

from itertools import pairwise

import numpy as np
from numba import njit

from anyquant.grids.iquant_search import LEVELS
from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.kquant_chunk import FAST, HALF_MAX, LARGE, MAGIC, ONE, SMALLEST, TWO, ZERO, half, half_step
from anyquant.grids.kquant_search import IMPORTANCE_SPREAD

BLOCK = 32
LANES = 64
SHARED = 8  # sub-blocks of IQ4_XS in a super-block
MOST = np.float32(32)  # the scales of IQ4_XS are -32 .. 31

EXTREME, INVERSE, SUM_XL, SUM_LL, BEST, SCALE, WEIGHT, D, INTEGER, OLD, BEST_XL, SPREAD = (i * LANES for i in range(12))
SCRATCH = 12 * LANES

LOWEST = np.float32(LEVELS[0])
RISES = tuple(np.float32(high - low) for low, high in pairwise(LEVELS))
TURNS = tuple(np.float32((high + low) / 2) for low, high in pairwise(LEVELS))


@njit(fastmath=FAST, forceinline=True)
def reciprocal(value):  # type: ignore[no-untyped-def]
    """1 / value, 0 for 0."""
    return ONE / value if value != ZERO else ZERO


@njit(fastmath=FAST, forceinline=True)
def level_of(value):  # type: ignore[no-untyped-def]
    """The level nearest to `value`; a chain of comparisons, which SIMD code runs faster than a table."""
    level = LOWEST
    level += RISES[0] if value >= TURNS[0] else ZERO
    level += RISES[1] if value >= TURNS[1] else ZERO
    level += RISES[2] if value >= TURNS[2] else ZERO
    level += RISES[3] if value >= TURNS[3] else ZERO
    level += RISES[4] if value >= TURNS[4] else ZERO
    level += RISES[5] if value >= TURNS[5] else ZERO
    level += RISES[6] if value >= TURNS[6] else ZERO
    level += RISES[7] if value >= TURNS[7] else ZERO
    level += RISES[8] if value >= TURNS[8] else ZERO
    level += RISES[9] if value >= TURNS[9] else ZERO
    level += RISES[10] if value >= TURNS[10] else ZERO
    level += RISES[11] if value >= TURNS[11] else ZERO
    level += RISES[12] if value >= TURNS[12] else ZERO
    level += RISES[13] if value >= TURNS[13] else ZERO
    level += RISES[14] if value >= TURNS[14] else ZERO
    return level


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def load(weights, importance, first, count, limit, x, w):  # type: ignore[no-untyped-def]
    """Blocks [first, first + count) of flat `weights`, clipped to +-limit, tiny ones flushed, and their importance."""
    period = importance.shape[0]
    for lane in range(count):
        source = weights[(first + lane) * BLOCK : (first + lane + 1) * BLOCK]
        steering = importance[(first + lane) % period]
        for r in range(BLOCK):
            value = min(max(source[r], -limit), limit)
            x[r, lane] = value if abs(value) > SMALLEST else ZERO
            w[r, lane] = steering[r]
    for r in range(BLOCK):
        for lane in range(count, LANES):
            x[r, lane], w[r, lane] = ZERO, ONE


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def weigh(kind, factor, shared, x, w, s):  # type: ignore[no-untyped-def]
    """Fill `w` with the weight of each squared error, means over `shared` lanes; find the largest weights."""
    for lane in range(LANES):
        s[SPREAD + lane], s[EXTREME + lane] = ZERO, ZERO
    for r in range(BLOCK):
        for lane in range(LANES):
            s[SPREAD + lane] += x[r, lane] * x[r, lane]
            larger = abs(x[r, lane]) > abs(s[EXTREME + lane])
            s[EXTREME + lane] = x[r, lane] if larger else s[EXTREME + lane]
    for first in range(0, LANES, shared):
        total = ZERO
        for lane in range(first, first + shared):
            total += s[SPREAD + lane]
        for lane in range(first, first + shared):
            s[SPREAD + lane] = factor * total / np.float32(shared * BLOCK)
    for r in range(BLOCK):
        if kind == IMPORTANCE_SPREAD:
            for lane in range(LANES):
                w[r, lane] *= np.sqrt(s[SPREAD + lane] + x[r, lane] * x[r, lane])
        else:
            for lane in range(LANES):
                w[r, lane] = s[SPREAD + lane] + x[r, lane] * x[r, lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def add_up(x, w, s):  # type: ignore[no-untyped-def]
    """SUM_XL = sum w x l and SUM_LL = sum w l^2 of the levels nearest to x * INVERSE."""
    for lane in range(LANES):
        s[SUM_XL + lane], s[SUM_LL + lane] = ZERO, ZERO
    for r in range(0, BLOCK, 4):
        x4, w4 = x[r : r + 4], w[r : r + 4]
        for lane in range(LANES):
            mixed, squares = s[SUM_XL + lane], s[SUM_LL + lane]
            for i in range(4):
                level = level_of(x4[i, lane] * s[INVERSE + lane])
                weighted = w4[i, lane] * level
                mixed, squares = mixed + weighted * x4[i, lane], squares + weighted * level
            s[SUM_XL + lane], s[SUM_LL + lane] = mixed, squares


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def search(steps, x, w, s):  # type: ignore[no-untyped-def]
    """SCALE = the best scale of every lane before rounding, WEIGHT the curvature of its error."""
    for lane in range(LANES):
        s[BEST + lane], s[SCALE + lane], s[WEIGHT + lane] = ZERO, ZERO, ZERO
    for step in steps:
        for lane in range(LANES):
            s[INVERSE + lane] = step * reciprocal(s[EXTREME + lane])
        add_up(x, w, s)
        for lane in range(LANES):
            scale = s[SUM_XL + lane] / s[SUM_LL + lane] if s[SUM_LL + lane] > ZERO else ZERO
            explained = scale * s[SUM_XL + lane]
            better = explained > s[BEST + lane]
            s[BEST + lane] = explained if better else s[BEST + lane]
            s[SCALE + lane] = scale if better else s[SCALE + lane]
            s[WEIGHT + lane] = s[SUM_LL + lane] if better else s[WEIGHT + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def keep_better(offset, x, w, s):  # type: ignore[no-untyped-def]
    """Try the scale D * (OLD + offset) of every lane; INTEGER, BEST_XL and WEIGHT are of the best tried so far."""
    for lane in range(LANES):
        trial = min(max(s[OLD + lane] + offset, -MOST), MOST - ONE)
        s[INVERSE + lane] = reciprocal(s[D + lane] * trial)
    add_up(x, w, s)
    for lane in range(LANES):
        trial = min(max(s[OLD + lane] + offset, -MOST), MOST - ONE)
        scale = s[D + lane] * trial
        explained = scale * (TWO * s[SUM_XL + lane] - scale * s[SUM_LL + lane])
        better = explained > s[BEST + lane]
        s[BEST + lane] = explained if better else s[BEST + lane]
        s[INTEGER + lane] = trial if better else s[INTEGER + lane]
        s[BEST_XL + lane] = s[SUM_XL + lane] if better else s[BEST_XL + lane]
        s[WEIGHT + lane] = s[SUM_LL + lane] if better else s[WEIGHT + lane]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def single(rounds, x, w, s):  # type: ignore[no-untyped-def]
    """IQ4_NL: D = the ideal scale as float16, then that of its levels, as long as it helps."""
    for lane in range(LANES):
        s[INTEGER + lane], s[BEST + lane] = ZERO, -LARGE
    for _ in range(rounds + 1):
        for lane in range(LANES):
            s[D + lane], s[OLD + lane] = half_step(s[SCALE + lane]), ONE
            s[INVERSE + lane] = reciprocal(s[D + lane])
        add_up(x, w, s)
        for lane in range(LANES):
            explained = s[D + lane] * (TWO * s[SUM_XL + lane] - s[D + lane] * s[SUM_LL + lane])
            better = explained > s[BEST + lane]
            s[BEST + lane] = explained if better else s[BEST + lane]
            s[INTEGER + lane] = s[D + lane] if better else s[INTEGER + lane]
            s[SCALE + lane] = s[SUM_XL + lane] / s[SUM_LL + lane] if s[SUM_LL + lane] > ZERO else ZERO
    for lane in range(LANES):
        s[D + lane], s[INTEGER + lane] = s[INTEGER + lane], ONE


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def settle(trials, s):  # type: ignore[no-untyped-def]
    """IQ4_XS: D of every super-block so that its multiples are near the ideal scales; the integers."""
    for first in range(0, LANES, SHARED):
        top = ZERO
        for lane in range(first, first + SHARED):
            top = s[SCALE + lane] if abs(s[SCALE + lane]) > abs(top) else top
        least, chosen = LARGE, ZERO
        for trial in trials:
            d = half_step(top / trial)
            inverse, loss = reciprocal(d), ZERO
            for lane in range(first, first + SHARED):
                integer = min(max((s[SCALE + lane] * inverse + MAGIC) - MAGIC, -MOST), MOST - ONE)
                missed = s[SCALE + lane] - d * integer
                loss += missed * missed * s[WEIGHT + lane]
            if loss < least:
                least, chosen = loss, d
        inverse = reciprocal(chosen)
        for lane in range(first, first + SHARED):
            s[D + lane] = chosen
            s[INTEGER + lane] = min(max((s[SCALE + lane] * inverse + MAGIC) - MAGIC, -MOST), MOST - ONE)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def refine(x, w, s):  # type: ignore[no-untyped-def]
    """IQ4_XS: the best stored scale near the present one, then D by least squares, rounded, if that is nearer."""
    for lane in range(LANES):
        s[OLD + lane], s[BEST + lane] = s[INTEGER + lane], -LARGE
    for offset in range(-1, 2):
        keep_better(np.float32(offset), x, w, s)
    for first in range(0, LANES, SHARED):
        mixed, squares = ZERO, ZERO
        for lane in range(first, first + SHARED):
            integer = s[INTEGER + lane]
            mixed += integer * s[BEST_XL + lane]
            squares += integer * integer * s[WEIGHT + lane]
        ideal = mixed / squares if squares > ZERO else ZERO
        trial = half(ideal)
        if abs(trial - ideal) < abs(s[D + first] - ideal):
            for lane in range(first, first + SHARED):
                s[D + lane] = trial


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def quantize(weights, importance, kind, factor, shared, steps, trials, rounds, out):  # type: ignore[no-untyped-def]
    """Search all blocks of flat `weights`; `importance` is (blocks of a row, 32). `shared` is 1 for IQ4_NL, 8 for
    IQ4_XS, `out` (d, scale), one value per block in both, scale unused for IQ4_NL."""
    d_out, scale_out = out
    limit = HALF_MAX * np.float32(113) * (MOST - ONE if shared > 1 else ONE)
    x, w = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK, LANES), np.float32)
    s = np.zeros(SCRATCH, np.float32)
    for first in range(0, d_out.size, LANES):
        count = min(LANES, d_out.size - first)
        load(weights, importance, first, count, limit, x, w)
        weigh(kind, factor, shared, x, w, s)
        search(steps, x, w, s)
        if shared == 1:
            single(rounds, x, w, s)
        else:
            settle(trials, s)
            for _ in range(rounds):
                refine(x, w, s)
        for lane in range(count):
            d_out[first + lane] = s[D + lane]
            if shared > 1:
                scale_out[first + lane] = np.int8(s[INTEGER + lane])


@njit(nogil=True, cache=CACHE, fastmath={"nsz"}, error_model="numpy")
def encode(weights, scales, width, start, codes):  # type: ignore[no-untyped-def]
    """The nearest level of every weight: `weights` (rows, columns) from column `start` on, `scales` (rows, blocks of
    `width` weights) from the first block that these touch."""
    inverse = np.empty(weights.shape[1], np.float32)
    skip = start % width
    for row in range(weights.shape[0]):
        for column in range(weights.shape[1]):
            inverse[column] = reciprocal(scales[row, (column + skip) // width])
        source, target = weights[row], codes[row]
        for column in range(weights.shape[1]):
            value = source[column] * inverse[column]
            code = 0
            for turn in TURNS:
                code += value >= turn
            target[column] = code
