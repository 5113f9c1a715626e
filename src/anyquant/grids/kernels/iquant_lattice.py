"""Kernel of the I-quants with codebooks (IQ3_S, IQ3_XXS, IQ2_S): one super-block of 256 weights at a time.

value = scale * magnitude * sign, scale = d * (2 * integer + 1) * unit. Arrays are (dims, vectors): what is known of
each vector of weights lies side by side, so that loops over vectors, and over the candidates of one vector, become SIMD
code. Sub-blocks are tried in step, each with its own scale. Which entry is nearest under the weights of the objective
is decided among the candidates of the pattern of rounded magnitudes (`iquant_search.tables`). Sums are never
reassociated, so results do not depend on the width of vectors.
"""

import numpy as np
from numba import njit

from anyquant.grids.iquant_search import CANDIDATES, SUPER
from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.kquant_chunk import FAST, HALF_MAX, LARGE, MAGIC, ONE, SMALLEST, TWO, ZERO, half, half_step
from anyquant.grids.kquant_search import IMPORTANCE_SPREAD

FOUR = np.float32(4)
FIRST_BITS = np.int32(~(CANDIDATES - 1))  # of a float32: the last bits make room for the number of the candidate
LARGEST = np.int32(2**31 - 1)


@njit(fastmath=FAST, forceinline=True)
def ratio(numerator, denominator):  # type: ignore[no-untyped-def]
    """numerator / denominator, 0 where the denominator is not positive."""
    return numerator / denominator if denominator > ZERO else ZERO


@njit(fastmath=FAST, forceinline=True)
def square(linear, quadratic, point):  # type: ignore[no-untyped-def]
    return point * (linear + quadratic * point)


@njit(fastmath=FAST, forceinline=True)
def four(row, at, a, b):  # type: ignore[no-untyped-def]
    """Sum over four dimensions of p (a + b p), p the magnitudes of candidate `at`."""
    low = square(a[0], b[0], np.float32(row[at])) + square(a[1], b[1], np.float32(row[CANDIDATES + at]))
    third, fourth = np.float32(row[2 * CANDIDATES + at]), np.float32(row[3 * CANDIDATES + at])
    return low + (square(a[2], b[2], third) + square(a[3], b[3], fourth))


@njit(fastmath=FAST, forceinline=True)
def dearest(row, at, a):  # type: ignore[no-untyped-def]
    """The largest of a p over four dimensions."""
    low = max(a[0] * np.float32(row[at]), a[1] * np.float32(row[CANDIDATES + at]))
    third, fourth = np.float32(row[2 * CANDIDATES + at]), np.float32(row[3 * CANDIDATES + at])
    return max(low, max(a[2] * third, a[3] * fourth))


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def errors_of_four(row, linear, quadratic, v, rest, cost):  # type: ignore[no-untyped-def]
    """cost[k] = rest + sum over dimensions of p (linear + quadratic p), p the magnitudes of candidate k."""
    a = (linear[0, v], linear[1, v], linear[2, v], linear[3, v])
    b = (quadratic[0, v], quadratic[1, v], quadratic[2, v], quadratic[3, v])
    for k in range(CANDIDATES):
        cost[k] = rest + four(row, k, a, b)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def errors_of_eight(row, linear, quadratic, v, rest, cost):  # type: ignore[no-untyped-def]
    a = (linear[0, v], linear[1, v], linear[2, v], linear[3, v])
    b = (quadratic[0, v], quadratic[1, v], quadratic[2, v], quadratic[3, v])
    c = (linear[4, v], linear[5, v], linear[6, v], linear[7, v])
    d = (quadratic[4, v], quadratic[5, v], quadratic[6, v], quadratic[7, v])
    for k in range(CANDIDATES):
        cost[k] = rest + (four(row, k, a, b) + four(row, 4 * CANDIDATES + k, c, d))


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def add_flip(row, linear, v, cost):  # type: ignore[no-untyped-def]
    """One sign of four reversed, the one that costs least: by 4 w x scale p, which is -2 linear p."""
    a = (linear[0, v], linear[1, v], linear[2, v], linear[3, v])
    for k in range(CANDIDATES):
        cost[k] -= TWO * dearest(row, k, a)


