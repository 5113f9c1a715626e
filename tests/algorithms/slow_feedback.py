"""Error feedback, slow and obvious, in double precision: the oracle of GPTQ and SparseGPT.

Optimal brain surgery as it is written down: the inverse of the Hessian of the columns that are left is kept explicitly
and loses a column (or a vector of them) at a time. No Cholesky, no blocks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope

Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[Any]


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[Float32, Float32]:
    """Weights, and input vectors (tokens, columns) whose channels differ in size and go together."""
    generator = np.random.default_rng(seed)
    rank = columns // 4
    mixed = generator.standard_normal((3 * columns, rank)) @ generator.standard_normal((rank, columns)) / np.sqrt(rank)
    inputs = (mixed + 0.3 * generator.standard_normal(mixed.shape)) * generator.lognormal(0, 0.7, columns)
    weights = generator.standard_t(5, (rows, columns)) * 0.02
    return weights.astype(np.float32), inputs.astype(np.float32)


def moments(inputs: Float32, floats: Float32 | None = None) -> Moments:
    """All that is known of these inputs (tokens, in), when the float model has `floats` there."""
    wide = inputs.astype(np.float64)
    hessian = (wide.T @ wide / len(wide)).astype(np.float32)
    cross = None if floats is None else (floats.astype(np.float64).T @ wide / len(wide)).astype(np.float32)
    return Moments(np.ascontiguousarray(hessian.diagonal()), len(inputs), hessian=hessian, cross=cross)


def damped(hessian: Float32, dampening: float = 0.01) -> Float64:
    wide = hessian.astype(np.float64)
    return wide + dampening * wide.diagonal().mean() * np.eye(len(wide))


def loss(difference: Float32 | Float64, hessian: Float32) -> float:
    wide = difference.astype(np.float64)
    return float(((wide @ hessian.astype(np.float64)) * wide).sum())


def eliminations(square: Float64, units: Indices) -> Iterator[tuple[Indices, Float64, Float64]]:
    """For each unit (a row of `units`) in turn: its columns, the inverse of what is left at it, and beside it."""
    inverse = np.linalg.inv(square)
    for unit in units:
        own, beside = inverse[np.ix_(unit, unit)].copy(), inverse[unit].copy()
        yield unit, own, beside
        inverse -= beside.T @ np.linalg.inv(own) @ beside


def conditional(square: Float64, columns: Indices) -> Float32:
    """What an error of each column costs once the columns behind it, in the order `columns`, are adapted."""
    result = np.empty(len(square))
    for unit, own, _ in eliminations(square, columns[:, None]):
        result[unit] = 1 / own[0, 0]
    return result.astype(np.float32)


@dataclass
class Slow:
    """How `feed_back` shall go: `span` columns are fitted together when reached, 0: all beforehand.

    A search for parameters may jump when its weights change in the last bit. So the parameters are those of `found`,
    whose columns count from the beginning of a span, and how many rows would have got the same is returned.
    """

    grid: Grid
    columns: Indices
    span: int
    importance: Float32
    found: Params
    keep: npt.NDArray[np.bool_] | None = None

    def params(self, start: int, stop: int) -> Params:
        """Those of some columns; all parameters of the grids here are shared by columns of one row."""
        widths = {parameter.name: parameter.columns for parameter in self.grid.parameters}
        return {name: self.found[name][:, start // width : stop // width] for name, width in widths.items()}


def feed_back(target: Float64, square: Float64, how: Slow) -> tuple[Float64, Float64, float]:
    """Values; the weights as they were when each was rounded; the share of fits that gave the parameters found."""
    grid, span = how.grid, how.span
    weights = target.astype(np.float64).copy()
    met, values = np.empty_like(weights), np.empty_like(weights)
    agreed = []
    keep = np.ones(weights.shape, dtype=bool) if how.keep is None else how.keep
    params: Params = {}
    start, width = -1, span or weights.shape[1]
    for unit, own, beside in eliminations(square, how.columns.reshape(-1, grid.vector)):
        if unit[0] // width != start:
            start = unit[0] // width
            at = slice(start * width, (start + 1) * width)
            params = how.params(at.start, at.stop)
            fitted = grid.fit((weights * keep)[:, at].astype(np.float32), how.importance[at])
            agreed += [(fitted[name] == params[name]).all(axis=1).mean() for name in params]
        inside = slice(int(unit[0]) - start * width, int(unit[-1]) + 1 - start * width)
        met[:, unit] = weights[:, unit]
        code = grid.encode(weights[:, unit].astype(np.float32), params, inside)
        values[:, unit] = np.where(keep[:, unit], grid.decode(code, params, inside), 0)
        error = weights[:, unit] - values[:, unit]
        weights -= error @ np.linalg.inv(own) @ beside
    return values, met, min(agreed, default=1.0)


def sparse(weights: Float32, square: Float64, choose: Callable[[Float64], npt.NDArray[np.bool_]], step: int) -> Float64:
    """SparseGPT: every `step` columns, `choose` says from w^2 over the inverse's diagonal which of them stay."""
    result = weights.astype(np.float64).copy()
    costs = conditional(square, np.arange(len(square))).astype(np.float64)
    keep = np.empty(result.shape, dtype=bool)
    for unit, own, beside in eliminations(square, np.arange(len(square))[:, None]):
        column = int(unit[0])
        if column % step == 0:
            at = slice(column, column + step)
            keep[:, at] = choose(result[:, at] ** 2 * costs[at])
        error = np.where(keep[:, column], 0, result[:, column])[:, None]
        result -= error @ np.linalg.inv(own) @ beside
    return np.where(keep, result, 0)


