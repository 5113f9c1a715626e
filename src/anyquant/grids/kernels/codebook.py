"""Weighted k-means in one dimension, row by row: the values of a codebook and the codes of weights under it.

In one dimension clusters are intervals of the sorted weights, and prefix sums give the error of any interval at once.
The optimum over bins (dynamic programming with a price per interval, Aggarwal, Schieber and Tokuyama, 1994) is then
improved on all weights until nothing changes (Lloyd, 1982).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import CACHE

Float64 = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

BINS = 480  # a multiple of 3; more for many values
TRIES = 60
FEW = 8  # columns that are not worth a table of middles per row
TILE = 256
ROUNDS = 100
LARGEST_HALF = 65504.0


@njit(nogil=True, cache=CACHE, error_model="numpy")
def sortable(weights: Float32, keys: npt.NDArray[np.int64]) -> None:
    """Keys that order the weights of a row as numbers and hold their columns below; 0 and -0 are one number."""
    for row in range(weights.shape[0]):
        bits = weights[row].view(np.int32)
        for j in range(bits.size):
            own = np.int64(bits[j])
            own = own if own >= 0 else -(own & 0x7FFFFFFF)
            keys[row, j] = own * 2**32 + j


@njit(nogil=True, cache=CACHE, error_model="numpy")
def merged(keys: npt.NDArray[np.int64], row: Float32, importance: Float32, x: Float64, w: Float64) -> Any:
    """The distinct values of a row in ascending order and the weight of each, into `x` and `w`; how many."""
    count = 0
    for key in keys:
        column = key & 0xFFFFFFFF
        value = min(max(np.float64(row[column]), -LARGEST_HALF), LARGEST_HALF)
        if count == 0 or value != x[count - 1]:
            x[count], w[count] = value, 0.0
            count += 1
        w[count - 1] += np.float64(importance[column])
    return count


@njit(nogil=True, cache=CACHE, error_model="numpy")
def bin_edges(x: Float64, weight: Float64, edges: Places) -> Any:
    """Ascending places in `x` where bins begin and end: a third each evenly over values, their number, their weight.

    `weight` (n + 1,) are prefix sums. Returns the number of bins.
    """
    count, third = x.size, (edges.size - 1) // 3
    if count < edges.size:
        for j in range(count + 1):
            edges[j] = j
        return count
    for step in range(third):
        share = step / third
        edges[3 * step] = np.searchsorted(x, x[0] + share * (x[-1] - x[0]))
        edges[3 * step + 1] = np.int64(share * count)
        edges[3 * step + 2] = min(np.searchsorted(weight, share * weight[count]), count - 1)
    edges[3 * third :] = count
    edges.sort()
    kept = 1
    for j in range(1, edges.size):
        if edges[j] != edges[kept - 1]:
            edges[kept] = edges[j]
            kept += 1
    return kept - 1


@njit(forceinline=True, error_model="numpy")
def cost(first: Any, last: Any, w: Float64, m: Float64) -> Any:
    """Squared error of the bins [first, last) about their mean, less their squares, which no partition changes."""
    total, sum_x = w[last] - w[first], m[last] - m[first]
    return -sum_x * sum_x / total if total > 0.0 else 0.0


@njit(nogil=True, cache=CACHE, error_model="numpy")
def partition(price: float, w: Float64, m: Float64, least: Float64, begin: Places, queue: Places) -> Any:
    """The best partition of all bins where each interval costs `price`, as the begin of each last interval; its count.

    A later begin, once it is better for some end, is better for all further ends (the costs satisfy the quadrangle
    inequality): `queue` (2, bins + 1) holds the begins that are best for some end still to come, and from which on.
    """
    bins = begin.size - 1
    least[0], queue[0, 0], queue[1, 0], head, tail = 0.0, 0, 1, 0, 1
    for end in range(1, bins + 1):
        while tail - head > 1 and queue[1, head + 1] <= end:
            head += 1
        begin[end] = queue[0, head]
        least[end] = least[begin[end]] + cost(begin[end], end, w, m) + price
        start = bins + 1
        while tail > head:
            other, low = queue[0, tail - 1], max(queue[1, tail - 1], end + 1)
            if low < start and least[end] + cost(end, low, w, m) <= least[other] + cost(other, low, w, m):
                start = low
                tail -= 1
                continue
            high = start
            while low < high:
                middle = (low + high) // 2
                if least[end] + cost(end, middle, w, m) <= least[other] + cost(other, middle, w, m):
                    high = middle
                else:
                    low = middle + 1
            start = low
            break
        if start <= bins:
            queue[0, tail], queue[1, tail] = end, start
            tail += 1
    count, at = 0, bins
    while at > 0:
        at = begin[at]
        count += 1
    return count


@njit(nogil=True, cache=CACHE, error_model="numpy")
def best_cuts(edges: Places, weight: Float64, moment: Float64, cuts: Places) -> None:
    """The bins' optimal partition into cuts.size - 1 intervals: `cuts` are the places of their ends.

    Sought is the price per interval at which the best partition has as many; intervals left over stay empty.
    """
    bins, many = edges.size - 1, cuts.size - 1
    w, m = weight[edges], moment[edges]
    least, begin, queue = np.empty(bins + 1), np.zeros(bins + 1, np.int64), np.empty((2, bins + 2), np.int64)
    squares = 0.0
    for j in range(bins):
        squares -= cost(j, j + 1, w, m)
    low, high = 0.0, max(squares, 1e-300) * 2.0
    price = high / many**3
    for _ in range(TRIES):
        count = partition(price, w, m, least, begin, queue)
        if count == many:
            break
        if count > many:
            low = price
        else:
            high = price
        price *= (count / many) ** 3  # errors fall with the cube of the count
        if not low < price < high:
            price = np.sqrt(low * high) if low > 0.0 else high / 64.0
    if count > many:
        count = partition(high, w, m, least, begin, queue)
    cuts[:] = edges[bins]
    at = bins
    for place in range(count - 1, -1, -1):
        at = begin[at]
        cuts[place] = edges[at]


@njit(nogil=True, cache=CACHE, error_model="numpy")
def settle(x: Float64, weight: Float64, moment: Float64, cuts: Places, means: Float64) -> None:
    """Means of the intervals, cuts half-way between the means, again and again until no cut moves.

    An interval without weights takes the end of the largest one's.
    """
    many = means.size
    for _ in range(ROUNDS):
        for cluster in range(many):
            first, last = cuts[cluster], cuts[cluster + 1]
            total = weight[last] - weight[first]
            if total > 0.0:
                means[cluster] = (moment[last] - moment[first]) / total
            else:
                means[cluster] = x[min(first, x.size - 1)]
        moved = False
        for cluster in range(1, many):
            cut = np.searchsorted(x, (means[cluster - 1] + means[cluster]) / 2.0)
            cut = max(cut, cuts[cluster - 1])
            moved = moved or cut != cuts[cluster]
            cuts[cluster] = cut
        if not moved:
            break


@njit(nogil=True, cache=CACHE, error_model="numpy")
def fit(keys: npt.NDArray[np.int64], weights: Float32, importance: Float32, out: Float32) -> None:
    """`out` (rows, values): ascending means of the clusters of each row of `weights` (rows, in), with sorted keys."""
    rows, columns = weights.shape
    many = out.shape[1]
    x, w = np.empty(columns), np.empty(columns)
    means, cuts = np.empty(many), np.empty(many + 1, np.int64)
    for row in range(rows):
        count = merged(keys[row], weights[row], importance, x, w)
        if count <= many:
            for value in range(many):
                out[row, value] = np.float32(x[min(value, count - 1)])
            continue
        points = x[:count]
        middle = points[count // 2]
        weight, moment = np.zeros(count + 1), np.zeros(count + 1)
        for j in range(count):
            points[j] -= middle
            weight[j + 1] = weight[j] + w[j]
            moment[j + 1] = moment[j] + w[j] * points[j]
        edges = np.empty(max(BINS, 9 * many) + 1, np.int64)
        bins = bin_edges(points, weight, edges)
        best_cuts(edges[: bins + 1], weight, moment, cuts)
        settle(points, weight, moment, cuts, means)
        for value in range(many):
            out[row, value] = np.float32(means[value] + middle)


@njit(forceinline=True, error_model="numpy")
def from_half(bits: Any) -> Any:
    """The float32 of a float16's bits, exactly: its exponent is too small by 112."""
    magnitude = np.int32((np.int32(bits) & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
    return -magnitude if bits & 0x8000 else magnitude


@njit(forceinline=True, error_model="numpy")
def middle_of(halves: npt.NDArray[np.uint16], place: Any) -> Any:
    """Half-way from one value to the next."""
    return (from_half(halves[place]) + from_half(halves[place + 1])) * np.float32(0.5)


@njit(nogil=True, cache=CACHE, error_model="numpy")
def encode(weights: Float32, values: npt.NDArray[np.uint16], codes: npt.NDArray[np.uint8]) -> None:
    """The place of the nearest of the row's `values` (rows, n), bits of float16; of two equally near the lower one."""
    rows, columns = weights.shape
    many = values.shape[1]
    middles, places = np.empty(many - 1, np.float32), np.empty(TILE, np.int32)
    for row in range(rows):
        if columns <= FEW:
            for j in range(columns):
                place, step = 0, many // 2
                while step >= 1:
                    place += step if weights[row, j] > middle_of(values[row], place + step - 1) else 0
                    step //= 2
                codes[row, j] = place
            continue
        for j in range(many - 1):
            middles[j] = middle_of(values[row], j)
        for first in range(0, columns, TILE):
            source = weights[row, first : min(first + TILE, columns)]
            found, target = places[: source.size], codes[row, first : first + source.size]
            found[:] = 0
            for middle in middles:
                for j in range(source.size):
                    found[j] += np.int32(1) if source[j] > middle else np.int32(0)
            for j in range(source.size):
                target[j] = found[j]
