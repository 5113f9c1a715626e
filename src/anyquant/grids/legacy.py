"""ggml's simple blocks of 32 weights: q8_0, q4_0, q5_0 (w = d * level) and q4_1, q5_1 (w = d * code + m).

d and m are stored as float16. Without importance the objective is the squared error; with importance a of the input
channels the 4- and 5-bit grids weigh it by a * sqrt(mean of the row's w^2 + w^2), as ggml's own search does.
"""

from dataclasses import dataclass, field

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.recode import Int32, regrouped, without_shift
from anyquant.grids.scales import (
    LARGEST_HALF,
    Levels,
    Trials,
    apply_by_group,
    error_weights,
    find_pairs,
    find_scales,
    spread_out,
)

BLOCK = 32
Ladder = tuple[tuple[float, ...], ...]

# what ggml's searches with importance add to the levels, of the lowest one and of a range in turn: who tries all that
# it tries is not worse on any matrix
GGMLS_STEPS = tuple(k / 10 for k in range(-9, 10))
GGMLS_PATH = tuple((k - 18) / 20 for k in range(37))


@dataclass(frozen=True)
class LegacyGrid(Grid):
    """A code c stands for level c - `zero` of `levels`; `affine` grids also have a minimum m.

    `ladders` are the candidates of the search without and with importance; none for q8_0, which does not search.
    `path`: more candidates of affine grids with importance, see `find_pairs`.
    """

    zero: int = 0
    affine: bool = False
    levels: Levels = field(default=Levels(BLOCK, -127, 127, 127, signed=False, half=True, spread=False))
    ladders: tuple[Ladder, ...] = ()
    path: tuple[float, ...] = ()

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """The best d (rows, in / 32) float16 that the search finds, and m for affine grids.

        `weights` (rows, in) finite; values beyond what float16 d can reach saturate.
        """
        if not self.ladders:
            return {"d": _largest_on_127(weights)}
        important = importance is not None
        if self.affine:
            scales, minima = find_pairs(weights, importance, self.levels, self.trials(important))
            return {"d": scales.astype(np.float16), "m": minima.astype(np.float16)}
        return {"d": find_scales(weights, importance, self.levels, self.ladder(important)).astype(np.float16)}

    def ladder(self, important: bool) -> Float32:
        """The candidates of the search: levels of the largest weight, or (levels per range, level of the middle)."""
        chosen = np.array(self.ladders[important], dtype=np.float32)
        return chosen if self.affine else chosen.reshape(-1)

    def trials(self, important: bool) -> Trials:
        """The path, empty without importance, and the ladder of an affine grid."""
        return np.array(self.path if important else (), dtype=np.float32), self.ladder(important)

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """Nearest codes, rint((w - m) / d) in float32; whole rows are compiled code."""
        if columns is None:
            return self._encode_rows(weights, params)
        d = spread_out(params["d"], BLOCK, columns)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
        shifted = weights - spread_out(params["m"], BLOCK, columns) if self.affine else weights
        with np.errstate(over="ignore"):
            levels = np.clip(shifted * inverse, self.levels.low, self.levels.high)
        return (np.rint(levels) + np.float32(self.zero)).astype(self.code_dtype)

    def _encode_rows(self, weights: Float32, params: Params) -> Codes:
        from anyquant.grids.kernels import affine, symmetric

        flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
        codes = np.empty(weights.shape, dtype=self.code_dtype)
        d = params["d"].astype(np.float32).reshape(-1)
        low, high, zero = np.float32(self.levels.low), np.float32(self.levels.high), np.float32(self.zero)
        if self.affine:
            affine.encode(flat, d, params["m"].astype(np.float32).reshape(-1), high, codes.reshape(-1))
        else:
            symmetric.encode(flat, d, low, high, zero, codes.reshape(-1))
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """d * (code - zero), or d * code + m, in float32: bit for bit what gguf's reader gives."""
        values = codes.astype(np.float32)
        values -= np.float32(self.zero)
        apply_by_group(np.multiply, values, params["d"], BLOCK, columns)
        if self.affine:
            apply_by_group(np.add, values, params["m"], BLOCK, columns)
        return values

    def hold(self, levels: Int32, scale: Float32, shift: Float32) -> tuple[Params, Codes] | None:
        """d and m as float16."""
        groups = levels.shape[1] // BLOCK
        spread = [regrouped(values, groups) for values in (scale, shift)]
        if spread[0] is None or spread[1] is None:
            return None
        scale, shift = spread[0], spread[1]
        low, high = self.levels.low, self.levels.high
        if self.code_dtype == "int8":
            low = -128  # the search keeps to 127 on both sides, a byte holds one more
        if not self.affine:
            counted = without_shift(levels, scale, shift)
            if counted is None or not _within(counted[0], low, high):
                return None
            return self._held(counted[1], None), (counted[0] + self.zero).astype(self.code_dtype)
        grouped = levels.reshape(len(levels), groups, -1)
        lowest = grouped.min(axis=2)
        # levels that are codes already keep their place; others are counted from the middle, or from their own lowest
        middle = np.where(lowest >= -(high + 1) // 2, -(high + 1) // 2, lowest)
        start = np.where(lowest >= low, 0, middle).astype(np.int32)
        grouped = grouped - start[:, :, None]
        if not _within(grouped, low, high):
            return None
        return self._held(scale, shift + start * scale), grouped.reshape(levels.shape).astype(self.code_dtype)

    def _held(self, scale: Float32, shift: Float32 | None) -> Params:
        with np.errstate(over="ignore"):
            d = {"d": scale.astype(np.float16)}
            return d if shift is None else {**d, "m": shift.astype(np.float16)}

    def lattice(self, params: Params) -> Lattice:
        """d * level, or d * level + m, levels of `levels`."""
        levels = np.arange(self.levels.low, self.levels.high + 1)
        scale = params["d"].astype(np.float32)
        shift = params["m"].astype(np.float32) if self.affine else np.zeros_like(scale)
        codes = (levels + self.zero).astype(self.code_dtype)
        return Lattice(levels.astype(np.float32), codes, scale, shift, BLOCK, uniform=True)

    def weighting(self, weights: Float32, importance: Float32 | None = None) -> Float32:
        """Weight of each squared error in the objective of `quantize`, shape of `weights`."""
        return error_weights(weights, importance, self.levels.spread)


def _within(levels: Int32, low: int, high: int) -> bool:
    return bool(levels.min(initial=0) >= low and levels.max(initial=0) <= high)


def _largest_on_127(weights: Float32) -> Codes:
    """q8_0's d = max |w| / 127. No search: a smaller d clips more than it gains at this resolution."""
    from anyquant.grids.kernels import symmetric

    flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
    largest = np.empty(flat.size // BLOCK, dtype=np.float32)
    symmetric.largest_magnitudes(flat, largest)
    d: Codes = np.minimum(largest / np.float32(127), np.float32(LARGEST_HALF)).astype(np.float16)
    return d.reshape(len(weights), -1)


def _either_end(bits: int, low_steps: tuple[float, ...], high_steps: tuple[float, ...]) -> Ladder:
    """Candidates that put the largest weight near the lowest level, then near the highest.

    The steps are levels beyond the range, up to 0.9 inside it: the more some weights matter, the more clipping pays.
    """
    low, high = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    return tuple([(-(low + step),) for step in low_steps] + [(high + step,) for step in high_steps])


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * k / (count - 1) for k in range(count))


def _ranges(bits: int, ends: tuple[float, float], count: int, shifts: tuple[float, ...]) -> Ladder:
    """`count` ranges of 2^bits - 1 + `ends` levels, each with the middle at the middle level plus each of `shifts`."""
    high = 2**bits - 1
    return tuple((high + step, high / 2 + shift) for step in _evenly(*ends, count) for shift in shifts)


def make(name: str) -> LegacyGrid:
    """The grid "q8_0", "q4_0", "q4_1", "q5_0" or "q5_1"."""
    if name not in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"):
        raise UsageError(f"unknown legacy grid {name!r}; known: q8_0, q4_0, q4_1, q5_0, q5_1")
    bits, affine = int(name[1]), name.endswith("1")
    half = 2 ** (bits - 1)
    d = Parameter("d", "float16", 16, Scope.BLOCK, BLOCK)
    m = Parameter("m", "float16", 16, Scope.BLOCK, BLOCK)
    if name == "q8_0":
        return LegacyGrid(name, "legacy", (1, BLOCK), "int8", bits, (d,))
    if affine:
        return LegacyGrid(
            name=name,
            family="legacy",
            block=(1, BLOCK),
            code_dtype="uint8",
            code_bits=bits,
            parameters=(d, m),
            affine=True,
            levels=Levels(BLOCK, 0, 2 * half - 1, 2 * half - 1, signed=False, half=True, spread=True),
            ladders=(
                _ranges(bits, (-0.8, 1.2), 5, (-0.5, 0.0, 0.5)),
                _ranges(bits, (-0.5, 3.0), 7, (-0.75, -0.25, 0.25, 0.75)),
            ),
            path=GGMLS_PATH,
        )
    return LegacyGrid(
        name=name,
        family="legacy",
        block=(1, BLOCK),
        code_dtype="uint8",
        code_bits=bits,
        parameters=(d,),
        zero=half,
        levels=Levels(BLOCK, -half, half - 1, -half, signed=True, half=True, spread=True),
        ladders=(
            _either_end(bits, _evenly(-0.9, 0.9, 8), _evenly(-0.9, 0.9, 8)),
            _either_end(bits, (*GGMLS_STEPS, 1.2, 1.5, 2.0), _evenly(-0.9, 2.0, 16)),
        ),
    )
