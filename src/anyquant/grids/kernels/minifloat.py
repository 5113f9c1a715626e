"""Rounding to small floats, and the searches for the scales of groups of them.

Errors are summed up in halves of fixed length, never in an order that the width of vectors decides.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import CACHE
from anyquant.grids.minifloat import Rounding

Single = Any  # one float32: mypy knows no type that is both NumPy's scalar and what its arithmetic gives
Bytes = npt.NDArray[np.uint8]

CHUNK, LANES = 64, 64
FEW = 8  # columns that are not worth a slice per row
ZERO, ONE = np.float32(0), np.float32(1)
FAST = {"nnan", "nsz"}  # neither moves a rounding
HUGE = np.float32(3e38)


@njit(forceinline=True, error_model="numpy")
def to_code(value: Single, to: Rounding) -> Any:
    """The bit pattern of the nearest value, ties to the even pattern, saturating; the sign of zero is kept."""
    bits = np.float32(value).view(np.int32)
    magnitude = min(abs(value), to.highest)
    own = np.float32(magnitude).view(np.int32)
    normal = ((own + (np.int32(1) << (to.shift - 1)) - 1 + ((own >> to.shift) & 1)) >> to.shift) - to.rebias
    tiny = np.float32(magnitude + to.magic).view(np.int32) - np.float32(to.magic).view(np.int32)
    code = tiny if magnitude < to.normal else normal
    return np.int32(code) | ((bits >> 31) & 1) << to.sign


@njit(forceinline=True, error_model="numpy")
def to_value(magnitude: Single, to: Rounding) -> Single:
    """The value nearest to a magnitude, as `to_code` chooses it."""
    kept = min(magnitude, to.highest)
    own = np.float32(kept).view(np.int32)
    rounded = np.int32(((own + (np.int32(1) << (to.shift - 1)) - 1 + ((own >> to.shift) & 1)) >> to.shift) << to.shift)
    return (kept + to.magic) - to.magic if kept < to.normal else rounded.view(np.float32)


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def encode(weights: Float32, scale: Float32, first: int, width: int, to: Rounding, codes: Bytes) -> None:
    """codes = nearest to weights / scale, 0 where the scale is 0. `weights` (rows, columns) begin `first` columns
    into the first group of `width`; `scale` (rows, groups) or (1, groups)."""
    rows, columns = weights.shape
    if columns <= FEW:
        for row in range(rows):
            own = row if len(scale) > 1 else 0
            for j in range(columns):
                unit = scale[own, (first + j) // width]
                codes[row, j] = np.uint8(to_code(weights[row, j] / unit, to)) if unit != ZERO else 0
        return
    for row in range(rows):
        units = scale[row if len(scale) > 1 else 0]
        start, group = 0, 0
        while start < columns:
            stop = min(columns, (group + 1) * width - first)
            unit = units[group]
            source, target = weights[row, start:stop], codes[row, start:stop]
            if unit == ZERO:
                target[:] = 0
            else:
                for j in range(stop - start):
                    target[j] = np.uint8(to_code(source[j] / unit, to))
            start, group = stop, group + 1


@njit(forceinline=True, error_model="numpy")
def added(parts: Float32) -> Single:
    """The sum of `parts`, a power of two of them; overwritten."""
    half = parts.size // 2
    while half >= 1:
        for j in range(half):
            parts[j] += parts[half + j]
        half //= 2
    return parts[0]


@njit(forceinline=True, error_model="numpy")
def error(u: Float32, w: Float32, scale: Single, to: Rounding, parts: Float32) -> Single:
    """Sum of w (u - scale * nearest)^2; `u` are magnitudes, as many as there are `parts`."""
    if scale == ZERO:
        for j in range(parts.size):
            parts[j] = w[j] * u[j] * u[j]
        return added(parts)
    inverse = ONE / scale
    for j in range(parts.size):
        off = u[j] - scale * to_value(u[j] * inverse, to)
        parts[j] = w[j] * off * off
    return added(parts)


@njit(forceinline=True, error_model="numpy")
def relative(source: Float32, u: Float32) -> Single:
    """Magnitudes of a group divided by the largest one, which is returned; all 0 if that is 0."""
    largest = ZERO
    for j in range(source.size):
        largest = max(largest, abs(source[j]))
    if largest > ZERO:
        for j in range(source.size):
            u[j] = abs(source[j]) / largest
    else:
        u[:] = ZERO
    return largest


@njit(nogil=True, cache=CACHE, error_model="numpy")
def exponents(
    weights: Float32, importance: Float32, facts: tuple[int, int], to: Rounding, offsets: Any, out: Bytes
) -> None:
    """E8M0 exponents of groups of weights (rows, in). `facts` are the exponent of the largest value and the largest
    exponent allowed. The first of `offsets` (from floor(log2 max |w|) less the former) wins unless another is better.
    """
    top, most = facts
    size = weights.shape[1] // out.shape[1]
    u, parts = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(weights.shape[0]):
        for group in range(out.shape[1]):
            place = slice(group * size, (group + 1) * size)
            largest = relative(weights[row, place], u)
            exponent: Any = min(max((np.float32(largest).view(np.int32) >> 23) - top, 0), most)
            best, least = exponent, HUGE
            if offsets.size > 1 and largest > ZERO:
                w = importance[place]
                for offset in offsets:
                    tried = min(max(exponent + offset, 0), most)
                    scale = np.float32(math.ldexp(1.0, tried - 127) / np.float64(largest))
                    left = error(u, w, scale, to, parts)
                    if left < least:
                        best, least = tried, left
            out[row, group] = np.uint8(best)


@njit(forceinline=True, error_model="numpy")
def least_squares(u: Float32, w: Float32, scale: Single, to: Rounding) -> Any:
    """The weighted least-squares scale of the values chosen under `scale`."""
    mixed, square = 0.0, 0.0
    for j in range(u.size):
        value = to_value(u[j] / scale, to)
        mixed += np.float64(w[j] * value * u[j])
        square += np.float64(w[j] * value * value)
    return mixed / square if square > 0.0 else 0.0


@njit(nogil=True, cache=CACHE, error_model="numpy")
def refined(u: Float32, w: Float32, scales: Float32, start: Any, kinds: Any, parts: Float32) -> Any:
    """The place in `scales` where least squares leads from `start` while that lowers the error. `u` are relative to
    the largest magnitude, the last of `kinds`."""
    to, to_scale, unit, largest = kinds
    best, least = start, error(u, w, scales[start] / largest, to, parts)
    for _ in range(4):
        if scales[best] == ZERO:
            break
        refitted = np.float32(least_squares(u, w, scales[best] / largest, to)) * largest * unit
        tried: Any = min(np.int64(to_code(refitted, to_scale)), scales.size - 1)
        left = error(u, w, scales[tried] / largest, to, parts)
        if left >= least:
            break
        best, least = tried, left
    return best


@njit(nogil=True, cache=CACHE, fastmath=FAST, error_model="numpy")
def lane_errors(u: Float32, w: Float32, scale: Float32, to: Rounding, lost: Float32) -> None:
    """`error` of groups that lie side by side: lane = group, u and w (size, LANES), the rest (LANES,)."""
    inverse = np.empty(LANES, np.float32)
    for lane in range(LANES):
        lost[lane] = ZERO
        inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO
    for r in range(u.shape[0]):
        own, weight = u[r], w[r]
        for lane in range(LANES):
            off = own[lane] - scale[lane] * to_value(own[lane] * inverse[lane], to)
            lost[lane] += weight[lane] * off * off


@njit(nogil=True, cache=CACHE, error_model="numpy")
def side_by_side(source: Float32, steering: Float32, count: int, lanes: tuple[Float32, Float32, Float32]) -> None:
    """`count` groups of a row to lanes: magnitudes relative to the largest one, importance, and that largest one."""
    u, w, largest = lanes
    size = u.shape[0]
    u[:, count:], w[:, count:], largest[:] = ZERO, ZERO, ZERO
    for lane in range(count):
        for r in range(size):
            u[r, lane], w[r, lane] = abs(source[lane * size + r]), steering[lane * size + r]
    for r in range(size):
        for lane in range(LANES):
            largest[lane] = max(largest[lane], u[r, lane])
    for r in range(size):
        for lane in range(LANES):
            u[r, lane] = u[r, lane] / largest[lane] if largest[lane] > ZERO else ZERO


@njit(nogil=True, cache=CACHE, error_model="numpy")
def group_scales(
    weights: Float32, importance: Float32, scales: Float32, reach: tuple[int, int], kinds: Any, out: Bytes
) -> None:
    """Places in `scales` (ascending float32) of the scale of each group of weights (rows, in).

    Tried are the place nearest to max |w| / highest value, which wins if no other is better, its neighbours by `reach`
    below and above, and where least squares leads from the ends of these. `kinds`: the rounding of values, that of
    scales, and what a scale is multiplied with before it is rounded.
    """
    to, to_scale, unit = kinds
    size, most = weights.shape[1] // out.shape[1], scales.size - 1
    u, w = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    largest, scale, lost = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    plain, best, least = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.float32)
    parts = np.empty(size, np.float32)
    for row in range(weights.shape[0]):
        for first in range(0, out.shape[1], LANES):
            count = min(LANES, out.shape[1] - first)
            place = slice(first * size, (first + count) * size)
            side_by_side(weights[row, place], importance[place], count, (u, w, largest))
            for lane in range(LANES):
                code: Any = np.int64(to_code(largest[lane] / to.highest * unit, to_scale))
                plain[lane], best[lane], least[lane] = min(code, most), min(code, most), HUGE
            for step in range(-1, reach[0] + reach[1] + 1 if reach[0] + reach[1] > 0 else -1):
                offset = step - reach[0] if step >= 0 else 0  # the plain one first
                for lane in range(LANES):
                    tried = min(max(plain[lane] + offset, 0), most)
                    scale[lane] = scales[tried] / largest[lane] if largest[lane] > ZERO else ZERO
                lane_errors(u, w, scale, to, lost)
                for lane in range(LANES):
                    if lost[lane] < least[lane]:
                        least[lane], best[lane] = lost[lane], min(max(plain[lane] + offset, 0), most)
            for lane in range(count):
                at: Any = best[lane]
                ended = at <= max(plain[lane] - reach[0], 0) or at >= min(plain[lane] + reach[1], most)
                if ended and reach[0] + reach[1] > 0 and largest[lane] > ZERO:
                    facts = (to, to_scale, unit, largest[lane])
                    at = refined(u[:, lane].copy(), w[:, lane].copy(), scales, at, facts, parts)
                out[row, first + lane] = np.uint8(at)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def factors(
    weights: Float32, importance: Float32, plain: Float32, ladder: Float32, tile: tuple[int, int], to: Rounding
) -> None:
    """Multiply each scale of `plain` (tiles down, tiles across) with the best of `ladder`, whose first is 1.

    `tile` = (rows, columns) of weights that share a scale; the last ones may be smaller.
    """
    high, wide = tile
    u, w, parts = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    lost = np.empty(ladder.size, np.float64)
    for down in range(plain.shape[0]):
        for across in range(plain.shape[1]):
            lost[:] = 0.0
            unit = plain[down, across]
            for row in range(down * high, min((down + 1) * high, weights.shape[0])):
                end = min((across + 1) * wide, weights.shape[1])
                for first in range(across * wide, end, CHUNK):
                    count = min(CHUNK, end - first)
                    u[count:] = ZERO
                    w[count:] = ZERO
                    for j in range(count):
                        u[j] = abs(weights[row, first + j]) / unit
                        w[j] = importance[first + j]
                    for step in range(ladder.size):
                        lost[step] += np.float64(error(u, w, ladder[step], to, parts))
            plain[down, across] = unit * ladder[np.argmin(lost)]
