"""The search for I-quants in plain NumPy: the oracle of grids/kernels/iquant*.py, stage for stage the same.

Two things differ: sums are double precision, and every entry of a codebook is compared, where the kernel looks at the
candidates of a pattern. So errors agree closely, codes mostly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.grids.iquant_search import (
    BLOCK,
    LATTICES,
    LEVELS,
    SEARCHES,
    SUPER,
    Effort,
    Integers,
    Lattice,
    codebook,
    error_weights,
)
from anyquant.grids.kquant_search import LARGEST_HALF, TINY

Float64 = npt.NDArray[np.float64]
Stored = dict[str, npt.NDArray[np.generic]]

STEPS = np.array(LEVELS, dtype=np.float64)


def quantize_reference(name: str, weights: Float32, importance: Float32 | None) -> tuple[Stored, Integers]:
    """Parameters and codes of `weights` (rows, in); `importance` from `relative_importance`."""
    objective, effort = SEARCHES[name].choose(importance)
    block = BLOCK if name == "iq4_nl" else SUPER
    reach = LARGEST_HALF * _most(name)
    x = np.clip(weights, -reach, reach).astype(np.float64)
    x[np.abs(x) <= TINY] = 0
    given = np.ones(1, dtype=np.float32) if importance is None else importance
    by = error_weights(objective, objective.search_factor, block, x.astype(np.float32), given).astype(np.float64)
    search = lattice_search if name in LATTICES else level_search
    rows = len(weights)
    params, codes = search(name, effort, x.reshape(-1, block), by.reshape(-1, block))
    return {key: value.reshape(rows, -1) for key, value in params.items()}, codes.reshape(rows, -1)


def _most(name: str) -> float:
    """The largest value of a grid in units of d."""
    if name in LATTICES:
        lattice = LATTICES[name]
        return 31 * lattice.unit * (lattice.first + lattice.step * lattice.highest)
    return 113 * (1 if name == "iq4_nl" else 31)


def ratio(numerator: Float64, denominator: Float64) -> Float64:
    """numerator / denominator, 0 where that is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def half(value: Float64) -> Float64:
    """Rounded to float16, saturating."""
    return np.clip(value, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float64)


def half_step(value: Float64) -> Float64:
    """Like `half`, but the smallest float16 instead of 0."""
    return np.where(value == 0, 0, np.copysign(np.maximum(np.abs(half(value)), 2.0**-24), value))


def settle(ideal: Float64, weight: Float64, trials: tuple[float, ...], lattice: Lattice | None) -> Float64:
    """Float16 d (supers, 1) whose multiples are near the `ideal` scales (supers, sub-blocks)."""
    unit = 1.0 if lattice is None else lattice.unit
    top = np.take_along_axis(ideal, np.abs(ideal).argmax(axis=1)[:, None], axis=1)
    least, chosen = np.full_like(top, np.inf), np.zeros_like(top)
    for trial in trials:
        d = half_step(top / (unit * trial))
        missed = ideal - d * unit * factor(integer_of(ideal, d * unit, lattice), lattice)
        loss = (weight * missed * missed).sum(axis=1, keepdims=True)
        chosen, least = np.where(loss < least, d, chosen), np.minimum(loss, least)
    return chosen


def integer_of(scale: Float64, step: Float64, lattice: Lattice | None) -> Float64:
    """The stored integer whose scale is near `scale`."""
    wanted = ratio(scale, np.broadcast_to(step, scale.shape))
    if lattice is None:
        return np.clip(np.rint(wanted), -32, 31)
    return np.clip(np.rint((wanted - 1) / 2), 0, 15)


def factor(integer: Float64, lattice: Lattice | None) -> Float64:
    """What a stored integer multiplies d * unit with."""
    return integer if lattice is None else 2 * integer + 1


