"""The K-quants of GGUF: super-blocks of 256 weights, whose sub-blocks have small integer scales.

    q2_k  w = d * scale * code - dmin * minimum      16 sub-blocks of 16, code 0..3, scale and minimum 4 bits
    q3_k  w = d * scale * (code - 4)                 16 of 16, code 0..7, scale -32..31
    q4_k  w = d * scale * code - dmin * minimum      8 of 32, code 0..15, scale and minimum 6 bits
    q5_k  w = d * scale * code - dmin * minimum      8 of 32, code 0..31, scale and minimum 6 bits
    q6_k  w = d * scale * (code - 32)                16 of 16, code 0..63, scale -128..127

d and dmin are float16, one per super-block. Weights beyond what they can reach (6e7 for q4_k) are stored as the largest
value, weights below half of 2**-24 as zero. Layout: ggml's src/ggml-common.h; decoding in the order of operations of
gguf-py's quants.py, bit for bit.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, UnsupportedError
from anyquant.core.extras import require
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.kquant_reference import quantize_reference
from anyquant.grids.kquant_search import LAYOUTS, SUPER, Layout, objective_weights, relative_importance

CODE_BITS = {"q2_k": 2, "q3_k": 3, "q4_k": 4, "q5_k": 5, "q6_k": 6}
SCALE_BITS = {"q2_k": 4, "q3_k": 6, "q4_k": 6, "q5_k": 6, "q6_k": 8}


@dataclass(frozen=True)
class KQuant(Grid):
    """One K-quant; `layout` says how levels, scales and the search for them look."""

    layout: Layout = field(kw_only=True)

    @property
    def offset(self) -> int:
        """What is subtracted from a code to get its level."""
        return self.layout.highest if self.layout.symmetric else 0

    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        require("numba")
        from anyquant.grids.kernels import kquant

        return kquant.quantize(self.layout, weights, self._steering(weights, importance))

    def quantize_reference(self, weights: Float32, importance: Float32 | None = None) -> tuple[Params, Codes]:
        """The same search in NumPy, slow and readable."""
        return quantize_reference(self.layout, weights, self._steering(weights, importance))

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        return self.quantize(weights, importance, shared)[0]

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        at = self._place(params, columns)
        scale, shift = self._scale_and_shift(params, at)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        lowest = np.float32(-self.offset)
        levels = (at.split(weights) + at.spread(shift)) * at.spread(inverse)
        np.rint(levels, out=levels)
        np.maximum(levels, lowest, out=levels)
        np.minimum(levels, lowest + np.float32(2**self.code_bits - 1), out=levels)
        levels -= lowest
        return levels.astype(np.uint8).reshape(weights.shape)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        at = self._place(params, columns)
        scale, shift = self._scale_and_shift(params, at)
        values: Float32 = at.split(codes).astype(np.float32)
        if self.offset:
            values -= np.float32(self.offset)
        values *= at.spread(scale)
        if not self.layout.symmetric:
            values -= at.spread(shift)
        return values.reshape(codes.shape)

    def lattice(self, params: Params) -> Lattice:
        """d * scale * level - dmin * minimum, for each sub-block."""
        scale, shift = self._scale_and_shift(params, self._place(params, None))
        codes = np.arange(2**self.code_bits, dtype=np.uint8)
        levels = codes.astype(np.float32) - np.float32(self.offset)
        return Lattice(levels, codes, scale, -shift, self.layout.width, uniform=True)

    def weighting(self, weights: Float32, importance: Float32 | None = None) -> Float32:
        """ggml's weight of each squared error, with `importance` as given."""
        objective = self.layout.plain if importance is None else self.layout.important
        given = np.ones(1, dtype=np.float32) if importance is None else importance.astype(np.float32)
        return objective_weights(objective, objective.factor, self.layout.width, weights, given)

    def _steering(self, weights: Float32, importance: Float32 | None) -> Float32 | None:
        """Importance as the search takes it, after a check of the shape."""
        reason = self.refuses((weights.shape[0], weights.shape[1]))
        if reason is not None:
            raise UnsupportedError(f"{self.name}: {reason}")
        return None if importance is None else relative_importance(importance, weights.shape[1])

    def _place(self, params: Params, columns: slice | None) -> "Place":
        total = params["d"].shape[1] * SUPER
        start, stop, step = (columns or slice(None)).indices(total)
        if step != 1:
            raise AnyQuantError(f"{self.name}: a slice of columns must be contiguous, got step {step}")
        return Place(start, max(start, stop), self.layout.width)

    def _scale_and_shift(self, params: Params, at: "Place") -> tuple[Float32, Float32]:
        """What a level is multiplied with and what is then subtracted, per sub-block, in gguf's order."""
        owners = at.blocks * self.layout.width // SUPER
        scale = params["d"][:, owners].astype(np.float32) * params["scale"][:, at.blocks].astype(np.float32)
        if self.layout.symmetric:
            return scale, np.zeros_like(scale)
        return scale, params["dmin"][:, owners].astype(np.float32) * params["minimum"][:, at.blocks].astype(np.float32)


@dataclass(frozen=True)
class Place:
    """Columns [start, stop) and the sub-blocks that they touch. Whole sub-blocks are handled by broadcasting."""

    start: int
    stop: int
    width: int

    @property
    def blocks(self) -> npt.NDArray[np.intp]:
        return np.arange(self.start // self.width, -(-self.stop // self.width))

    @property
    def whole(self) -> bool:
        return self.start % self.width == 0 and self.stop % self.width == 0

    def split(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values per weight, (rows, columns), as (rows, sub-blocks, width) when these are whole."""
        return values.reshape(len(values), len(self.blocks), self.width) if self.whole else values

    def spread(self, values: Float32) -> Float32:
        """Values per sub-block in a shape that fits `split`."""
        if self.whole:
            return values[:, :, None]
        return values[:, np.arange(self.start, self.stop) // self.width - self.start // self.width]


def make(name: str) -> KQuant:
    """The grid "q2_k", "q3_k", "q4_k", "q5_k" or "q6_k"."""
    layout = LAYOUTS[name]
    half = Parameter("d", "float16", 16, Scope.BLOCK, SUPER)
    bits, width = SCALE_BITS[name], layout.width
    parameters: tuple[Parameter, ...]
    if layout.symmetric:
        parameters = (half, Parameter("scale", "int8", bits, Scope.BLOCK, width))
    else:
        parameters = (
            half,
            Parameter("dmin", "float16", 16, Scope.BLOCK, SUPER),
            Parameter("scale", "uint8", bits, Scope.BLOCK, width),
            Parameter("minimum", "uint8", bits, Scope.BLOCK, width),
        )
    return KQuant(name, "kquant", (1, SUPER), "uint8", CODE_BITS[name], parameters, layout=layout)
