"""Weights to aim at when the input already carries the errors of earlier layers.

F are the inputs in the float model, X those that come through the quantized layers, H = mean x x^T, C = mean f x^T.
Completing the square, the mean of |W f - Q x|^2 is tr((Q - T) H (Q - T)^T) plus what Q does not change, with

    T = W C H^-1 = W + W (C - H) H^-1                                                                      "qronos"

so that error feedback towards T keeps the weights that are not yet rounded optimal for it, as Qronos (arXiv
2505.11695) does after its first column. GPTAQ (arXiv 2504.02692) lets the deviation of a column be taken up by those
behind it only. With U the upper Cholesky factor of H^-1 and M the strictly upper triangle, in the order of handling,

    T = W + W P,  P = (((C - H) U^T) * M) U                                                                 "gptaq"

where we take the original weights for the deviations W P, not those that feedback has changed by then. H is damped as
for the feedback, C - H is not: with more dampening T falls back to W. `mixing` multiplies what is added to W.

A matrix whose output is added to a stream r can make up for what the stream has gone wrong by, too: with B = mean
(r_F - r_X) x^T, the minimum of the mean of |r_F + W f - r_X - Q x|^2 adds B H^-1 to T. `mixing` multiplies it, too.
"""

from typing import Any

import numpy as np

from anyquant.algorithms.base import Task
from anyquant.algorithms.hessian import Factor, cholesky, damped, hessian_of
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.extras import require

ROWS = 256  # solved for at once, in float64
KINDS = ("auto", "none", "gptaq", "qronos")


def best_target(task: Task, factor: Factor, kind: str, mixing: float) -> Float32:
    """T (rows, in), in logical order; "auto" is "qronos" where `stats.cross` is known, else "none".

    Raises UsageError without the statistics, BadInputError when they are damaged.
    """
    if kind == "none" or (kind == "auto" and not deviation_known(task)):
        return task.weights
    torch = require("torch")
    hessian = hessian_of(task.stats, task.shape[1], task.place, "gptq")
    if task.stats is None or task.stats.cross is None:
        raise UsageError(f"{task.place}: propagation {kind} needs the float inputs, too; calibrate with a text")
    cross = _sound(task.stats.cross, hessian.shape, "cross moments", task.place)
    weights = torch.from_numpy(task.weights)
    residual = task.stats.residual
    stream = None if residual is None else _sound(residual, task.shape, "residual moments", task.place)
    if kind != "gptaq" and stream is not None:  # alone with its input: one solution for its rows
        deviation = torch.from_numpy(_deviation(cross, hessian, factor))
        moved = _solved(torch.addmm(torch.from_numpy(stream), weights, deviation), hessian, factor)
    else:
        key = ("propagation", kind, factor.route if kind == "gptaq" else None, factor.dampening)
        moved = weights @ task.stats.once(key, lambda: _matrix(kind, cross, hessian, factor))
        if stream is not None:
            moved += _solved(torch.from_numpy(stream).clone(), hessian, factor)
    result: Float32 = torch.add(weights, moved, alpha=mixing).numpy()
    return result


def _solved(rows: Any, hessian: Float32, factor: Factor) -> Any:
    """rows (H + dampening)^-1 for a torch matrix (rows, in) float32, which is overwritten."""
    torch = require("torch")
    rows[:, torch.from_numpy(factor.dead)] = 0
    lower = torch.from_numpy(damped(hessian, np.arange(len(hessian)), factor.dampening))
    cholesky(lower)  # it did when the factor was found
    for part in rows.split(ROWS):
        half = torch.linalg.solve_triangular(lower.mT, part.double(), upper=True, left=False)
        part.copy_(torch.linalg.solve_triangular(lower, half, upper=False, left=False))
    return rows


def _deviation(cross: Float32, hessian: Float32, factor: Factor) -> Float32:
    """C - H, but for channels that were always 0."""
    deviation = cross - hessian
    deviation[:, factor.dead] = 0
    return deviation


def deviation_known(task: Task) -> bool:
    """Whether the statistics tell how the inputs deviate from those of the float model."""
    return task.stats is not None and task.stats.cross is not None


def _sound(array: Float32, shape: tuple[int, ...], what: str, place: str) -> Float32:
    if array.shape != shape:
        raise BadInputError(f"{place}: the {what} have shape {array.shape}, expected {shape}; calibrate again")
    if not np.isfinite(array).all():
        raise BadInputError(f"{place}: the {what} are not finite; calibrate again")
    return array


def _matrix(kind: str, cross: Float32, hessian: Float32, factor: Factor) -> Any:
    """What W is multiplied with and then added to it, (in, in) float32, in logical order."""
    torch = require("torch")
    deviation = _deviation(cross, hessian, factor)
    if kind != "gptaq":
        return _solved(torch.from_numpy(deviation), hessian, factor)
    columns = factor.columns
    square = torch.from_numpy(damped(hessian, columns, factor.dampening))
    reversed_lower = torch.linalg.cholesky(square.flip(0, 1))
    identity = torch.eye(len(square), dtype=torch.float64)
    upper = torch.linalg.solve_triangular(reversed_lower.flip(0, 1), identity, upper=True)
    arranged = torch.from_numpy(deviation[np.ix_(columns, columns)].astype(np.float64))
    result = (arranged @ upper.T).triu(1) @ upper
    back = torch.from_numpy(np.argsort(columns))
    return result.to(torch.float32)[back][:, back].contiguous()
