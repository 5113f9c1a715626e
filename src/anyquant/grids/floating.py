"""Floating-point grids f32, f16, bf16: a code is the stored bit pattern, there are no parameters.

Rounding is to nearest, ties to even (IEEE 754). Decoding is exact, since each type embeds in float32.
"""

from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Float32, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.grid import Codes, Grid, Params

BITS = {"f32": 32, "f16": 16, "bf16": 16}


@dataclass(frozen=True)
class FloatingGrid(Grid):
    """Codes are uint32 (f32) or uint16 (f16, bf16) bit patterns, one per weight."""

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """No parameters; `importance` changes nothing."""
        return {}

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """Nearest values. Raises UnsupportedError when a finite weight would become infinite."""
        values = np.ascontiguousarray(weights, dtype=np.float32)
        if self.name == "f32":
            return values.view(np.uint32).copy()
        if self.name == "f16":
            with np.errstate(over="ignore"):
                codes = values.astype(np.float16).view(np.uint16)
            infinite = 0x7C00
        else:
            codes = float32_to_bfloat16(values)
            infinite = 0x7F80
        overflow = ((codes & 0x7FFF) == infinite) & np.isfinite(values)
        if overflow.any():
            raise UnsupportedError(
                f"{self.name} cannot hold the weight {float(values[overflow][0]):.8g}: it rounds to infinity; use f32"
            )
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """Exact values of the bit patterns."""
        stored = np.ascontiguousarray(codes)
        if self.name == "f32":
            return stored.view(np.float32).copy()
        if self.name == "f16":
            return stored.view(np.float16).astype(np.float32)
        return bfloat16_to_float32(stored)


def make(name: str) -> FloatingGrid:
    """The grid "f32", "f16" or "bf16"."""
    if name not in BITS:
        raise UsageError(f"unknown floating grid {name!r}; known: {', '.join(BITS)}")
    bits = BITS[name]
    return FloatingGrid(name=name, family="floating", block=(1, 1), code_dtype=f"uint{bits}", code_bits=bits)
