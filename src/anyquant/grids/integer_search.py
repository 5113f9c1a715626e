"""Scales and integer zero-points by search: one pair for each group, row or matrix.

The candidates are ranges of more and less than the levels span, each refitted by weighted least squares; see
`grids.kernels.zero_point`. Zero-points are integers as GPTQ, AWQ, ONNX and compressed-tensors hold them: 0 is always
representable, and a range that lies on one side of it is widened to it.
"""

from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.grids.scales import Levels, Trials, find_scales, lanes_of, usable_importance

ROW, MATRIX = 0, -1  # in place of the columns of a group
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
# bits -> the levels that the range of a group may span, and how many trials, without and with importance, which makes
# it pay to fit few weights and clip, or waste levels on, the others
RANGES = {
    2: ((1.6, 8.0, 36), (1.4, 10.0, 48)),
    3: ((5.5, 16.0, 45), (3.5, 20.0, 64)),
    4: ((13.2, 30.0, 45), (8.0, 36.0, 95)),
    5: ((29.0, 60.0, 36), (20.0, 60.0, 64)),
    6: ((60.5, 90.0, 36), (50.0, 90.0, 64)),
    7: ((124.0, 150.0, 36), (114.0, 150.0, 64)),
    8: ((250.0, 275.0, 36), (240.0, 275.0, 64)),
}
SHIFTS = ((0.0, 1.0, -1.0), (0.0, 1.0, -1.0, 2.0, -2.0))  # of the zero-point, tried in turn along the ranges
CHANGES = {2: 0.03, 3: 0.015, 4: 0.01, 5: 0.005, 6: 0.003, 7: 0.001, 8: 0.0005}  # of the best scale, at the end
# among many weights the largest may lie far out: beyond the last candidate, this many more up to this many times it
FARTHER, FARTHEST = 48, 16.0
FARTHER_CHANGE = 0.01
STRIP = 512  # columns of a wide group come in multiples of this: the lanes of the kernel, eight deep


@dataclass(frozen=True)
class Search:
    """Integers of `bits` with one scale for `group` columns of a row, or for a whole ROW, or the MATRIX.

    `asymmetric`: and with one zero-point each, else code 2^(bits - 1), counted from 0, is zero. `half`: scales are
    stored as float16 instead of bfloat16.
    """

    bits: int
    group: int
    asymmetric: bool
    half: bool = False

    @property
    def middle(self) -> int:
        """The code of zero where it is not chosen, counted from the lowest."""
        return 1 << (self.bits - 1)

    @property
    def highest(self) -> int:
        """The highest code, counted from the lowest."""
        return (1 << self.bits) - 1

    def shape(self, matrix: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales of a matrix (rows, in)."""
        return 1 if self.group == MATRIX else matrix[0], matrix[1] // self.group if self.group > 0 else 1

    def ladder(self) -> Float32:
        """Symmetric candidates: the levels on which the largest weight comes to lie."""
        return np.linspace(*LADDERS[self.bits], CANDIDATES, dtype=np.float32)

    def levels(self) -> Levels:
        """Symmetric levels, for `find_scales`."""
        return Levels(
            self.group, -self.middle, self.middle - 1, self.middle - 1, signed=False, half=self.half, spread=False
        )

    def trials(self, important: bool) -> Trials:
        """Candidates (n, 2): levels per range (symmetric: per largest magnitude) and shift of the zero-point; then
        changes (n, 2) of the best of them: factor of its scale and term of its zero-point."""
        ladder = np.geomspace(*RANGES[self.bits][important]) if self.asymmetric else self.ladder().astype(np.float64)
        if self.group <= 0:
            ladder = np.concatenate([ladder, np.geomspace(ladder[-1], ladder[-1] * FARTHEST, FARTHER + 1)[1:]])
        shifts = np.resize(SHIFTS[important], ladder.size) if self.asymmetric else np.zeros(ladder.size)
        terms = (0.0, 1.0, -1.0) if self.asymmetric else (0.0,)
        change = CHANGES[self.bits] if self.group > 0 else max(CHANGES[self.bits], FARTHER_CHANGE)
        changes = [(1 + change * k, term) for term in terms for k in range(-2, 3) if k or term]
        return np.stack([ladder, shifts], axis=1).astype(np.float32), np.array(changes, dtype=np.float32)

    def find(self, weights: Float32, importance: Float32 | None) -> tuple[Float32, Float32]:
        """Scales, bfloat16 values > 0, and zero-points (codes of zero), float32 (rows or 1, groups of a row)."""
        shape = self.shape(weights.shape)
        if not self.asymmetric and self.group > 0:
            scales = find_scales(weights, importance, self.levels(), self.ladder())
            scales[scales <= 0] = 1  # groups of zeros, or nearly
            return scales, np.full(shape, self.middle, dtype=np.float32)
        return self._find_wide(weights, importance) if self.group <= 0 else self._find_pairs(weights, importance)

    def _limits(self) -> tuple[np.float32, np.float32, np.float32]:
        """Highest code, code of zero if fixed, levels per range or largest magnitude of plain rounding."""
        if self.asymmetric:
            return np.float32(self.highest), np.float32(-1), np.float32(self.highest)
        return np.float32(self.highest), np.float32(self.middle), np.float32(self.middle - 1)

    def _find_pairs(self, weights: Float32, importance: Float32 | None) -> tuple[Float32, Float32]:
        from anyquant.grids.kernels import zero_point

        rows, groups = self.shape(weights.shape)
        scales, zeros = np.empty((rows, groups), dtype=np.float32), np.empty((rows, groups), dtype=np.float32)
        lanes = lanes_of(importance, weights.shape[1], self.group)
        flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
        trials = self.trials(importance is not None)
        zero_point.search(flat, lanes, trials, self._limits(), scales.reshape(-1), zeros.reshape(-1))
        return scales, zeros

    def _find_wide(self, weights: Float32, importance: Float32 | None) -> tuple[Float32, Float32]:
        from anyquant.grids.kernels import zero_point
        from anyquant.grids.kernels.symmetric import LANES

        groups, _ = self.shape(weights.shape)
        scales, zeros = np.empty(groups, dtype=np.float32), np.empty(groups, dtype=np.float32)
        missing = -weights.shape[1] % STRIP
        steering = np.pad(usable_importance(importance, weights.shape[1], weights.shape[1]), (0, missing))
        filled = np.pad(weights, ((0, 0), (0, missing))) if missing else weights
        depth = steering.size // LANES
        strips = np.ascontiguousarray(filled, dtype=np.float32).reshape(groups, -1, depth, LANES)
        trials = self.trials(importance is not None)
        zero_point.search_wide(strips, steering.reshape(depth, -1), trials, self._limits(), scales, zeros)
        return scales[:, None], zeros[:, None]
