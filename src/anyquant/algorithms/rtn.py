"""Rounding to nearest with the grid's own joint search of scales and codes, weighted by importance where there is one.

At four bits and above this is nearly all there is to gain; below, error feedback and tuning start to pay.
"""

from collections.abc import Mapping
from typing import Any

from anyquant.algorithms.base import Algorithm, complete_options
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid, Params
from anyquant.core.plan import EMPTY
from anyquant.core.qtensor import QTensor

NEEDS = frozenset({"second_moment"})


def quantize(
    weights: Float32,
    grid: Grid,
    importance: Float32 | None,
    options: Mapping[str, Any],
    shared: Params | None = None,
) -> QTensor:
    """`weights` (rows, in) on `grid`. Rows are independent, so slices of rows may be quantized on their own.

    Raises UsageError for any option (there is none), UnsupportedError when the shape cannot lie on the grid.
    """
    complete_options("rtn", options, EMPTY)
    rows, columns = weights.shape
    grid.bits((rows, columns))
    params, codes = grid.quantize(weights, importance, shared)
    return QTensor(grid, (rows, columns), codes, params)


ALGORITHM = Algorithm("rtn", NEEDS, EMPTY, quantize)
