"""A grid with a parameter of every scope, so that the store meets all of them."""

from collections.abc import Sequence

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope
from anyquant.core.qtensor import QTensor

PARAMETERS = (
    Parameter("overall", "float32", 32, Scope.TENSOR),
    Parameter("row", "float16", 16, Scope.ROW),
    Parameter("scale", "uint8", 6, Scope.BLOCK, 4),
)


class Toy(Grid):
    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        raise NotImplementedError

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        raise NotImplementedError

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        fine = np.repeat(params["scale"].astype(np.float32), 4, axis=1)
        return params["overall"] * params["row"].astype(np.float32) * fine * codes.astype(np.float32)


TOY = Toy("TOY", "toy", (1, 8), "int8", 4, PARAMETERS)
PAIRS = Toy("PAIRS", "toy", (1, 8), "uint16", 16, PARAMETERS[1:2], vector=2)


def grids(name: str) -> Grid:
    known = {"TOY": TOY, "PAIRS": PAIRS}
    if name not in known:
        raise UsageError(f"unknown grid {name!r}")
    return known[name]


def matrix(rows: int = 6, columns: int = 16, seed: int = 0, groups: Sequence[int] | None = None) -> QTensor:
    random = np.random.default_rng(seed)
    params = {
        "overall": np.array([[0.25]], np.float32),
        "row": random.normal(size=(rows, 1)).astype(np.float16),
        "scale": random.integers(0, 64, (rows, columns // 4), dtype=np.uint8),
    }
    codes = random.integers(-8, 8, (rows, columns), dtype=np.int8)
    return QTensor(TOY, (rows, columns), codes, params, None if groups is None else np.array(groups, np.int32))


def rows_of(whole: QTensor, start: int, stop: int) -> QTensor:
    params = {
        parameter.name: whole.params[parameter.name]
        if parameter.scope is Scope.TENSOR
        else whole.params[parameter.name][start:stop]
        for parameter in whole.grid.parameters
    }
    shape = (stop - start, whole.shape[1])
    return QTensor(whole.grid, shape, whole.codes[start:stop], params, whole.column_groups)


def same(one: QTensor, other: QTensor) -> bool:
    groups = (one.column_groups, other.column_groups)
    return (
        one.shape == other.shape
        and one.grid is other.grid
        and np.array_equal(one.codes, other.codes)
        and one.params.keys() == other.params.keys()
        and all(np.array_equal(one.params[name], other.params[name]) for name in one.params)
        and ((groups[0] is None) == (groups[1] is None))
        and (groups[0] is None or np.array_equal(*groups))
    )
