"""ggml's simple blocks of 32 weights: q8_0, q4_0, q5_0 (w = d * level) and q4_1, q5_1 (w = d * code + m).

d and m are stored as float16. Without importance the objective is the squared error; with importance a of the input
channels the 4- and 5-bit grids weigh it by a * sqrt(mean of the row's w^2 + w^2), as ggml's own search does.
"""

from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope

BLOCK = 32
LARGEST_HALF = np.float32(65504)


@dataclass(frozen=True)
class LegacyGrid(Grid):
    """A code c stands for level c - `zero`, between `low` and `high`. `affine` grids also have a minimum m."""

    zero: int = 0
    low: int = 0
    high: int = 0
    affine: bool = False

    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        """The best d (and m) that the search finds, and the nearest codes under it.

        `weights` (rows, in) finite; values beyond what float16 d can reach saturate.
        """
        if self.name == "q8_0":
            return _quantize_eight(weights)
        raise NotImplementedError

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """The parameters that `quantize` finds."""
        return self.quantize(weights, importance, shared)[0]

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """Nearest codes, rint((w - m) / d) in float32."""
        d = self._spread(params["d"], weights.shape[1], columns)
        inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
        shifted = weights
        if self.affine:
            shifted = weights - self._spread(params["m"], weights.shape[1], columns)
        with np.errstate(over="ignore"):
            levels = np.clip(shifted * inverse, self.low, self.high)
        return (np.rint(levels) + np.float32(self.zero)).astype(self.code_dtype)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """d * (code - zero), or d * code + m, in float32: bit for bit what gguf's reader gives."""
        levels = codes.astype(np.float32) - np.float32(self.zero)
        values: Float32 = self._spread(params["d"], codes.shape[1], columns) * levels
        if self.affine:
            values += self._spread(params["m"], codes.shape[1], columns)
        return values

    def weighting(self, weights: Float32, importance: Float32 | None = None) -> Float32:
        """Weight of each squared error in the objective of `quantize`, shape of `weights`."""
        if importance is None or self.name == "q8_0":
            return super().weighting(weights, importance)
        mean_square = np.mean(weights.astype(np.float64) ** 2, axis=1, keepdims=True)
        spread = np.sqrt(mean_square + weights.astype(np.float64) ** 2)
        return (importance.astype(np.float64) * spread).astype(np.float32)

    def _spread(self, values: Codes, width: int, columns: slice | None) -> Float32:
        """A block parameter repeated for each of the `width` columns that are looked at."""
        start, stop, _ = (columns or slice(None)).indices(values.shape[1] * BLOCK)
        if columns is None:
            stop = width
        spread: Float32 = values.astype(np.float32)[:, np.arange(start, stop) // BLOCK]
        return spread


def _quantize_eight(weights: Float32) -> tuple[Params, Codes]:
    """q8_0: d = max |w| / 127, no search: a smaller d clips more than it gains at this resolution."""
    from anyquant.grids.kernels import legacy as kernels

    rows, columns = weights.shape
    flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
    largest = np.empty(flat.size // BLOCK, dtype=np.float32)
    kernels.largest_magnitudes(flat, largest)
    d = np.minimum(largest / np.float32(127), LARGEST_HALF).astype(np.float16)
    codes = np.empty((rows, columns), dtype=np.int8)
    kernels.encode_eight(flat, d.astype(np.float32), codes.reshape(-1))
    return {"d": d.reshape(rows, -1)}, codes


def make(name: str) -> LegacyGrid:
    """The grid "q8_0", "q4_0", "q4_1", "q5_0" or "q5_1"."""
    known = {
        # bits, code type, zero, lowest and highest level, affine
        "q8_0": (8, "int8", 0, -127, 127, False),
        "q4_0": (4, "uint8", 8, -8, 7, False),
        "q4_1": (4, "uint8", 0, 0, 15, True),
        "q5_0": (5, "uint8", 16, -16, 15, False),
        "q5_1": (5, "uint8", 0, 0, 31, True),
    }
    if name not in known:
        raise UsageError(f"unknown legacy grid {name!r}; known: {', '.join(known)}")
    bits, code_dtype, zero, low, high, affine = known[name]
    parameters = [Parameter("d", "float16", 16, Scope.BLOCK, BLOCK)]
    if affine:
        parameters.append(Parameter("m", "float16", 16, Scope.BLOCK, BLOCK))
    return LegacyGrid(
        name=name,
        family="legacy",
        block=(1, BLOCK),
        code_dtype=code_dtype,
        code_bits=bits,
        parameters=tuple(parameters),
        zero=zero,
        low=low,
        high=high,
        affine=affine,
    )
