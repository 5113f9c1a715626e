"""The nearest codes of the I-quants with codebooks under given scales, all weights alike: every entry is compared."""

import numpy as np
from numba import njit

from anyquant.grids.kernels import CACHE
from anyquant.grids.kernels.kquant_chunk import FAST, LARGE, TWO, ZERO


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def nearest_entry(book, norms, a, scale, cost, bits, flipped):  # type: ignore[no-untyped-def]
    """(entry, squared error less sum a^2) of the entry nearest to |x| = `a`; one sign reversed where `flipped`.

    `book` (dims, entries) and `norms` (entries,) float32: magnitudes, and the sums of their squares.
    """
    dims, entries = book.shape
    rest = ZERO
    for j in range(dims):
        rest += a[j] * a[j]
    for k in range(entries):
        cost[k] = rest + scale * scale * norms[k]
    for j in range(0, dims, 4):
        a0, a1 = -TWO * scale * a[j], -TWO * scale * a[j + 1]
        a2, a3 = -TWO * scale * a[j + 2], -TWO * scale * a[j + 3]
        b0, b1, b2, b3 = book[j], book[j + 1], book[j + 2], book[j + 3]
        for k in range(entries):
            cost[k] += (a0 * b0[k] + a1 * b1[k]) + (a2 * b2[k] + a3 * b3[k])
        if flipped:
            for k in range(entries):
                cost[k] -= TWO * max(max(a0 * b0[k], a1 * b1[k]), max(a2 * b2[k], a3 * b3[k]))
    found = np.int64(2**62)
    for k in range(entries):
        found = min(found, (np.int64(bits[k]) << 32) | k)
    entry = np.int32(found & np.int64(0xFFFF))
    return entry, cost[entry]


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def load(source, a):  # type: ignore[no-untyped-def]
    """|x| of one vector into `a` (entries of a code, dims); bits of the negative signs, and whether they are odd."""
    dims = a.shape[1]
    negative, odd = np.int64(0), np.int64(0)
    for j in range(source.size):
        below = np.int64(source[j] < ZERO)
        negative |= below << j
        odd ^= below
        a[j // dims, j % dims] = abs(source[j])
    return negative, odd == 1


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def reverse_one(book, norms, a, scale, cost, bits, pair, errors):  # type: ignore[no-untyped-def]
    """Choose one entry of `pair` again with a sign reversed, where that costs least; the number of that sign."""
    first, first_error = nearest_entry(book, norms, a[0], scale, cost, bits, True)
    second, second_error = nearest_entry(book, norms, a[1], scale, cost, bits, True)
    half = 0 if first_error + errors[1] <= errors[0] + second_error else 1
    pair[half] = first if half == 0 else second
    cheapest, at = LARGE, 0
    for j in range(a.shape[1]):
        price = a[half, j] * book[j, pair[half]]
        if price < cheapest:
            cheapest, at = price, half * a.shape[1] + j
    return at


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def encode(weights, scales, book, norms, even, index_bits, codes):  # type: ignore[no-untyped-def]
    """The nearest code of every vector: `weights` (rows, in), `scales` (rows, vectors), the rest as `nearest_entry`."""
    dims, entries = book.shape
    cost = np.empty(entries, np.float32)
    bits = cost.view(np.int32)
    vector = weights.shape[1] // codes.shape[1]
    a, pair, errors = np.empty((vector // dims, dims), np.float32), np.empty(2, np.int64), np.empty(2, np.float32)
    for row in range(codes.shape[0]):
        for index in range(codes.shape[1]):
            negative, odd = load(weights[row, index * vector : (index + 1) * vector], a)
            scale = scales[row, index]
            for half in range(a.shape[0]):
                pair[half], errors[half] = nearest_entry(book, norms, a[half], scale, cost, bits, False)
            if even:
                if odd:
                    negative ^= np.int64(1) << reverse_one(book, norms, a, scale, cost, bits, pair, errors)
                codes[row, index] = pair[0] | (pair[1] << 8) | ((negative & 127) << 16)
            else:
                codes[row, index] = pair[0] | (negative << index_bits)
