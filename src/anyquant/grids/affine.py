"""MLX's affine groups: one scale and one bias, both stored, for a group of consecutive weights of a row.

    affine4-g64    w = q * scale + bias    q 0 to 15, groups of 64

Source: `mx.quantize`, mode "affine" (mlx 0.32, https://github.com/ml-explore/mlx, mlx/backend/cpu/quantized.cpp). MLX
stores scale and bias in the type of the model, float16, bfloat16 or float32; parameters of another 16-bit type than the
model's would make it compute in float32. So both are numbers here that all these types hold: bfloat16, no larger than
float16's, and multiples of 2^-24. The eight bits cost next to nothing, because levels are chosen under the stored
values, which `mx.quantize` does not do.
"""

import re
from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.scales import Levels, Trials, apply_by_group, find_pairs, spread_out

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
PATTERN = re.compile(r"affine([234568])-g(32|64|128)")
# bits -> the levels that the range of a group may span, and how many trials, without and with importance: the fewer
# levels, the more clipping pays; with importance it pays to fit few weights and clip, or waste levels on, the others
RANGES = {
    2: ((1.8, 5.0, 12), (1.2, 8.0, 20)),
    3: ((5.5, 11.0, 12), (3.5, 16.0, 20)),
    4: ((13.2, 20.0, 9), (8.0, 26.0, 18)),
    5: ((29.0, 37.0, 7), (20.0, 44.0, 12)),
    6: ((60.5, 70.0, 5), (50.0, 78.0, 10)),
    8: ((252.0, 262.0, 5), (240.0, 270.0, 8)),
}
SHIFTS = ((-0.33, 0.0, 0.33), (-0.75, -0.25, 0.25, 0.75))  # levels by which the middle of the range is moved
# the last bit of stored scale and bias is a good part of a level where there are many
STEP = 2.0**-8
MOVES = (0.0, -0.5, 0.5)
STEPS = {2: 0, 3: 0, 4: 1, 5: 1, 6: 2, 8: 3}


@dataclass(frozen=True)
class AffineGrid(Grid):
    """The parameters "scale" and "bias" are 16-bit values held as float32 (rows, in / group); codes are uint8.

    What other tools have stored may be any float32.
    """

    @property
    def group(self) -> int:
        return self.block[1]

    @property
    def levels(self) -> Levels:
        """For `find_pairs`."""
        highest = (1 << self.code_bits) - 1
        return Levels(self.group, 0, highest, highest, signed=False, half=False, spread=False)

    def trials(self, important: bool) -> Trials:
        """An empty path, and the ladder: levels per range, level of its middle."""
        middle = self.levels.high / 2
        ladder = [
            (span, middle + shift)
            for span in np.geomspace(*RANGES[self.code_bits][important])
            for shift in SHIFTS[important]
        ]
        return np.zeros(0, dtype=np.float32), np.array(ladder, dtype=np.float32)

    def changes(self) -> Float32:
        """Of the pair that the ladder leads to: neighbours among stored values."""
        reach = range(-STEPS[self.code_bits], STEPS[self.code_bits] + 1)
        found = [(1 + STEP * step, move) for step in reach for move in MOVES if step or move]
        return np.array(found if STEPS[self.code_bits] else (), dtype=np.float32).reshape(-1, 2)

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """Scale, at least 0, and bias: the best that the search finds, never worse than from minimum to maximum."""
        scale, bias = find_pairs(weights, importance, self.levels, self.trials(importance is not None), self.changes())
        return {"scale": scale, "bias": bias}

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """Nearest codes, rint((w - bias) / scale) in float32, 0 where the scale is 0; whole rows are compiled code."""
        if columns is None:
            return self._encode_rows(weights, params)
        scale = spread_out(params["scale"], self.group, columns)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        with np.errstate(over="ignore"):
            levels = (weights - spread_out(params["bias"], self.group, columns)) * inverse
        codes: Codes = np.rint(np.clip(levels, 0, self.levels.high)).astype(self.code_dtype)
        return codes

    def _encode_rows(self, weights: Float32, params: Params) -> Codes:
        from anyquant.grids.kernels import affine

        codes = np.empty(weights.shape, dtype=self.code_dtype)
        flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
        scale, bias = (np.ascontiguousarray(params[name], dtype=np.float32).reshape(-1) for name in ("scale", "bias"))
        affine.encode(flat, scale, bias, np.float32(self.levels.high), codes.reshape(-1))
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """q * scale + bias in float32, rounded twice; MLX may fuse the two, or round to the type of the model."""
        values = codes.astype(np.float32)
        apply_by_group(np.multiply, values, params["scale"], self.group, columns)
        apply_by_group(np.add, values, params["bias"], self.group, columns)
        return values

    def lattice(self, params: Params) -> Lattice:
        """scale * q + bias."""
        levels = np.arange(self.levels.high + 1)
        codes = levels.astype(self.code_dtype)
        return Lattice(levels.astype(np.float32), codes, params["scale"], params["bias"], self.group, uniform=True)


def make(name: str) -> AffineGrid:
    """The grid "affine{bits}-g{group}", bits 2, 3, 4, 5, 6 or 8, groups of 32, 64 or 128."""
    match = PATTERN.fullmatch(name)
    if match is None:
        raise UsageError(
            f"unknown affine grid {name!r}; expected affine2, 3, 4, 5, 6 or 8, then -g32, -g64 or -g128, "
            "such as affine4-g64"
        )
    bits, group = int(match[1]), int(match[2])
    both = tuple(Parameter(one, "float32", 16, Scope.BLOCK, group) for one in ("scale", "bias"))
    return AffineGrid(name, "affine", (1, group), "uint8", bits, both)
