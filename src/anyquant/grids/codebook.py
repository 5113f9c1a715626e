"""Learned values, as many as codes, for each row: "codebook4" has 16 float16 values per row.

w = values[row, code]. The values are the means of a k-means clustering of the row, weighted by the importance of the
input channels, and ascend. Weights beyond float16 saturate, and below 6e-8 become 0. A row of which an eighth or more
is exactly zero keeps 0 among its values, so that weights that were pruned stay pruned.
"""

import re
from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.groups import WHOLE_ROW, gathered
from anyquant.grids.scales import LARGEST_HALF, usable_importance

ZEROS = 1 / 8
ROWS = 64  # sorted at a time


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """Codes are uint8; the parameter "values" is float16 (rows, 2^bits), ascending in each row, some equal where a row
    has fewer distinct weights."""

    @property
    def count(self) -> int:
        """Values per row."""
        return int(2**self.code_bits)

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """The values of least weighted error that k-means finds for each row."""
        from anyquant.grids.kernels import codebook

        steering = usable_importance(importance, weights.shape[1], weights.shape[1])
        found = np.empty((len(weights), self.count), dtype=np.float32)
        whole = np.ascontiguousarray(weights, dtype=np.float32)
        for first in range(0, len(weights), ROWS):
            part = whole[first : first + ROWS]
            keys = np.empty(part.shape, dtype=np.int64)
            codebook.sortable(part, keys)
            keys.sort(axis=1)
            codebook.fit(keys, part, steering, found[first : first + ROWS])
        return self._stored(found, weights)

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """Values evenly spaced from the smallest to the largest weight of the row."""
        within = np.clip(weights, -LARGEST_HALF, LARGEST_HALF)
        even = np.linspace(within.min(axis=1), within.max(axis=1), self.count, axis=1)
        return self._stored(np.ascontiguousarray(even, dtype=np.float32), weights)

    def _stored(self, values: Float32, weights: Float32) -> Params:
        """Rounded to float16, the one nearest to 0 exactly 0 where the row asks for it."""
        asks = np.flatnonzero(np.mean(weights == 0, axis=1) >= ZEROS)
        values[asks, np.abs(values[asks]).argmin(axis=1)] = 0
        return {"values": np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)}

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """The codes of the nearest values; compiled."""
        from anyquant.grids.kernels import codebook

        codes = np.empty(weights.shape, dtype=np.uint8)
        halves = np.ascontiguousarray(params["values"]).view(np.uint16)
        codebook.encode(np.ascontiguousarray(weights, dtype=np.float32), halves, codes)
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """The values that the codes point to, as float32: exact."""
        first = np.arange(len(codes), dtype=np.int32)[:, None] * np.int32(self.count)
        return gathered(params["values"].reshape(-1), codes + first).astype(np.float32)

    def lattice(self, params: Params) -> Lattice:
        """Levels of each row, with a scale of 1; equal ones where a row has fewer values."""
        levels = params["values"].astype(np.float32)
        scale = np.ones((len(levels), 1), dtype=np.float32)
        codes = np.arange(self.count, dtype=np.uint8)
        return Lattice(levels, codes, scale, np.zeros_like(scale), WHOLE_ROW, uniform=False)


def make(name: str) -> CodebookGrid:
    """The grid "codebook{bits}", bits 2 to 8."""
    match = re.fullmatch(r"codebook([2-8])", name)
    if match is None:
        raise UsageError(f"unknown codebook grid {name!r}; expected codebook2 to codebook8")
    bits = int(match[1])
    values = Parameter("values", "float16", 16, Scope.ROW, values=2**bits)
    return CodebookGrid(name, "codebook", (1, 1), "uint8", bits, (values,))
