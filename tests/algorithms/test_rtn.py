"""Rounding to nearest is the grid's own search; options and names are checked."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.algorithms.rtn import quantize
from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope
from anyquant.core.options import complete_options


@dataclass(frozen=True)
class Rows(Grid):
    """Eight levels and one scale per row, the best of 32 by exhaustive search."""

    name: str = "rows"
    family: str = "test"
    block: tuple[int, int] = (1, 4)
    code_dtype: str = "int8"
    code_bits: int = 4
    parameters: tuple[Parameter, ...] = (Parameter("scale", "float32", 32, Scope.ROW),)

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        weighting = self.weighting(weights, importance)
        widest = np.abs(weights).max(1, keepdims=True) if shared is None else shared["widest"]
        tried = [widest / 7 * np.float32(1 - step / 40) for step in range(32)]
        errors = [(weighting * (weights - s * self.encode(weights, {"scale": s})) ** 2).sum(1) for s in tried]
        best = np.argmin(errors, axis=0)
        return {"scale": np.stack(tried)[best, np.arange(len(weights))].astype(np.float32)}

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        return np.clip(np.rint(weights / params["scale"]), -7, 7).astype(np.int8)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        values: Float32 = (codes * params["scale"]).astype(np.float32)
        return values


WEIGHTS = np.random.default_rng(5).standard_t(3, (6, 32)).astype(np.float32)
IMPORTANCE = np.random.default_rng(6).lognormal(0, 2, 32).astype(np.float32)
STATS = Moments(IMPORTANCE, 1)


def loss(decoded: Float32) -> float:
    return float((IMPORTANCE * (WEIGHTS - decoded) ** 2).sum())


def test_importance_reaches_the_search() -> None:
    with_it, without = (quantize(Task(WEIGHTS, Rows(), stats)).decode() for stats in (STATS, None))
    assert loss(with_it) < loss(without)
    assert ((WEIGHTS - without) ** 2).sum() < ((WEIGHTS - with_it) ** 2).sum()


def test_slices_of_rows_are_slices_of_the_result() -> None:
    whole = quantize(Task(WEIGHTS, Rows(), STATS))
    part = quantize(Task(WEIGHTS[2:5], Rows(), STATS))
    assert whole.shape == (6, 32) and part.shape == (3, 32)
    np.testing.assert_array_equal(part.decode(), whole.decode()[2:5])


def test_shared_parameters_reach_the_grid() -> None:
    shared = {"widest": np.full((6, 1), 100, np.float32)}
    assert quantize(Task(WEIGHTS, Rows(), shared=shared)).params["scale"].min() > 2


def test_a_shape_that_cannot_lie_on_the_grid_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rows: shape 6 x 30"):
        quantize(Task(WEIGHTS[:, :30], Rows()))


def test_the_registry_hands_out_the_algorithm() -> None:
    algorithm = ALGORITHMS.get("rtn")
    assert algorithm.name == "rtn" and algorithm.uses == {"second_moment"} and algorithm.rows_apart
    assert algorithm.quantize is not None
    expected = quantize(Task(WEIGHTS, Rows(), STATS)).decode()
    np.testing.assert_array_equal(algorithm.quantize(Task(WEIGHTS, Rows(), STATS)).decode(), expected)
    with pytest.raises(UsageError, match="unknown algorithm 'rnt'; did you mean rtn"):
        ALGORITHMS.get("rnt")


def test_unknown_and_ill_typed_options_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="rtn has no option 'damping'"):
        quantize(Task(WEIGHTS, Rows(), options={"damping": 0.1}))
    defaults: dict[str, Any] = {"damping": 0.01, "sweeps": 3, "sort": True}
    assert complete_options("x", {"damping": 1}, defaults) == {"damping": 1, "sweeps": 3, "sort": True}
    with pytest.raises(UsageError, match="no option 'dampin'; did you mean damping"):
        complete_options("x", {"dampin": 0.1}, defaults)
    for wrong in ({"sweeps": True}, {"sweeps": 1.5}, {"sort": 1}, {"damping": "0.1"}):
        with pytest.raises(UsageError, match="expected "):
            complete_options("x", wrong, defaults)
