"""The search for K-quants in plain NumPy: the oracle of grids/kernels/kquant*.py, step for step the same.

Arrays have shape (super-blocks, sub-blocks, weights of a sub-block); sums run over the last axis. Everything is
float32 like the kernels, so the two differ by the order of additions only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.grids.kquant_search import LARGEST_HALF, SUPER, TINY, Effort, Layout, objective_weights

Params = dict[str, npt.NDArray[np.generic]]
Integers = Float32  # whole numbers, kept in float32

ZERO = np.float32(0)


SINGULAR = np.float32(1e-6)


@dataclass(frozen=True)
class Sums:
    """Weighted sums of one rounding per sub-block: w l, w l^2, w x l. Levels l count from the middle of their range."""

    l1: Float32
    l2: Float32
    xl: Float32


def ratio(numerator: Float32 | float, denominator: Float32) -> Float32:
    """numerator / denominator, 0 where the denominator is not positive."""
    top = np.broadcast_to(np.asarray(numerator, dtype=np.float32), denominator.shape)
    return np.divide(top, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def reciprocal(value: Float32) -> Float32:
    """1 / value, 0 for 0."""
    return np.divide(np.float32(1), value, out=np.zeros_like(value), where=value != 0)


def half(value: Float32) -> Float32:
    """Rounded to float16, saturating."""
    return np.clip(value, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float32)


def half_step(value: Float32) -> Float32:
    """Rounded to float16, but to the smallest one instead of 0: a step of 0 would lose the super-block."""
    return choose(value == 0, value, np.copysign(np.maximum(np.abs(half(value)), np.float32(2.0**-24)), value))


def nearest(value: Float32, lowest: float, highest: float) -> Integers:
    return np.clip(np.rint(value), np.float32(lowest), np.float32(highest))


def middle(highest: int) -> np.float32:
    """The level that sums count from."""
    return np.float32((highest + 1) // 2)


def choose(better: npt.NDArray[np.bool_], new: Float32, old: Float32) -> Float32:
    return np.where(better, new, old)


def quantize_reference(
    layout: Layout, weights: Float32, importance: Float32 | None
) -> tuple[Params, npt.NDArray[np.uint8]]:
    """Parameters and codes of `weights` (rows, in); `importance` from `relative_importance`."""
    rows, columns = weights.shape
    clipped = np.clip(weights.astype(np.float32), -layout.limit, layout.limit)
    flushed = np.where(np.abs(clipped) > TINY, clipped, ZERO)
    objective = layout.plain if importance is None else layout.important
    effort = layout.plain_effort if importance is None else layout.important_effort
    steering = np.ones(1, dtype=np.float32) if importance is None else importance
    w = objective_weights(objective, objective.search_factor, layout.width, flushed, steering)
    shape = (-1, SUPER // layout.width, layout.width)
    search = symmetric if layout.symmetric else affine
    params, codes = search(layout, effort, flushed.reshape(shape), w.reshape(shape), clipped.reshape(shape))
    return {name: value.reshape(rows, -1) for name, value in params.items()}, codes.reshape(rows, columns)


def affine(
    layout: Layout, effort: Effort, x: Float32, w: Float32, exact: Float32
) -> tuple[Params, npt.NDArray[np.uint8]]:
    """w = d * scale * level - dmin * minimum."""
    highest, most = layout.highest, layout.most
    centre = middle(highest)
    sum_w, sum_wx = w.sum(axis=2), (w * x).sum(axis=2)

    def sums(inverse: Float32, minimum: Float32) -> Sums:
        level = nearest((x - minimum[..., None]) * inverse[..., None], 0, highest) - centre
        weighted = w * level
        return Sums(weighted.sum(axis=2), (weighted * level).sum(axis=2), (weighted * x).sum(axis=2))

    scale, minimum, best = affine_search((effort, highest), x, (sum_w, sum_wx), sums)

    metric = np.maximum(best.l2 - best.l1 * ratio(best.l1, sum_w), ZERO)
    d = step_by_trial(scale, metric, layout)
    int_scale = nearest(ratio(scale, np.broadcast_to(d, scale.shape)), 0, most)
    shift = np.maximum((d * int_scale - scale) * (centre + ratio(best.l1, sum_w)) - minimum, ZERO)
    dmin = step_by_trial(shift, sum_w, layout)
    int_minimum = nearest(ratio(shift, np.broadcast_to(dmin, shift.shape)), 0, most)

    for _ in range(effort.rounds):
        int_scale, int_minimum, best = affine_neighbours(
            (d, dmin, int_scale, int_minimum), (sum_w, sum_wx), (highest, most), sums
        )
        d, dmin = affine_refit((d, dmin, int_scale, int_minimum), (sum_w, sum_wx), highest, best)

    lowest, per_level = dmin * int_minimum, ratio(1, d * int_scale)
    codes = nearest((exact + lowest[..., None]) * per_level[..., None], 0, highest).astype(np.uint8)
    return {
        "d": d.astype(np.float16),
        "dmin": dmin.astype(np.float16),
        "scale": int_scale.astype(np.uint8),
        "minimum": int_minimum.astype(np.uint8),
    }, codes


def explain(scale: Float32, offset: Float32, found: Sums, moments: tuple[Float32, Float32]) -> Float32:
    """By how much scale * l + offset lowers the sum of w x^2."""
    sum_w, sum_wx = moments
    gained = scale * (2 * (found.xl - offset * found.l1) - scale * found.l2)
    explained: Float32 = gained + offset * (2 * sum_wx - offset * sum_w)
    return explained


def squares_from_zero(found: Sums, sum_w: Float32, centre: np.float32) -> Float32:
    """Sum of w l^2 with levels counted from 0."""
    return found.l2 + (centre * (2 * found.l1 + centre * sum_w)).astype(np.float32)


def affine_search(
    how: tuple[Effort, int], x: Float32, moments: tuple[Float32, Float32], sums: Callable[[Float32, Float32], Sums]
) -> tuple[Float32, Float32, Sums]:
    """Ideal scale and minimum (not above 0) per sub-block, and the sums of the rounding that gave them."""
    effort, highest = how
    sum_w, sum_wx = moments
    centre = middle(highest)
    top, minimum = x.max(axis=2), np.minimum(x.min(axis=2), ZERO)
    scale, explained = (top - minimum) / np.float32(highest), np.zeros_like(top)
    best = Sums(explained, explained, explained)
    for step in np.asarray(effort.steps, dtype=np.float32):
        trial = sums(ratio(np.float32(highest) + step, top - minimum), minimum)
        determinant = sum_w * trial.l2 - trial.l1 * trial.l1
        inverse = ratio(1, determinant)
        new_scale = (sum_w * trial.xl - sum_wx * trial.l1) * inverse
        offset = (trial.l2 * sum_wx - trial.l1 * trial.xl) * inverse
        bounded = (offset > new_scale * centre) | (determinant < SINGULAR * sum_w * trial.l2)
        through_zero = ratio(trial.xl + centre * sum_wx, squares_from_zero(trial, sum_w, centre))
        new_scale = choose(bounded, through_zero, new_scale)
        offset = choose(bounded, new_scale * centre, offset)
        new_minimum = offset - new_scale * centre
        new_explained = explain(new_scale, offset, trial, moments)
        better = new_explained > explained
        explained = choose(better, new_explained, explained)
        scale, minimum = choose(better, new_scale, scale), choose(better, new_minimum, minimum)
        best = Sums(*(choose(better, getattr(trial, name), getattr(best, name)) for name in ("l1", "l2", "xl")))
    return scale, minimum, best


def step_by_trial(wanted: Float32, metric: Float32, layout: Layout) -> Float32:
    """Float16 step per super-block (n, 1), so that integers times it are near `wanted` (n, sub-blocks)."""
    least = np.full((len(wanted), 1), np.inf, dtype=np.float32)
    step = np.zeros_like(least)
    lowest, largest = (-layout.most, layout.most - 1) if layout.symmetric else (0, layout.most)
    extreme = np.abs(wanted).argmax(axis=1)
    top = np.take_along_axis(wanted, extreme[:, None], axis=1)
    sign = np.float32(-1 if layout.symmetric else 1)
    for relative in np.asarray(layout.trials, dtype=np.float32):
        reach = sign * (np.float32(layout.most) + relative * np.float32(layout.most))
        trial = half_step(top / reach)
        integer = nearest(wanted * (reciprocal(top) * reach), lowest, largest)
        missed = wanted - trial * integer
        loss = (missed * missed * metric).sum(axis=1, keepdims=True)
        step, least = choose(loss < least, trial, step), np.minimum(loss, least)
    return step


def affine_neighbours(
    stored: tuple[Float32, Float32, Integers, Integers],
    moments: tuple[Float32, Float32],
    limits: tuple[int, int],
    sums: Callable[[Float32, Float32], Sums],
) -> tuple[Integers, Integers, Sums]:
    """The stored pair of each sub-block, or the scale one more, one less or the same with the minimum that suits it."""
    d, dmin, int_scale, int_minimum = stored
    sum_w, sum_wx = moments
    highest, most = limits
    centre = middle(highest)

    def evaluate(integer: Integers, minimum: Integers) -> tuple[Float32, Sums]:
        scale, shift = d * integer, dmin * minimum
        found = sums(ratio(1, scale), -shift)
        return explain(scale, scale * centre - shift, found, moments), found

    explained, best = evaluate(int_scale, int_minimum)
    old_scale, old_l1 = int_scale, best.l1
    for change in (-1, 0, 1):
        trial = np.clip(old_scale + np.float32(change), ZERO, np.float32(most))
        shift = d * trial * centre - ratio(sum_wx - d * trial * old_l1, sum_w)
        trial_minimum = nearest(ratio(shift, np.broadcast_to(dmin, shift.shape)), 0, most)
        trial_explained, found = evaluate(trial, trial_minimum)
        better = trial_explained > explained
        explained = choose(better, trial_explained, explained)
        int_scale, int_minimum = choose(better, trial, int_scale), choose(better, trial_minimum, int_minimum)
        best = Sums(*(choose(better, getattr(found, name), getattr(best, name)) for name in ("l1", "l2", "xl")))
    return int_scale, int_minimum, best


def affine_refit(
    stored: tuple[Float32, Float32, Integers, Integers], moments: tuple[Float32, Float32], highest: int, best: Sums
) -> tuple[Float32, Float32]:
    """Least squares for (d, dmin) with levels and integers kept, rounded to float16, taken only if better."""
    d, dmin, integer, minimum = stored
    sum_w, sum_wx = moments
    centre = middle(highest)

    def total(values: Float32) -> Float32:
        added: Float32 = values.sum(axis=1, keepdims=True)
        return added

    scale, offset = d * integer, d * integer * centre - dmin * minimum
    left = sum_wx - scale * best.l1 - offset * sum_w
    left_l = best.xl - scale * best.l2 - offset * best.l1 + centre * left
    ss = total(integer * integer * squares_from_zero(best, sum_w, centre))
    sm, mm = total(-integer * minimum * (best.l1 + centre * sum_w)), total(minimum * minimum * sum_w)
    right_s, right_m = total(integer * left_l), total(-minimum * left)
    determinant = ss * mm - sm * sm
    regular = determinant > SINGULAR * ss * mm
    inverse = ratio(1, determinant)
    up = choose(regular, (mm * right_s - sm * right_m) * inverse, ratio(right_s, ss))
    down = choose(regular, (ss * right_m - sm * right_s) * inverse, np.zeros_like(ss))
    new_d, new_dmin = half(np.maximum(d + up, ZERO)), half(np.maximum(dmin + down, ZERO))
    up, down = new_d - d, new_dmin - dmin
    better = up * (ss * up + 2 * (sm * down - right_s)) + down * (mm * down - 2 * right_m) < 0
    return choose(better, new_d, d), choose(better, new_dmin, dmin)


def symmetric(
    layout: Layout, effort: Effort, x: Float32, w: Float32, exact: Float32
) -> tuple[Params, npt.NDArray[np.uint8]]:
    """w = d * scale * level, level in -highest .. highest - 1."""
    highest, most = layout.highest, layout.most

    def rounded(values: Float32, inverse: Float32) -> Integers:
        return nearest(values * inverse[..., None], -highest, highest - 1)

    def sums(inverse: Float32) -> tuple[Float32, Float32]:
        weighted = w * (level := rounded(x, inverse))
        return (weighted * level).sum(axis=2), (weighted * x).sum(axis=2)

    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=2)[..., None], axis=2)[..., 0]
    scale, explained, metric = np.zeros_like(extreme), np.zeros_like(extreme), np.zeros_like(extreme)
    for step in np.asarray(effort.steps, dtype=np.float32):
        l2, xl = sums(-(np.float32(highest) + step) * reciprocal(extreme))
        trial = ratio(xl, l2)
        better = trial * xl > explained
        explained = choose(better, trial * xl, explained)
        scale, metric = choose(better, trial, scale), choose(better, l2, metric)

    d = step_by_trial(scale, metric, layout)
    integer = nearest(scale * reciprocal(d), -most, most - 1)
    for _ in range(effort.rounds):
        integer, l2, xl = symmetric_neighbours(d, integer, most, sums)
        ideal = ratio((integer * xl).sum(axis=1, keepdims=True), (integer * integer * l2).sum(axis=1, keepdims=True))
        d = choose(np.abs(half(ideal) - ideal) < np.abs(d - ideal), half(ideal), d)
    codes = (rounded(exact, reciprocal(d * integer)) + highest).astype(np.uint8)
    return {"d": d.astype(np.float16), "scale": integer.astype(np.int8)}, codes


def symmetric_neighbours(
    d: Float32, old: Integers, most: int, sums: Callable[[Float32], tuple[Float32, Float32]]
) -> tuple[Integers, Float32, Float32]:
    """Per sub-block the stored scale, one less or one more: whichever leaves least once levels are rounded again."""
    explained = np.full(old.shape, -np.inf, dtype=np.float32)
    integer, best_l2, best_xl = old, np.zeros_like(old), np.zeros_like(old)
    for offset in (-1, 0, 1):
        trial = np.clip(old + np.float32(offset), np.float32(-most), np.float32(most - 1))
        scale = d * trial
        l2, xl = sums(reciprocal(scale))
        gained = scale * (2 * xl - scale * l2)
        better = gained > explained
        explained, integer = choose(better, gained, explained), choose(better, trial, integer)
        best_l2, best_xl = choose(better, l2, best_l2), choose(better, xl, best_xl)
    return integer, best_l2, best_xl
