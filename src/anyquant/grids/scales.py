"""One scale, or one scale and minimum, per group of consecutive weights: what legacy and integer grids share.

`find_scales` and `find_pairs` are the searches (compiled); `slow_scales` and `slow_pairs` say the same in plain NumPy
and double precision, and are the oracle of the tests. Both try a ladder of candidate scales, refit each by weighted
least squares to the levels it gives, keep the one that removes most error, store it, refit it once more to the levels
under the stored value, and fall back to plain rounding wherever that is better.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.grid import Codes

Float64 = npt.NDArray[np.float64]
Trials = tuple[Float32, Float32]
LARGEST_HALF = 65504.0
LARGEST_COMMON = 65280.0  # of bfloat16 numbers below it
UNCHANGED = np.zeros((0, 2), dtype=np.float32)


@dataclass(frozen=True)
class Levels:
    """Levels `low` to `high` in groups of `group` weights; plain rounding puts the largest weight on level `plain`.

    `signed`: the scale may be negative, and `plain` and the ladder refer to the largest weight with its sign. `half`:
    scales and minima are stored as float16, else scales as bfloat16, and pairs as numbers that both types hold.
    `spread`: with importance, an error also weighs sqrt(mean of the row's w^2 + w^2), as in ggml's own searches.
    """

    group: int
    low: int
    high: int
    plain: int
    signed: bool
    half: bool
    spread: bool


def find_scales(weights: Float32, importance: Float32 | None, levels: Levels, ladder: Float32) -> Float32:
    """Stored scales (rows, in / group), as float32, of `weights` (rows, in).

    `ladder` holds the candidates: the level on which the largest weight of the group would come to lie.
    """
    from anyquant.grids.kernels import symmetric

    flat, lanes, spread = _inputs(weights, importance, levels)
    scales = np.empty(flat.size // levels.group, dtype=np.float32)
    limits = (np.float32(levels.low), np.float32(levels.high), np.float32(levels.plain), levels.half)
    symmetric.search(flat, lanes, ladder, limits, levels.signed, spread, scales)
    return scales.reshape(len(weights), -1)


def find_pairs(
    weights: Float32, importance: Float32 | None, levels: Levels, trials: Trials, changes: Float32 = UNCHANGED
) -> tuple[Float32, Float32]:
    """Stored scales and minima, each (rows, in / group) as float32.

    `trials` are the path and the ladder. The ladder (candidates, 2) holds the number of levels that the range of a
    group spans, and the level of its middle. The path (candidates,), may be empty, holds the number of levels beyond
    `levels.high` on a range from the best minimum found so far to the largest weight: each refitted minimum moves the
    ranges that follow. The best of each is refined, and whichever leaves less error is taken. `changes` (n, 2) of it
    are tried at the end, stored: a factor of the scale, and levels by which the minimum moves.
    """
    from anyquant.grids.kernels import affine

    flat, lanes, spread = _inputs(weights, importance, levels)
    scales = np.empty(flat.size // levels.group, dtype=np.float32)
    minima = np.empty_like(scales)
    limits = np.float32(levels.high), levels.half
    affine.search(flat, lanes, (*trials, changes), limits, spread, scales, minima)
    return scales.reshape(len(weights), -1), minima.reshape(len(weights), -1)


def spread_out(values: Codes, group: int, columns: slice | None) -> Float32:
    """A parameter (rows, in / group) as float32, repeated for each weight of `columns` (all: None).

    Columns of one group alone get (rows, 1), which broadcasts: algorithms that go column by column ask for little else.
    """
    if columns is None:
        return np.repeat(values.astype(np.float32), group, axis=1)
    start, stop, _ = columns.indices(values.shape[1] * group)
    first = start // group
    single = values[:, first : -(-stop // group)].astype(np.float32)
    if single.shape[1] <= 1:
        return single
    whole: Float32 = np.repeat(single, group, axis=1)
    return whole[:, start - first * group : stop - first * group]


def apply_by_group(operation: np.ufunc, values: Float32, parameter: Codes, group: int, columns: slice | None) -> None:
    """`operation(value, parameter of its group)` for all `values` (rows, columns), in place.

    `parameter` (rows, in / group), or (rows or 1, 1) where `group` is not positive. Whole rows (`columns` None) need no
    parameter of their own for each weight.
    """
    if columns is not None and group > 0:
        operation(values, spread_out(parameter, group, columns), out=values)
        return
    grouped = values.reshape(len(values), parameter.shape[1], -1)
    operation(grouped, parameter[:, :, None].astype(np.float32, copy=False), out=grouped)


def error_weights(weights: Float32, importance: Float32 | None, spread: bool) -> Float32:
    """The weight of each squared error, shape of `weights`."""
    if importance is None:
        return np.broadcast_to(np.float32(1), weights.shape)
    wide = importance.astype(np.float64)
    if spread:
        squares = weights.astype(np.float64) ** 2
        wide = wide * np.sqrt(squares.mean(axis=1, keepdims=True) + squares)
    return np.broadcast_to(wide.astype(np.float32), weights.shape)


def _inputs(weights: Float32, importance: Float32 | None, levels: Levels) -> tuple[Float32, Float32, Float32]:
    """Flat weights; importance by position in the group, then group; mean squares of the rows, or nothing."""
    from anyquant.grids.kernels import symmetric

    whole = np.ascontiguousarray(weights, dtype=np.float32)
    squares = np.empty(len(weights) if levels.spread and importance is not None else 0, dtype=np.float32)
    symmetric.mean_squares(whole, squares)
    return whole.reshape(-1), lanes_of(importance, weights.shape[1], levels.group), squares


def lanes_of(importance: Float32 | None, columns: int, group: int) -> Float32:
    """Importance by position in the group, then group (group, groups of a row + lanes of the kernels).

    The kernels read a lane per group, across the end of the row into the next one.
    """
    from anyquant.grids.kernels import symmetric

    steering = usable_importance(importance, columns, group).reshape(-1, group)
    around = np.arange(len(steering) + symmetric.LANES) % len(steering)
    return np.ascontiguousarray(steering.T[:, around])


def usable_importance(importance: Float32 | None, columns: int, group: int) -> Float32:
    """Importance (in,) scaled by a power of two to at most 1, with a floor in every group.

    A search must decide something for weights that no calibration text ever used: they count at least 2^-20 of the
    most important one in their group, and all the same where nothing in the group is important.
    """
    if importance is None or not importance.any():
        return np.ones(columns, dtype=np.float32)
    _, exponent = np.frexp(float(importance.max()))
    scaled = np.ldexp(importance.astype(np.float64), -int(exponent)).reshape(-1, group)
    largest = scaled.max(axis=1, keepdims=True)
    floored: Float32 = np.where(largest > 0, np.maximum(scaled, largest * 2.0**-20), 1).astype(np.float32)
    return floored.reshape(-1)


def slow_scales(weights: Float32, importance: Float32 | None, levels: Levels, ladder: Float32) -> Float32:
    """`find_scales`, plainly."""
    x, w = _groups(weights, importance, levels)
    top, bottom = x.max(axis=1), x.min(axis=1)
    unit = np.where(top >= -bottom, top, bottom) if levels.signed else np.maximum(top, -bottom)
    unit = np.where(unit == 0, 1, unit)
    store = _to_half if levels.half else _to_brain

    def nearest(scale: Float64) -> Float64:
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        codes: Float64 = np.clip(np.rint(x * inverse[:, None]), levels.low, levels.high)
        return codes

    def least_squares(codes: Float64) -> tuple[Float64, Float64]:
        product, square = (w * x * codes).sum(axis=1), (w * codes * codes).sum(axis=1)
        scale = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        return scale, scale * product

    def error(scale: Float64) -> Float64:
        total: Float64 = np.sum(w * (x - scale[:, None] * nearest(scale)) ** 2, axis=1)
        return total

    gain, scale = np.zeros(len(x)), np.zeros(len(x))
    for step in ladder:
        candidate, gained = least_squares(nearest(unit / float(step)))
        gain, scale = np.where(gained > gain, gained, gain), np.where(gained > gain, candidate, scale)
    first = store(scale)
    second = store(least_squares(nearest(first))[0])
    best = _least(error, [(first,), (second,), (store(unit / levels.plain),)])
    return best[0].reshape(len(weights), -1).astype(np.float32)


class Pair(NamedTuple):
    """Scale and minimum of every group, and the error that they leave."""

    scale: Float64
    minimum: Float64
    error: Float64


def slow_pairs(
    weights: Float32, importance: Float32 | None, levels: Levels, trials: Trials, changes: Float32 = UNCHANGED
) -> tuple[Float32, Float32]:
    """`find_pairs`, plainly."""
    x, w = _groups(weights, importance, levels)
    top, bottom = x.max(axis=1), x.min(axis=1)
    middle, length = (top + bottom) / 2, np.where(top > bottom, top - bottom, 1)
    mean = (w * x).sum(axis=1) / w.sum(axis=1)
    store = _to_half if levels.half else _to_common

    def nearest(scale: Float64, minimum: Float64) -> Float64:
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        codes: Float64 = np.clip(np.rint((x - minimum[:, None]) * inverse[:, None]), 0, levels.high)
        return codes

    def least_squares(codes: Float64) -> tuple[Float64, Float64]:
        """Weighted regression of the weights on the levels, about their means."""
        total = w.sum(axis=1, keepdims=True)
        mean_x, mean_l = (w * x).sum(axis=1, keepdims=True) / total, (w * codes).sum(axis=1, keepdims=True) / total
        mixed, square = (w * (x - mean_x) * (codes - mean_l)).sum(axis=1), (w * (codes - mean_l) ** 2).sum(axis=1)
        scale = np.divide(mixed, square, out=np.zeros_like(mixed), where=square > 0)
        return scale, mean_x[:, 0] - scale * mean_l[:, 0]

    def error_of(codes: Float64, scale: Float64, minimum: Float64) -> Float64:
        total: Float64 = np.sum(w * (x - scale[:, None] * codes - minimum[:, None]) ** 2, axis=1)
        return total

    def error(scale: Float64, minimum: Float64) -> Float64:
        return error_of(nearest(scale, minimum), scale, minimum)

    def refit(pair: Pair, codes: Float64) -> Pair:
        """The least-squares pair of `codes` where it leaves less error than the best so far."""
        found = least_squares(codes)
        left = error_of(codes, *found)
        return Pair(*(np.where(left < pair.error, new, old) for new, old in zip((*found, left), pair, strict=True)))

    def stored(scale: Float64, minimum: Float64) -> tuple[Float64, Float64]:
        """Rounded; a fitted line is turned about the mean of weights and levels when its scale is rounded."""
        kept = store(scale)
        turn = np.divide(kept, scale, out=np.ones_like(scale), where=scale != 0)
        return kept, store(mean + (minimum - mean) * turn)

    def refined(pair: Pair) -> list[tuple[Float64, ...]]:
        found = [stored(pair.scale, pair.minimum)]
        for _ in range(2):
            found.append(stored(*least_squares(nearest(*found[-1]))))
        return list(found)

    path, ladder = trials
    plain = length / levels.high, bottom
    starts = []
    if path.size:
        best = Pair(*plain, error(*plain))
        for step in path.astype(np.float64):
            span = np.maximum(top - best.minimum, length / 4)
            best = refit(best, nearest(span / (levels.high + step), top - span))
        starts += refined(best)
    best = Pair(np.zeros(len(x)), middle, np.full(len(x), np.inf))
    for steps, at_middle in ladder.astype(np.float64):
        best = refit(best, nearest(length / steps, middle - length / steps * at_middle))
    starts += refined(best)
    scale, minimum = _least(error, [*starts, (store(plain[0]), store(plain[1]))])
    varied: list[tuple[Float64, ...]] = [(scale, minimum)]
    for factor, levels_moved in changes.astype(np.float64):
        turned = mean + (minimum - mean) * factor + scale * factor * levels_moved
        varied.append((store(scale * factor), store(turned)))
    scale, minimum = _least(error, varied)
    return (
        scale.reshape(len(weights), -1).astype(np.float32),
        minimum.reshape(len(weights), -1).astype(np.float32),
    )


def _groups(weights: Float32, importance: Float32 | None, levels: Levels) -> tuple[Float64, Float64]:
    """Weights and the weights of their errors, (groups, group)."""
    steering = usable_importance(importance, weights.shape[1], levels.group)
    w = error_weights(weights, steering, levels.spread and importance is not None)
    return weights.astype(np.float64).reshape(-1, levels.group), w.astype(np.float64).reshape(-1, levels.group)


def _least(error: Callable[..., Float64], candidates: list[tuple[Float64, ...]]) -> tuple[Float64, ...]:
    """The candidate of least error for each group, the first of equals."""
    choice = np.argmin([error(*candidate) for candidate in candidates], axis=0)
    fields = zip(*candidates, strict=True)
    return tuple(np.choose(choice, list(field)) for field in fields)


def _to_half(values: Float64) -> Float64:
    stored: Float64 = np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float64)
    return stored


def _to_brain(values: Float64) -> Float64:
    return bfloat16_to_float32(float32_to_bfloat16(values.astype(np.float32))).astype(np.float64)


def _to_common(values: Float64) -> Float64:
    """Numbers that float16 and bfloat16 both hold: eight bits, the last of them no less than 2^-24."""
    kept = np.clip(values, -LARGEST_COMMON, LARGEST_COMMON)
    return np.where(np.abs(kept) >= 2.0**-17, _to_brain(kept), np.rint(np.ldexp(kept, 24)) * 2.0**-24)
