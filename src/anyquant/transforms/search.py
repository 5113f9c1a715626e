"""The error that rounding makes behind a site, as a function of what is done to its activation."""

from dataclasses import dataclass

import numpy as np

from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid
from anyquant.transforms.base import Scene
from anyquant.transforms.moments import map_diagonal
from anyquant.transforms.operations import Operation
from anyquant.transforms.sites import Site

# a rewrite must lower the error by this part of it: what is smaller is the noise of the search
LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class Reader:
    """A matrix behind the site, or a sample of its rows; `grid` is where it will lie."""

    weights: Float32
    grid: Grid
    moments: Moments

    def error(self, operation: Operation | None) -> float:
        """tr(D H D^T): the squared output error, mean over tokens, sum over rows, where D is what rounding changes.

        H is the hessian where it is known, else its diagonal. With `operation` T, T W^-1 is rounded instead, and D is
        taken back: D T.
        """
        second = self.moments.second_moment
        if operation is None:
            weights = self.weights
        else:
            weights, second = operation.dual.apply(self.weights), map_diagonal(second, operation)
        shared = self.grid.prepare(float(np.abs(weights).max())) if self.grid.tensor_wide else None
        params, codes = self.grid.quantize(weights, second, shared)
        change = self.grid.decode(codes, params) - weights
        if operation is not None:
            change = operation.transposed.apply(change)
        if self.moments.hessian is None:
            return float(np.square(change, dtype=np.float64).sum(axis=0) @ self.moments.second_moment)
        return float(np.einsum("ij,ij->", change @ self.moments.hessian, change, dtype=np.float64))


def site_readers(scene: Scene, site: Site, rows: int) -> list[Reader]:
    """The readers of a site that are quantized and whose input is known; at most about `rows` rows of each, 0: all."""
    readers = []
    for linear in site.readers:
        grid, moments = scene.grid(linear.name), scene.moments(linear.input_group)
        if grid is not None and moments is not None and grid.refuses(linear.shape) is None:
            readers.append(Reader(_sample(scene.weights(linear.name), grid.block[0], rows), grid, moments))
    return readers


def site_error(readers: list[Reader], site: Site, operation: Operation | None) -> float:
    """The sum over all readers, with `operation` on the makers' channels."""
    wide = None if operation is None else site.widen(operation)
    return sum(reader.error(wide) for reader in readers)


def _sample(weights: Float32, height: int, rows: int) -> Float32:
    """Evenly spaced blocks of `height` rows, about `rows` rows in all."""
    blocks = len(weights) // height
    kept = max(1, rows // height)
    if not rows or blocks <= kept:
        return weights
    chosen = np.linspace(0, blocks - 1, kept).round().astype(np.int64)
    return weights.reshape(blocks, height, -1)[chosen].reshape(kept * height, -1)
