"""Symmetric integers with one scale per group of consecutive weights: "int4-g128" has 4 bits and groups of 128.

w = scale * level, levels -2^(bits - 1) to 2^(bits - 1) - 1, scale > 0. Scales are bfloat16 values, so that they are
exact in models stored as bfloat16 or float32, and in float16 as long as they are normal there. The objective is the
squared error, weighted by the importance of the input channel.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope
from anyquant.grids.scales import Levels, find_scales, spread_out

CANDIDATES = 32
# bits -> the levels on which the search tries to put the largest weight: the fewer levels, the more clipping pays
LADDERS = {
    2: (0.9, 5.0),
    3: (2.6, 8.5),
    4: (6.2, 14.5),
    5: (13.3, 22.0),
    6: (28.5, 36.5),
    7: (59.0, 66.5),
    8: (118.0, 130.0),
}


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Codes are the levels, int8; the parameter "scale" is float32 (rows, in / group), of bfloat16 values."""

    levels: Levels = field(default=Levels(128, -8, 7, 7, signed=False, half=False, spread=False))

    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        """The best scales that the search finds, never worse than max |w| / highest level, and the nearest codes."""
        params = self.fit(weights, importance, shared)
        return params, self.encode(weights, params)

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """The scales."""
        return {"scale": find_scales(weights, importance, self.levels, self.ladder())}

    def ladder(self) -> Float32:
        """The candidates of the search: levels on which the largest magnitude of a group comes to lie."""
        return np.linspace(*LADDERS[self.code_bits], CANDIDATES, dtype=np.float32)

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """Nearest levels, rint(w / scale) in float32, 0 where the scale is 0; whole rows are compiled code."""
        if columns is None:
            return self._encode_rows(weights, params)
        scale = spread_out(params["scale"], self.levels.group, columns)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        with np.errstate(over="ignore"):
            levels = np.clip(weights * inverse, self.levels.low, self.levels.high)
        return np.rint(levels).astype(np.int8)

    def _encode_rows(self, weights: Float32, params: Params) -> Codes:
        from anyquant.grids.kernels import symmetric

        flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
        scale = np.ascontiguousarray(params["scale"]).reshape(-1)
        codes = np.empty(weights.shape, dtype=np.int8)
        low, high = np.float32(self.levels.low), np.float32(self.levels.high)
        symmetric.encode(flat, scale, low, high, np.float32(0), codes.reshape(-1))
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """scale * level in float32: exact."""
        values = codes.astype(np.float32)
        values *= spread_out(params["scale"], self.levels.group, columns)
        return values


def make(name: str) -> IntegerGrid:
    """The grid "int{bits}-g{group}", bits 2 to 8, group 16, 32, 64, 128 or 256."""
    match = re.fullmatch(r"int([2-8])-g(16|32|64|128|256)", name)
    if match is None:
        raise UsageError(f"unknown integer grid {name!r}; expected int2 to int8 and -g16 to -g256, such as int4-g128")
    bits, group = int(match[1]), int(match[2])
    highest = 2 ** (bits - 1) - 1
    return IntegerGrid(
        name=name,
        family="integer",
        block=(1, group),
        code_dtype="int8",
        code_bits=bits,
        parameters=(Parameter("scale", "float32", 16, Scope.BLOCK, group),),
        levels=Levels(group, -highest - 1, highest, highest, signed=False, half=False, spread=False),
    )