@njit(nogil=True, cache=CACHE)
def least(bits):  # type: ignore[no-untyped-def]
    """(leading bits of the smallest cost, its number), as one integer; costs are not negative, so order is theirs."""
    found = np.int32(LARGEST)
    for k in range(bits.size):  # not a constant: LLVM would unroll the loop instead of using vectors
        found = min(found, np.int32((bits[k] & FIRST_BITS) | np.int32(k)))
    return found


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def load(source, importance, limit, chunk):  # type: ignore[no-untyped-def]
    """|x| of 256 weights, by dimension and vector, their importance alike, and the sign bits of each vector."""
    a, w, _, _, signs = chunk
    dims = a.shape[0]
    for v in range(SUPER // dims):
        negative = np.int32(0)
        for j in range(dims):
            value = source[v * dims + j]
            negative |= np.int32(value < ZERO) << j
            magnitude = min(abs(value), limit)
            a[j, v] = magnitude if magnitude > SMALLEST else ZERO
            w[j, v] = importance[v * dims + j]
        signs[v] = negative


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def weigh(kind, factor, chunk):  # type: ignore[no-untyped-def]
    """w = the weight of each squared error (importance comes in w), wa = w |x|, rest = sum w x^2 of each vector."""
    a, w, wa, rest, _ = chunk
    dims, vectors = a.shape
    partial = np.zeros(vectors, np.float32)
    for j in range(dims):
        for v in range(vectors):
            partial[v] += a[j, v] * a[j, v]
    total = ZERO
    for v in range(vectors):
        total += partial[v]
    spread = factor * total / np.float32(SUPER)
    for v in range(vectors):
        rest[v] = ZERO
    for j in range(dims):
        for v in range(vectors):
            whole = spread + a[j, v] * a[j, v]
            w[j, v] = w[j, v] * np.sqrt(whole) if kind == IMPORTANCE_SPREAD else whole
            wa[j, v] = w[j, v] * a[j, v]
            rest[v] += wa[j, v] * a[j, v]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def prepare(facts, scales, a, w, wa, linear, quadratic, pattern, buffers):  # type: ignore[no-untyped-def]
    """Pattern of the rounded magnitudes of each vector, and the error as a polynomial of magnitudes, under `scales`."""
    first, step, highest = facts
    dims, vectors = a.shape
    per_scale = vectors // scales.size
    _, spread, inverse = buffers
    for block in range(scales.size):
        scale = scales[block]
        for i in range(per_scale):
            spread[block * per_scale + i] = scale
            inverse[block * per_scale + i] = ratio(ONE, scale * step)
    for v in range(vectors):
        pattern[v] = 0
    place = np.int32(1)
    for j in range(dims):
        for v in range(vectors):
            level = min(max((a[j, v] * inverse[v] - first / step + MAGIC) - MAGIC, ZERO), highest)
            pattern[v] += np.int32(level) * place
            linear[j, v] = -TWO * spread[v] * wa[j, v]
            quadratic[j, v] = spread[v] * spread[v] * w[j, v]
        place = np.int32(place * (np.int32(highest) + 1))


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def pick(points, names, linear, quadratic, rest, pattern, cost, bits, entry):  # type: ignore[no-untyped-def]
    """The nearest candidate of every vector."""
    dims, vectors = linear.shape
    for v in range(vectors):
        row = points[pattern[v]]
        if dims == 4:
            errors_of_four(row, linear, quadratic, v, rest[v], cost)
        else:
            errors_of_eight(row, linear, quadratic, v, rest[v], cost)
        entry[v] = names[pattern[v], least(bits) & np.int32(CANDIDATES - 1)]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def pick_even(points, names, book, linear, quadratic, rest, pattern, cost, bits, signs, entry, flip):  # type: ignore[no-untyped-def]
    """Like `pick`, for pairs of vectors whose number of negative signs must be even: `flip` is the weight of a vector
    whose sign is reversed, or -1."""
    last = np.int32(CANDIDATES - 1)
    kept = np.empty(2, np.int32)
    flipped = np.empty(2, np.int32)
    for pair in range(linear.shape[1] // 2):
        first = 2 * pair
        odd = signs[first] ^ signs[first + 1]
        odd ^= odd >> 2
        odd = (odd ^ (odd >> 1)) & 1
        for i in range(2):
            v = first + i
            row = points[pattern[v]]
            errors_of_four(row, linear, quadratic, v, rest[v], cost)
            kept[i] = least(bits)
            flip[v] = -1
            entry[v] = names[pattern[v], kept[i] & last]
            if odd:
                add_flip(row, linear, v, cost)
                flipped[i] = least(bits)
        if odd:
            views = np.empty(4, np.int32)
            views[0], views[1], views[2], views[3] = flipped[0], kept[1], kept[0], flipped[1]
            value = views.view(np.float32)
            v = first if value[0] + value[1] <= value[2] + value[3] else first + 1
            chosen = names[pattern[v], flipped[v - first] & last]
            entry[v] = chosen
            cheapest, at = LARGE, 0
            for j in range(4):
                price = -linear[j, v] * book[j, chosen]
                if price < cheapest:
                    cheapest, at = price, j
            flip[v] = at


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def add_up(book, even, w, wa, entry, flip, buffers, xl, ll):  # type: ignore[no-untyped-def]
    """Per sub-block xl = sum w x p and ll = sum w p^2 of the signed magnitudes p of the chosen entries."""
    points, mixed, squares = buffers
    dims, vectors = w.shape
    for v in range(vectors):
        mixed[v], squares[v] = ZERO, ZERO
    for j in range(dims):
        column, place = book[j], points
        for v in range(vectors):
            place[v] = column[entry[v]]
        for v in range(vectors):
            mixed[v] += wa[j, v] * place[v]
            squares[v] += w[j, v] * place[v] * place[v]
    if even:
        for v in range(vectors):
            if flip[v] >= 0:
                mixed[v] -= TWO * wa[flip[v], v] * book[flip[v], entry[v]]
    per_scale = vectors // xl.size
    for block in range(xl.size):
        some, more = ZERO, ZERO
        for v in range(block * per_scale, (block + 1) * per_scale):
            some += mixed[v]
            more += squares[v]
        xl[block], ll[block] = some, more


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def evaluate(facts, even, tables, scales, chunk, work, xl, ll):  # type: ignore[no-untyped-def]
    """Entries (and flips) of every vector under `scales` of the sub-blocks, and the sums `xl`, `ll` they give."""
    book, points, names = tables
    a, w, wa, rest, signs = chunk
    linear, quadratic, pattern, cost, bits, entry, flip, buffers = work
    prepare(facts, scales, a, w, wa, linear, quadratic, pattern, buffers)
    if even:
        pick_even(points, names, book, linear, quadratic, rest, pattern, cost, bits, signs, entry, flip)
    else:
        pick(points, names, linear, quadratic, rest, pattern, cost, bits, entry)
    add_up(book, even, w, wa, entry, flip, buffers, xl, ll)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def settle(trials, unit, ideal, weight, integers):  # type: ignore[no-untyped-def]
    """Float16 d whose odd multiples up to 31, times `unit`, are near the `ideal` scales; the integers 0..15."""
    top = ZERO
    for block in range(ideal.size):
        top = max(top, ideal[block])
    least_loss, chosen = LARGE, ZERO
    for trial in trials:
        d = half_step(top / (unit * trial))
        loss = ZERO
        for block in range(ideal.size):
            missed = ideal[block] - d * unit * odd(ideal[block], d * unit)
            loss += weight[block] * missed * missed
        if loss < least_loss:
            least_loss, chosen = loss, d
    for block in range(ideal.size):
        integers[block] = (odd(ideal[block], chosen * unit) - ONE) / TWO
    return chosen


@njit(fastmath=FAST, forceinline=True)
def odd(value, step):  # type: ignore[no-untyped-def]
    """The odd number 1..31 whose multiple of `step` is near `value`."""
    integer = min(max((value * ratio(ONE, TWO * step) - np.float32(0.5) + MAGIC) - MAGIC, ZERO), np.float32(15))
    return TWO * integer + ONE


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def search(facts, even, tables, steps, chunk, work, ideal, weight):  # type: ignore[no-untyped-def]
    """The best scale of every sub-block before rounding, and the curvature of its error."""
    a = chunk[0]
    first, step, _ = facts
    blocks = ideal.size
    per_scale = a.shape[1] // blocks
    extreme, scales = np.zeros(blocks, np.float32), np.empty(blocks, np.float32)
    xl, ll, best = np.empty(blocks, np.float32), np.empty(blocks, np.float32), np.full(blocks, -LARGE)
    for j in range(a.shape[0]):
        for block in range(blocks):
            for v in range(block * per_scale, (block + 1) * per_scale):
                extreme[block] = max(extreme[block], a[j, v])
    for trial in steps:
        for block in range(blocks):
            # a step counts odd levels: 2 * highest + 1 is the largest magnitude
            scales[block] = extreme[block] / (first + step * (trial - ONE) / TWO)
        evaluate(facts, even, tables, scales, chunk, work, xl, ll)
        for block in range(blocks):
            scale = ratio(xl[block], ll[block])
            explained = scale * xl[block]
            if explained > best[block]:
                best[block], ideal[block], weight[block] = explained, scale, ll[block]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def refine(facts, even, tables, unit, reach, chunk, work, d, integers):  # type: ignore[no-untyped-def]
    """One round: the best stored scale of each sub-block near the present one, then d by least squares."""
    blocks = integers.size
    scales, before = np.empty(blocks, np.float32), integers.copy()
    xl, ll = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    best, best_xl, best_ll = np.full(blocks, -LARGE), np.zeros(blocks, np.float32), np.zeros(blocks, np.float32)
    for offset in range(-reach, reach + 1):
        for block in range(blocks):
            integer = min(max(before[block] + np.float32(offset), ZERO), np.float32(15))
            scales[block] = d * unit * (TWO * integer + ONE)
        evaluate(facts, even, tables, scales, chunk, work, xl, ll)
        for block in range(blocks):
            explained = scales[block] * (TWO * xl[block] - scales[block] * ll[block])
            if explained > best[block]:
                best[block], best_xl[block], best_ll[block] = explained, xl[block], ll[block]
                integers[block] = min(max(before[block] + np.float32(offset), ZERO), np.float32(15))
    mixed, squares = ZERO, ZERO
    for block in range(blocks):
        relative = unit * (TWO * integers[block] + ONE)
        mixed += relative * best_xl[block]
        squares += relative * relative * best_ll[block]
    ideal = ratio(mixed, squares)
    trial = half(ideal)
    return trial if abs(trial - ideal) < abs(d - ideal) and trial > ZERO else d


@njit(nogil=True, cache=CACHE)
def emit(even, index_bits, entry, signs, flip, codes):  # type: ignore[no-untyped-def]
    """Codes of one super-block."""
    if even:
        for pair in range(codes.size):
            negative = 0
            for i in range(2):
                v = 2 * pair + i
                own = signs[v] ^ (np.int32(1) << flip[v] if flip[v] >= 0 else np.int32(0))
                negative |= own << (4 * i)
            codes[pair] = entry[2 * pair] | (entry[2 * pair + 1] << 8) | ((negative & 127) << 16)
    else:
        for v in range(codes.size):
            codes[v] = entry[v] | (signs[v] << index_bits)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def quantize(weights, importance, kind, factor, shape, tables, steps, trials, effort, out, codes):  # type: ignore[no-untyped-def]
    """Quantize a matrix whose columns are a multiple of 256.

    `shape` is (dims, even, index bits, unit, (first, step, highest)), `effort` (rounds, reach), `out` the arrays
    (d, scale); all float arguments are float32.
    """
    dims, even, index_bits, unit, facts = shape
    rounds, reach = effort
    limit = HALF_MAX * np.float32(31) * unit * (facts[0] + facts[1] * facts[2])
    d_out, scale_out = out
    vectors, blocks = SUPER // dims, scale_out.shape[1] // d_out.shape[1]
    size = (dims, vectors)
    signs, rest = np.zeros(vectors, np.int32), np.empty(vectors, np.float32)
    chunk = (np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32), rest, signs)
    cost = np.empty(CANDIDATES, np.float32)
    pattern, entry, flip = np.zeros(vectors, np.int32), np.zeros(vectors, np.int32), np.full(vectors, np.int32(-1))
    buffers = (np.empty(vectors, np.float32), np.empty(vectors, np.float32), np.empty(vectors, np.float32))
    linear, quadratic, bits = np.empty(size, np.float32), np.empty(size, np.float32), cost.view(np.int32)
    work = (linear, quadratic, pattern, cost, bits, entry, flip, buffers)
    ideal, weight = np.zeros(blocks, np.float32), np.zeros(blocks, np.float32)
    integers, scales = np.zeros(blocks, np.float32), np.zeros(blocks, np.float32)
    per_super = codes.shape[1] // d_out.shape[1]
    for row in range(weights.shape[0]):
        for index in range(d_out.shape[1]):
            columns = slice(index * SUPER, (index + 1) * SUPER)
            load(weights[row, columns], importance[columns], limit, chunk)
            weigh(kind, factor, chunk)
            search(facts, even, tables, steps, chunk, work, ideal, weight)
            d = settle(trials, unit, ideal, weight, integers)
            for _ in range(rounds):
                d = refine(facts, even, tables, unit, reach, chunk, work, d, integers)
            for block in range(blocks):
                scales[block] = d * unit * (TWO * integers[block] + ONE)
                scale_out[row, index * blocks + block] = np.uint8(integers[block])
            evaluate(facts, even, tables, scales, chunk, work, ideal, weight)
            d_out[row, index] = d
            emit(even, index_bits, entry, signs, flip, codes[row, index * per_super : (index + 1) * per_super])
