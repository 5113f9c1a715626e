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

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, UnsupportedError
from anyquant.core.extras import require
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope
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

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.code_bits

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
        scale, shift = self._scale_and_shift(params, self._positions(params, columns))
        usable = scale != 0
        levels = np.divide(weights + shift, scale, out=np.zeros_like(scale), where=usable)
        lowest = -self.offset
        codes: Codes = (np.clip(np.rint(levels), lowest, lowest + self.levels - 1) - lowest).astype(np.uint8)
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        scale, shift = self._scale_and_shift(params, self._positions(params, columns))
        values: Float32 = scale * (codes.astype(np.float32) - np.float32(self.offset))
        return values if self.layout.symmetric else values - shift

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

    def _positions(self, params: Params, columns: slice | None) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        total = params["d"].shape[1] * SUPER
        start, stop, step = (columns or slice(None)).indices(total)
        if step != 1:
            raise AnyQuantError(f"{self.name}: a slice of columns must be contiguous, got step {step}")
        return np.arange(start, max(start, stop))

    def _scale_and_shift(
        self, params: Params, positions: np.ndarray[tuple[int], np.dtype[np.intp]]
    ) -> tuple[Float32, Float32]:
        """What a level is multiplied with and what is then subtracted, per weight (rows, len(positions)).

        One product per sub-block in float32, as gguf-py computes it.
        """
        first, last = (positions[0], positions[-1]) if len(positions) else (0, -1)
        blocks = np.arange(first // self.layout.width, last // self.layout.width + 1)
        owners = blocks * self.layout.width // SUPER
        inside = positions // self.layout.width - first // self.layout.width
        scale = params["d"][:, owners].astype(np.float32) * params["scale"][:, blocks].astype(np.float32)
        if self.layout.symmetric:
            return scale[:, inside], np.zeros((1, 1), dtype=np.float32)
        shift = params["dmin"][:, owners].astype(np.float32) * params["minimum"][:, blocks].astype(np.float32)
        return scale[:, inside], shift[:, inside]


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