@dataclass(frozen=True)
class Sums:
    """Per sub-block: sum w x l and sum w l^2 of the levels l that were chosen."""

    xl: Float64
    ll: Float64

    def explained(self, scale: Float64) -> Float64:
        """By how much `scale` times the levels lowers the sum of w x^2."""
        return scale * (2 * self.xl - scale * self.ll)

    def replaced(self, better: npt.NDArray[np.bool_], other: "Sums") -> "Sums":
        return Sums(np.where(better, other.xl, self.xl), np.where(better, other.ll, self.ll))


Summing = Callable[[Float64], Sums]


def level_search(name: str, effort: Effort, x: Float64, w: Float64) -> tuple[Stored, Integers]:
    """iq4_nl and iq4_xs."""
    x, w = (values.reshape(len(x), -1, BLOCK) for values in (x, w))

    def nearest(scale: Float64) -> Integers:
        scaled = ratio(x, np.broadcast_to(scale[..., None], x.shape))
        return np.searchsorted((STEPS[1:] + STEPS[:-1]) / 2, scaled, side="right")

    def sums(scale: Float64) -> Sums:
        level = STEPS[nearest(scale)]
        return Sums((w * x * level).sum(axis=2), (w * level * level).sum(axis=2))

    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=2)[..., None], axis=2)[..., 0]
    ideal, weight = best_ideal([extreme / step for step in effort.steps], sums)
    if name == "iq4_nl":
        d, gained = np.zeros_like(ideal), np.full_like(ideal, -np.inf)
        for _ in range(effort.rounds + 1):
            trial = half_step(ideal)
            found = sums(trial)
            better = found.explained(trial) > gained
            d, gained = np.where(better, trial, d), np.where(better, found.explained(trial), gained)
            ideal = ratio(found.xl, found.ll)
        return {"d": d.astype(np.float16)}, nearest(d).astype(np.uint8)
    d = settle(ideal, weight, SEARCHES[name].trials, None)
    integer = integer_of(ideal, d, None)
    for _ in range(effort.rounds):
        d, integer = refine(d, integer, effort.reach, None, sums)
    return {"d": d.astype(np.float16), "scale": integer.astype(np.int8)}, nearest(d * integer).astype(np.uint8)


def best_ideal(scales: list[Float64], sums: Summing) -> tuple[Float64, Float64]:
    """Of the least-squares scales that the trial `scales` lead to, the one that explains most; the sum of w l^2."""
    gained = np.full_like(scales[0], -np.inf)
    ideal, weight = np.zeros_like(gained), np.zeros_like(gained)
    for scale in scales:
        found = sums(scale)
        refitted = ratio(found.xl, found.ll)
        better = refitted * found.xl > gained
        gained, ideal = np.where(better, refitted * found.xl, gained), np.where(better, refitted, ideal)
        weight = np.where(better, found.ll, weight)
    return ideal, weight


def refine(d: Float64, integer: Float64, reach: int, lattice: Lattice | None, sums: Summing) -> tuple[Float64, Float64]:
    """The best stored scale near the present one, then d by least squares, rounded, if that is nearer."""
    unit, lowest, highest = (1.0, -32, 31) if lattice is None else (lattice.unit, 0, 15)
    before, gained = integer, np.full_like(integer, -np.inf)
    best = Sums(np.zeros_like(integer), np.zeros_like(integer))
    for offset in range(-reach, reach + 1):
        trial = np.clip(before + offset, lowest, highest)
        scale = d * unit * factor(trial, lattice)
        found = sums(scale)
        better = found.explained(scale) > gained
        gained, integer = np.where(better, found.explained(scale), gained), np.where(better, trial, integer)
        best = best.replaced(better, found)
    relative = unit * factor(integer, lattice)
    ideal = ratio(
        (relative * best.xl).sum(axis=1, keepdims=True), (relative * relative * best.ll).sum(axis=1, keepdims=True)
    )
    better = (np.abs(half(ideal) - ideal) < np.abs(d - ideal)) & ((lattice is None) | (half(ideal) > 0))
    return np.where(better, half(ideal), d), integer


