"""Error feedback between the rows of a matrix: rows handled later make up for the errors of those before them.

With O the second moment of the gradient of the log-likelihood at the matrix's output, an error D of the weights costs
tr(O D H D^T) in KL divergence, to second order. What GPTQ does with the columns under H is done with the rows under O:
a block of rows is rounded, and with its errors E the best real-valued rest is target + O_rest^-1 O_rest,block E
(two-sided rounding, as in YAQA, arXiv 2505.22988, with GPTQ on either side). Inside a block rows are rounded on their
own, in a random order: neighbours belong to one head and depend on each other most.
"""

from collections.abc import Callable

import numpy as np

from anyquant.algorithms.error_feedback import feed_errors_back
from anyquant.algorithms.hessian import Order, Route, factorise
from anyquant.algorithms.on_grid import OnGrid
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError
from anyquant.core.grid import Grid, Scope

ROWS = 32  # at least so many are rounded before the others are corrected
RoundRows = Callable[[Order, Float32], Float32]


def feed_errors_across(
    target: Float32, output_hessian: Float32, dampening: float, unit: int, round_rows: RoundRows, place: str
) -> None:
    """Call `round_rows(rows, wanted)` for all rows of `target` (rows, in), block by block; it returns their values.

    `rows` are whole runs of `unit` rows, in a random order that is always the same; `wanted` (rows, in) are the best
    real-valued weights given the errors so far. `output_hessian` as in Task, its diagonal raised by `dampening` times
    its mean. Raises BadInputError for one that cannot be one.
    """
    blocks = output_hessian if output_hessian.ndim == 3 else output_hessian[None]
    count, size = blocks.shape[:2]
    if blocks.shape[2] != size or not (count - 1) * size < len(target) <= count * size or (count > 1 and size % unit):
        raise BadInputError(
            f"{place}: the Hessian of the output has shape {output_hessian.shape}, the matrix {len(target)} rows"
        )
    for number, block in enumerate(blocks):
        rows = np.arange(number * size, min(number * size + size, len(target)))
        route = Route("random", unit, unit, ROWS)
        found = factorise(block[: rows.size, : rows.size], route, dampening, f"{place}, at its output")
        order = rows[found.columns]
        feed_errors_back(np.ascontiguousarray(target[order].T), found, _Across(order, round_rows))


class _Across:
    """Rounds blocks of rows, which are columns here."""

    def __init__(self, order: Order, round_rows: RoundRows) -> None:
        self._order = order
        self._round_rows = round_rows

    def round(self, start: int, block: Float32, upper: Float32) -> Float32:
        rows = self._order[start : start + block.shape[1]]
        return self._round_rows(rows, np.ascontiguousarray(block.T)).T


def row_unit(grid: Grid) -> int:
    """How many rows at least have parameters that no other rows use."""
    heights = [p.rows for p in grid.parameters if p.scope is Scope.BLOCK]
    return int(np.lcm.reduce([grid.block[0], *heights]))


def put_rows(state: OnGrid, rows: Order, part: OnGrid) -> None:
    """Take over codes and parameters of some rows, which are whole runs of `row_unit`."""
    state.codes[rows] = part.codes
    for p in state.grid.parameters:
        at = slice(None) if p.scope is Scope.TENSOR else rows[:: p.rows] // p.rows
        state.params[p.name][at] = part.params[p.name]