@dataclass(frozen=True)
class Pairs(Grid):
    """Sixteen pairs of values, and one scale for 32 weights of a row."""

    name: str = "pairs"
    family: str = "test"
    block: tuple[int, int] = (1, 32)
    code_dtype: str = "uint8"
    code_bits: int = 4
    parameters: tuple[Parameter, ...] = (Parameter("scale", "float32", 32, Scope.BLOCK, 32),)
    vector: int = 2

    @property
    def points(self) -> Float32:
        return (np.random.default_rng(3).standard_normal((16, 2)) * 0.8).astype(np.float32)

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        weighting = self.weighting(weights, importance).reshape(len(weights), -1, 32)
        blocks = weights.reshape(weighting.shape)
        mean = (weighting * blocks**2).sum(2) / np.maximum(weighting.sum(2), 1e-30)
        return {"scale": np.sqrt(mean).astype(np.float16).astype(np.float32)}

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        scale = self._spread(params, columns)
        pairs = (weights / np.where(scale == 0, 1, scale)).reshape(len(weights), -1, 1, 2)
        return ((pairs - self.points) ** 2).sum(3).argmin(2).astype(np.uint8)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        values: Float32 = self.points[codes].reshape(len(codes), -1) * self._spread(params, columns)
        return values

    def _spread(self, params: Params, columns: slice | None) -> Float32:
        return np.repeat(params["scale"], 32, axis=1)[:, columns or slice(None)]


@dataclass(frozen=True)
class Whole(Grid):
    """Another grid's values, without its lattice: what algorithms do with grids that have none."""

    inner: Grid | None = None

    def _of(self) -> Grid:
        if self.inner is None:
            raise ValueError("no grid")
        return self.inner

    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        return self._of().quantize(weights, importance, shared)

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        return self._of().fit(weights, importance, shared)

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        return self._of().encode(weights, params, columns)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        return self._of().decode(codes, params, columns)


def without_lattice(grid: Grid) -> Grid:
    """The same grid, silent about its lattice."""
    facts = (grid.name, grid.family, grid.block, grid.code_dtype, grid.code_bits, grid.parameters, grid.vector)
    return Whole(*facts, inner=grid)