def lattice_search(name: str, effort: Effort, x: Float64, w: Float64) -> tuple[Stored, Integers]:
    """iq3_s, iq3_xxs and iq2_s."""
    lattice = LATTICES[name]
    book = codebook(name).astype(np.float64)
    a = np.abs(x).reshape(len(x), -1, lattice.dims)
    by = w.reshape(a.shape)
    negative = (x < 0).reshape(a.shape)
    blocks = SUPER // lattice.width

    def choose(scale: Float64) -> tuple[Integers, Float64]:
        """Entry of each vector, and its magnitudes with the sign -1 where a sign is reversed."""
        spread = np.repeat(scale, a.shape[1] // blocks, axis=1)[..., None]
        error = -2 * spread * ((by * a) @ book.T) + spread**2 * (by @ (book * book).T)
        entry = error.argmin(axis=2)
        points = book[entry]
        if lattice.even:
            flip_one_of_two(spread, by * a, book, error, negative, entry, points)
        return entry, points

    def sums(scale: Float64) -> Sums:
        _, points = choose(scale)
        xl = (by * a * points).sum(axis=2).reshape(len(x), blocks, -1).sum(axis=2)
        return Sums(xl, (by * points * points).sum(axis=2).reshape(len(x), blocks, -1).sum(axis=2))

    extreme = np.abs(x).reshape(len(x), blocks, -1).max(axis=2)
    tops = [lattice.first + lattice.step * (step - 1) / 2 for step in effort.steps]
    ideal, weight = best_ideal([extreme / top for top in tops], sums)
    d = settle(ideal, weight, SEARCHES[name].trials, lattice)
    integer = integer_of(ideal, d * lattice.unit, lattice)
    for _ in range(effort.rounds):
        d, integer = refine(d, integer, effort.reach, lattice, sums)
    entry, points = choose(d * lattice.unit * (2 * integer + 1))
    signs = (negative ^ (points < 0)).reshape(len(x), -1, lattice.vector) << np.arange(lattice.vector)
    codes = joined(lattice, entry, signs.sum(axis=2))
    return {"d": d.astype(np.float16), "scale": integer.astype(np.uint8)}, codes


def flip_one_of_two(
    spread: Float64,
    wa: Float64,
    book: Float64,
    error: Float64,
    negative: npt.NDArray[np.bool_],
    entry: Integers,
    points: Float64,
) -> None:
    """Where two neighbouring vectors have an odd number of negative signs, choose again with one sign reversed."""
    odd = negative.reshape(len(wa), -1, 8).sum(axis=2) % 2 == 1
    dearer = error + 4 * spread * (wa[:, :, None, :] * book).min(axis=3)
    pairs = error.min(axis=2).reshape(len(wa), -1, 2), dearer.min(axis=2).reshape(len(wa), -1, 2)
    second = pairs[0][..., 0] + pairs[1][..., 1] < pairs[1][..., 0] + pairs[0][..., 1]
    for super_block, pair in zip(*np.nonzero(odd), strict=True):
        vector = 2 * pair + int(second[super_block, pair])
        chosen = dearer[super_block, vector].argmin()
        entry[super_block, vector] = chosen
        points[super_block, vector] = book[chosen]
        points[super_block, vector, (wa[super_block, vector] * book[chosen]).argmin()] *= -1


def joined(lattice: Lattice, entry: Integers, signs: Integers) -> Integers:
    """Codes of entries and sign bits."""
    if not lattice.even:
        return (entry | (signs << lattice.index_bits)).astype(lattice.code_dtype)
    pairs = entry.reshape(len(entry), -1, 2)
    both = pairs[..., 0] | (pairs[..., 1] << lattice.index_bits)
    return (both | ((signs & 127) << (2 * lattice.index_bits))).astype(lattice.code_dtype)
