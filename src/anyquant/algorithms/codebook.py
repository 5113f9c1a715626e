"""Learned values: k-means weighted by what errors cost, then codes and values in turn under the whole Hessian.

SqueezeLLM (Kim et al. 2023, arXiv 2306.07629, section 4.1) clusters the weights of a row by their sensitivity; that of
a Linear's squared output error is the importance of the input channel. With the Hessian, codes come from error feedback
and then both are improved in turn, each exactly given the other: tr((W - Q) H (W - Q)^T) is a parabola in the values of
a row as long as its codes stay, and in one code as long as all else stays. No step makes it larger.
"""

from typing import Any

import numpy as np

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.error_feedback import GridRounder, feed_errors_back
from anyquant.algorithms.hessian import Route, damped, factor, hessian_of
from anyquant.algorithms.on_grid import OnGrid
from anyquant.algorithms.refine import refine
from anyquant.core.corrections import Mask
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.extras import require
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope
from anyquant.core.options import complete_options
from anyquant.core.qtensor import QTensor

DEFAULTS = {"feedback": True, "rounds": 3, "dampening": 0.01}
MOST_DIRECTIONS = 32  # of conjugate gradients, which find the values of a row in as many as there are values
ENOUGH = 1e-6  # of the squared gradient, at which they stop


def quantize(task: Task) -> QTensor:
    """Options: `feedback`: choose codes under the Hessian, which is needed then; without it, rows are independent and
    the grid's own k-means has the last word. `rounds`: how often values and codes are improved in turn. `dampening` of
    the Hessian, relative to the mean of its diagonal.

    Raises UsageError for a grid without a table of values per row, a bad option or missing statistics, BadInputError
    for a Hessian that cannot be one.
    """
    options = _checked(task)
    grid = task.grid
    weights = task.weights if task.keep is None else np.where(task.keep, task.weights, np.float32(0))
    params = grid.fit(weights, task.importance)
    corrections = () if task.keep is None else (Mask(task.keep),)
    if not options["feedback"]:
        return QTensor(grid, task.shape, grid.encode(weights, params), params, corrections=corrections)
    hessian = hessian_of(task.stats, task.shape[1], task.place, "codebook")
    assert task.stats is not None  # noqa: S101
    found = factor(task.stats, Route("activation"), float(options["dampening"]), task.place)
    state = OnGrid(grid, task.shape, params, None)
    rounder = GridRounder(state, found.columns, None if task.keep is None else found.arranged(task.keep), None)
    values = found.restored(feed_errors_back(found.arranged(task.weights), found, rounder))
    square = damped(hessian, np.arange(task.shape[1]), found.dampening, np.float32)
    for _ in range(options["rounds"]):
        codes, improved = improve_table(task, state.codes, state.params, square)
        state = OnGrid(grid, task.shape, improved, None)
        state.codes = codes
        values = valued(task, codes, improved)
        refine(state, task.weights, values, task, found.dampening, 1, False)
    return QTensor(grid, task.shape, state.codes, state.params, corrections=corrections)


def improve_table(task: Task, codes: Codes, params: Params, square: Float32) -> tuple[Codes, Params]:
    """Codes and parameters with the table that is best for the codes of each row, where that is better once stored.

    The normal equations, one per value of a row, are solved for all rows at once by conjugate gradients: a step is a
    product with the Hessian `square` (in, in), scattered to the table entries and gathered from them. A value of
    exactly 0 stays, and codes are sorted along with the table, which ascends.
    """
    torch = require("torch")
    table = table_of(task.grid)
    assert table is not None  # noqa: S101
    old, values = params[table.name], valued(task, codes, params)
    places = torch.from_numpy(codes.astype(np.int64))
    kept = torch.ones(()) if task.keep is None else torch.from_numpy(task.keep)
    hessian = torch.from_numpy(square)

    def scatter(weights: Any) -> Any:
        return torch.zeros(old.shape, dtype=torch.float32).scatter_add_(1, places, weights * kept)

    pull = scatter(torch.from_numpy(task.weights - values) @ hessian)
    change = conjugate_gradients(pull, lambda entries: scatter((entries.gather(1, places) * kept) @ hessian))
    largest = np.finfo(old.dtype).max
    stored = np.where(old == 0, 0, np.clip(old + change.numpy(), -largest, largest)).astype(old.dtype)
    order = np.argsort(stored, axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable").astype(codes.dtype)
    new_codes = np.take_along_axis(ranks, codes.astype(np.int64), axis=1)
    new = {table.name: np.take_along_axis(stored, order, axis=1)}
    better = losses(task.weights - valued(task, new_codes, new), square) < losses(task.weights - values, square)
    chosen = better[:, None]
    return np.where(chosen, new_codes, codes), {table.name: np.where(chosen, new[table.name], old)}


def valued(task: Task, codes: Codes, params: Params) -> Float32:
    """The weights (rows, in) that codes and mask stand for."""
    values = task.grid.decode(codes, params)
    return values if task.keep is None else np.where(task.keep, values, np.float32(0))


def conjugate_gradients(right: Any, product: Any) -> Any:
    """The solutions x of product(x) = right, one per row, for positive semidefinite matrices; from 0, so that every
    step lowers x A x / 2 - x b."""
    torch = require("torch")
    solution, residual = torch.zeros_like(right), right.clone()
    direction, size = residual.clone(), residual.square().sum(1, keepdim=True)
    enough = ENOUGH * size
    for _ in range(min(MOST_DIRECTIONS, right.shape[1])):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        going = (curvature > 0) & (size > enough)
        if not bool(going.any()):
            break
        length = torch.where(going, size / curvature, torch.zeros_like(size))
        solution += length * direction
        residual -= length * image
        last, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(going, size / last, torch.zeros_like(size)) * direction
    return solution


def losses(error: Float32, square: Float32) -> Any:
    """tr of error @ square @ error^T, row by row."""
    torch = require("torch")
    wide = torch.from_numpy(np.ascontiguousarray(error))
    return ((wide @ torch.from_numpy(square)) * wide).sum(1).numpy()


def table_of(grid: Grid) -> Parameter | None:
    """The grid's one parameter, where it holds a value per code and row; else None."""
    for parameter in grid.parameters:
        whole = parameter.scope is Scope.ROW and parameter.values == 2**grid.code_bits and grid.vector == 1
        return parameter if whole and len(grid.parameters) == 1 else None
    return None


def _checked(task: Task) -> dict[str, Any]:
    options = complete_options("codebook", task.options, DEFAULTS)
    if table_of(task.grid) is None:
        raise UsageError(
            f"{task.place}: codebook needs a grid with a table of values per row, codebook2 to codebook8, not "
            f"{task.grid.name}"
        )
    for name in ("rounds", "dampening"):
        if not 0 <= options[name] < np.inf:
            raise UsageError(f"algorithm codebook: option {name} is {options[name]}, expected at least 0")
    task.grid.bits(task.shape)
    return options


ALGORITHM = Algorithm(
    "codebook",
    needs=frozenset({"second_moment"}),
    options=DEFAULTS,
    quantize=quantize,
    check=_checked,
    option_needs={"feedback": {True: frozenset({"hessian"})}},
)
