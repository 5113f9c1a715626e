"""8-bit floats with one float32 scale per tensor, row, block of 128 x 128 or group of 128: "fp8_e4m3-channel".

w = scale * value. Codes are bit patterns: E4M3 is the OCP type without infinities (torch.float8_e4m3fn, largest value
448), E5M2 the IEEE-like one (torch.float8_e5m2, 57344). Rounding is to nearest even and saturates; w / scale and
scale * value are float32 operations, as in compressed-tensors. Blocks are those of DeepSeek-V3: the last one in each
direction may be smaller.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.groups import WHOLE_ROW, gathered, scale_up, touched
from anyquant.grids.minifloat import E4M3, E5M2, MiniFloat, levels_of, values_of
from anyquant.grids.scales import usable_importance

BLOCK = 128
KINDS = {"e4m3": E4M3, "e5m2": E5M2}
# scope, and the rows and columns that share a scale where it is that of a block
REACHES = {
    "tensor": (Scope.TENSOR, 1, 0),
    "channel": (Scope.ROW, 1, 0),
    "block": (Scope.BLOCK, BLOCK, BLOCK),
    "g128": (Scope.BLOCK, 1, BLOCK),
}
LEAST = np.float32(2.0**-126)
LARGEST = 3.4e38
# the precision of a float does not depend on its scale but for where the binades end: one octave has all there is
LADDER = tuple(2.0 ** (step / 8) for step in range(8))


@dataclass(frozen=True)
class Float8Grid(Grid):
    """Codes are uint8 bit patterns; the parameter "scale" is float32, positive, of shape (1, 1), (rows, 1) or
    (ceil(rows / 128), ceil(in / 128)), of "-g128" (rows, ceil(in / 128))."""

    kind: MiniFloat = field(default=E4M3)

    @property
    def scale(self) -> Parameter:
        return self.parameters[0]

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of weights that share a scale."""
        return {
            Scope.TENSOR: (WHOLE_ROW, WHOLE_ROW),
            Scope.ROW: (1, WHOLE_ROW),
            Scope.BLOCK: (self.scale.rows, self.scale.columns),
        }[self.scale.scope]

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Never: blocks at the edges may be smaller."""
        return None

    def prepare(self, absolute_maximum: float, tie_group: tuple[float, ...] = ()) -> Params:
        """The scale of the tensor, for a scale that reaches over all of it."""
        if self.scale.scope is not Scope.TENSOR:
            return {}
        largest = np.array([[max((absolute_maximum, *tie_group))]], dtype=np.float32)
        return {"scale": self._covering(largest)}

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """The scales: that of a tensor as it is prepared, others by a search over one octave, never worse than
        max |w| / highest value. Slices of rows that are quantized apart begin at multiples of 128 rows where blocks do.
        """
        from anyquant.grids.kernels import minifloat

        params = self.plain(weights, shared)
        if self.scale.scope is Scope.TENSOR:
            return params
        high, wide = self.tile
        whole = np.ascontiguousarray(weights, dtype=np.float32)
        steering = usable_importance(importance, weights.shape[1], weights.shape[1])
        tile = (high, min(wide, weights.shape[1]))
        ladder = np.array(LADDER, dtype=np.float32)
        minifloat.factors(whole, steering, params["scale"], ladder, tile, self.kind.rounding)
        return {"scale": self._limited(params["scale"])}

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """max |w| / highest value, or what is `shared`."""
        if self.scale.scope is Scope.TENSOR and shared is not None:
            return {"scale": shared["scale"]}
        high, wide = self.tile
        magnitudes = np.abs(weights, dtype=np.float32)
        if wide < WHOLE_ROW:
            magnitudes = np.maximum.reduceat(magnitudes, np.arange(0, weights.shape[1], wide), axis=1)
        else:
            magnitudes = magnitudes.max(axis=1, keepdims=True)
        if high > 1:
            magnitudes = np.maximum.reduceat(magnitudes, np.arange(0, len(weights), high), axis=0)
        return {"scale": self._covering(magnitudes)}

    def _covering(self, largest: Float32) -> Float32:
        """Scales that put `largest` on the highest value; 1 where it is 0."""
        return self._limited(np.where(largest > 0, largest / np.float32(self.kind.highest), 1).astype(np.float32))

    def _limited(self, scale: Float32) -> Float32:
        """Neither subnormal nor so large that a value overflows."""
        return np.clip(scale, LEAST, np.float32(LARGEST / self.kind.highest))

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """The patterns nearest to w / scale, ties to even, saturating; compiled."""
        from anyquant.grids.kernels import minifloat

        scale, first = self._scales(params, len(weights), columns)
        codes = np.empty(weights.shape, dtype=np.uint8)
        whole = np.ascontiguousarray(weights, dtype=np.float32)
        minifloat.encode(whole, scale, first, self.tile[1], self.kind.rounding, codes)
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """scale * value in float32."""
        scale, first = self._scales(params, len(codes), columns)
        return scale_up(gathered(values_of(self.kind), codes), scale, first, self.tile[1])

    def _scales(self, params: Params, rows: int, columns: slice | None) -> tuple[Float32, int]:
        """Scales (rows or 1, groups that `columns` touch), and where in the first group the columns begin."""
        groups, first = touched(columns, self.tile[1])
        scale = np.ascontiguousarray(params["scale"][:, groups], dtype=np.float32)
        if self.scale.scope is Scope.BLOCK:
            scale = np.repeat(scale, self.scale.rows, axis=0)[:rows]
        return scale, first

    def lattice(self, params: Params) -> Lattice:
        """All finite values. The scale of a tensor stands for all rows; blocks may reach beyond the last row."""
        levels, codes = levels_of(self.kind)
        scale = params["scale"]
        if self.scale.scope is Scope.BLOCK:
            scale = np.repeat(scale, self.scale.rows, axis=0)
        return Lattice(levels, codes, scale, np.zeros_like(scale), self.tile[1], uniform=False)


def make(name: str) -> Float8Grid:
    """The grid "fp8_{e4m3|e5m2}-{tensor|channel|block|g128}"."""
    match = re.fullmatch(r"fp8_(e4m3|e5m2)-(tensor|channel|block|g128)", name)
    if match is None:
        raise UsageError(
            f"unknown fp8 grid {name!r}; expected fp8_e4m3 or fp8_e5m2 and -tensor, -channel, -block or -g128"
        )
    scope, high, wide = REACHES[match[2]]
    return Float8Grid(
        name=name,
        family="fp8",
        block=(high, max(wide, 1)),
        code_dtype="uint8",
        code_bits=8,
        parameters=(Parameter("scale", "float32", 32, scope, columns=wide, rows=high),),
        kind=KINDS[match[1]],
    )
