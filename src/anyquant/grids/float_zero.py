"""Integers with a scale and a zero-point that is any number, for groups of a row: what the hqq package fits.

    hqq4-g64    w = (code - zero) * scale    codes 0 to 15, groups of 64 weights of a row

In float32, in that order (hqq 0.2, core/quantize.py, Quantizer.dequantize). What is quantized here has the whole
zero-points of "int4-g64-asym", which are among them; the others come from files.
"""

import re
from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.integer import make as integer
from anyquant.grids.scales import apply_by_group, spread_out

PATTERN = re.compile(r"hqq([1234568])-g([1-9]\d{0,5})")
WHOLE = (16, 32, 64, 128, 256)  # groups for which the search of the integer grids is made


@dataclass(frozen=True)
class FloatZeroGrid(Grid):
    """Codes are uint8; the parameters "scale" and "zero" are float32 (rows, in / group)."""

    @property
    def group(self) -> int:
        return self.block[1]

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << self.code_bits) - 1

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """Those of the integer grid of this width; minimum to maximum where there is none."""
        if self.code_bits > 1 and self.group in WHOLE:
            found = integer(f"int{self.code_bits}-g{self.group}-asym").fit(weights, importance)
            return {"scale": found["scale"], "zero": found["zero"].astype(np.float32)}
        groups = weights.reshape(len(weights), -1, self.group)
        low, high = groups.min(axis=2), groups.max(axis=2)
        scale = np.where(high > low, (high - low) / np.float32(self.highest), np.float32(1))
        return {"scale": scale.astype(np.float32), "zero": (-low / scale).astype(np.float32)}

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        scale = spread_out(params["scale"], self.group, columns)
        zero = spread_out(params["zero"], self.group, columns)
        levels = np.divide(weights, scale, out=np.zeros_like(weights), where=scale != 0)
        return np.clip(np.rint(levels + zero), 0, self.highest).astype(np.uint8)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        values = codes.astype(np.float32)
        apply_by_group(np.subtract, values, params["zero"], self.group, columns)
        apply_by_group(np.multiply, values, params["scale"], self.group, columns)
        return values

    def lattice(self, params: Params) -> Lattice:
        levels = np.arange(self.highest + 1)
        shift = -params["scale"] * params["zero"]
        return Lattice(
            levels.astype(np.float32), levels.astype(np.uint8), params["scale"], shift, self.group, uniform=True
        )


def make(name: str) -> FloatZeroGrid:
    """The grid "hqq{bits}-g{group}", bits 1 to 6 or 8, a group of any width that divides the rows."""
    match = PATTERN.fullmatch(name)
    if match is None:
        raise UsageError(f"unknown grid {name!r}; expected hqq1 to hqq6 or hqq8 and a group, such as hqq4-g64")
    group = int(match[2])
    parameters = tuple(Parameter(one, "float32", 32, Scope.BLOCK, group) for one in ("scale", "zero"))
    return FloatZeroGrid(name, "float_zero", (1, group), "uint8", int(match[1]), parameters)
