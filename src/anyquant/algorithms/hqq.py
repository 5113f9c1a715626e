"""HQQ on any grid: parameters found without data, for an error norm that forgives outliers.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". sum |W - Q|^p with p < 1 is split:
an auxiliary error e takes up the large deviations, a shrinkage of W - Q, and the parameters are fitted to W - e by
squares. The original moves the zero-point by the mean of what is left; here the grid's own fit moves all it has.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.on_grid import Keep, parameter_span
from anyquant.core.corrections import Mask
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Grid, Params, Scope
from anyquant.core.options import complete_options
from anyquant.core.qtensor import QTensor

DEFAULTS = {"p": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20}
# errors are measured in this many times their root mean square: two steps, as those of rounding spread over one step.
# The paper measures weights as they are, so that what is an outlier hangs on the model's scale
UNIT = np.float32(2 * np.sqrt(12))


def quantize(task: Task) -> QTensor:
    """Slices of rows, in multiples of those that share parameters, give the slices of the result.

    Options: `p`, the exponent of the error, 0 < p <= 1; `beta`, how strongly e is tied to the error, and `kappa`, its
    growth per iteration; `iterations`. Of all parameters on the way, the best are kept, for each tile of the matrix
    that has its own: the objective is never larger than that of the grid's plain search.

    Raises UsageError for a bad option, UnsupportedError when the shape cannot lie on the grid.
    """
    options = _checked(task)
    grid, p = task.grid, float(options["p"])
    grid.bits(task.shape)
    weights = task.weights if task.keep is None else np.where(task.keep, task.weights, np.float32(0))
    shared = task.shared
    if shared is None and grid.tensor_wide:
        shared = grid.prepare(float(np.abs(weights).max(initial=0))) or None
    tiles = Tiles(grid, task.shape, shared)
    params = grid.fit(weights, None, shared)
    error = _error(grid, weights, params, task.keep)
    best, least = {name: np.array(array) for name, array in params.items()}, tiles.sums(error, p)
    beta = float(options["beta"])
    for _ in range(options["iterations"]):
        unit = UNIT * np.sqrt((error**2).mean(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        moved: Float32 = unit * shrink((error / np.where(unit > 0, unit, 1)).astype(np.float32), beta, p)
        params = grid.fit(weights - moved, None, shared)
        error = _error(grid, weights, params, task.keep)
        lost = tiles.sums(error, p)
        tiles.take(best, params, lost < least)
        least = np.minimum(lost, least)
        beta *= float(options["kappa"])
    corrections = () if task.keep is None else (Mask(task.keep),)
    return QTensor(grid, task.shape, grid.encode(weights, best), best, corrections=corrections)


def shrink(error: Float32, beta: float, p: float) -> Float32:
    """The generalised soft threshold sign(x) max(|x| - |x|^(p - 1) / beta, 0), equation 5 of the paper; 0 at 0."""
    size = np.abs(error)
    with np.errstate(divide="ignore"):
        left = np.maximum(size - size ** np.float32(p - 1) / np.float32(beta), np.float32(0))
    shrunk: Float32 = np.copysign(left, error)
    return shrunk


class Tiles:
    """The parts of a matrix on a grid that have parameters of their own: columns of a span, rows of a block."""

    def __init__(self, grid: Grid, shape: tuple[int, int], shared: Params | None) -> None:
        free = [parameter for parameter in grid.parameters if parameter.name not in (shared or {})]
        blocks = [parameter for parameter in free if parameter.scope is Scope.BLOCK]
        self.span = parameter_span(grid, shape[1]) if len(blocks) == len(free) else shape[1]
        rows = int(np.lcm.reduce([parameter.rows for parameter in blocks])) if blocks else 1
        self.rows = shape[0] if any(parameter.scope is Scope.TENSOR for parameter in free) else rows
        self.blocks, self.free = blocks, free

    def sums(self, error: Float32, p: float) -> npt.NDArray[np.float64]:
        """sum |error|^p of each tile, (row tiles, column tiles)."""
        powers = np.abs(error) ** np.float32(p)
        wide = np.add.reduceat(powers, np.arange(0, error.shape[1], self.span), axis=1, dtype=np.float64)
        sums: npt.NDArray[np.float64] = np.add.reduceat(wide, np.arange(0, len(error), self.rows), axis=0)
        return sums

    def take(self, best: dict[str, npt.NDArray[Any]], params: Params, better: npt.NDArray[np.bool_]) -> None:
        """Replace the parameters of the tiles that are `better`, in place."""
        for parameter in self.free:
            array, by_tile = best[parameter.name], parameter in self.blocks
            rows = np.arange(len(array)) * (parameter.rows if by_tile else 1) // self.rows
            columns = np.arange(array.shape[1]) * parameter.columns // self.span if by_tile else 0
            chosen = better[np.minimum(rows, len(better) - 1)][:, columns]
            chosen = np.broadcast_to(chosen if by_tile else chosen[:, None], array.shape)
            array[chosen] = params[parameter.name][chosen]


def _error(grid: Grid, weights: Float32, params: Params, keep: Keep | None) -> Float32:
    """What is lost; nothing where weights are pruned, which the mask makes zero on any grid."""
    error: Float32 = weights - grid.decode(grid.encode(weights, params), params)
    return error if keep is None else np.where(keep, error, np.float32(0))


def _checked(task: Task) -> dict[str, Any]:
    options = complete_options("hqq", task.options, DEFAULTS)
    limits = {
        "p": (0 < options["p"] <= 1, "more than 0, at most 1"),
        "iterations": (options["iterations"] >= 0, ">= 0"),
    }
    limits |= {name: (0 < options[name] < np.inf, "more than 0") for name in ("beta", "kappa")}
    for name, (sound, expected) in limits.items():
        if not sound:
            raise UsageError(f"algorithm hqq: option {name} is {options[name]}, expected {expected}")
    return options


ALGORITHM = Algorithm("hqq", options=DEFAULTS, rows_apart=True, quantize=quantize, check=_checked)
