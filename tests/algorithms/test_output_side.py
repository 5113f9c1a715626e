"""GPTQ with two sides: rows in turn, the rest each time solved for explicitly in double precision."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from algorithms.slow_feedback import Float64, Indices, correlated, damped, loss, moments
from anyquant.algorithms.base import Task
from anyquant.algorithms.gptq import quantize
from anyquant.algorithms.hessian import Route
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UsageError
from anyquant.grids import grid

ROWS, COLUMNS = 256, 128
WEIGHTS, INPUTS = correlated(ROWS, COLUMNS, seed=2)
GRADIENTS = correlated(1, ROWS, seed=3)[1].astype(np.float64)
OUTPUT = (GRADIENTS.T @ GRADIENTS / len(GRADIENTS)).astype(np.float32)
STATS = moments(INPUTS)
TASK = Task(WEIGHTS, grid("int4-g32"), STATS, {"sides": 2}, output_hessian=OUTPUT)


def cost(values: Float32, output: Float32 = OUTPUT) -> float:
    """tr(O D H D^T)."""
    assert STATS.hessian is not None
    root = np.linalg.cholesky(output.astype(np.float64) + 1e-9 * np.eye(len(output)))
    return loss(root.T @ (WEIGHTS.astype(np.float64) - values), STATS.hessian)


def eliminated(task: Task, found: Float32, order: Indices, step: int) -> Float64:
    """The values, when after every `step` rows those left are set to the minimum of tr(O D H D^T).

    What follows from a last bit would spread over all rows behind. So those before are always taken from `found`.
    """
    assert task.output_hessian is not None
    square = damped(task.output_hessian, 0.5)
    target = task.weights.astype(np.float64)
    values = np.zeros_like(target)
    for start in range(0, len(order), step):
        done, rows, left = order[:start], order[start : start + step], order[start:]
        pull = square[np.ix_(left, done)] @ (target - found)[done]
        wanted = (target[left] + np.linalg.solve(square[np.ix_(left, left)], pull))[: len(rows)]
        keep = None if task.keep is None else task.keep[rows]
        part = replace(task, weights=wanted.astype(np.float32), keep=keep, options={"sides": 1}, output_hessian=None)
        values[rows] = quantize(part).decode()
    return values


@pytest.mark.parametrize("name", ["int4-g32", "q4_k", "fp8_e4m3-block", "int4-channel"])
@pytest.mark.parametrize("masked", [False, True])
def test_values_are_those_of_elimination(name: str, masked: bool) -> None:
    weights, inputs = correlated(ROWS, 256, seed=2)
    keep = np.random.default_rng(1).random(weights.shape) > 0.3 if masked else None
    task = replace(TASK, weights=weights, grid=grid(name), stats=moments(inputs), keep=keep)
    unit = 128 if name.endswith("block") else 1
    order = Route("random", unit, unit).columns(OUTPUT.diagonal())
    assert sorted(order) == list(range(ROWS)) and (order != np.arange(ROWS)).any() == (unit == 1)
    found = quantize(task).decode()
    expected = eliminated(task, found, order, max(32, unit))
    assert np.isclose(found, expected, rtol=1e-5, atol=1e-7).mean() > 0.98  # a row whose scale jumped is 0.4 %


def test_the_cost_falls() -> None:
    one, two = (quantize(replace(TASK, options={"sides": sides})) for sides in (1, 2))
    assert cost(two.decode()) < 0.75 * cost(one.decode())


def test_without_dependence_between_outputs_rows_are_rounded_as_ever() -> None:
    alone = np.diag(OUTPUT.diagonal())
    two, one = quantize(replace(TASK, output_hessian=alone)), quantize(replace(TASK, options={}))
    np.testing.assert_array_equal(two.codes, one.codes)
    np.testing.assert_array_equal(two.params["scale"], one.params["scale"])
    unknown = quantize(replace(TASK, output_hessian=None))
    np.testing.assert_array_equal(unknown.codes, one.codes)


def test_diagonal_blocks_are_matrices_of_their_own() -> None:
    blocks = np.zeros((2, 160, 160), dtype=np.float32)
    blocks[0], blocks[1, :96, :96] = OUTPUT[:160, :160], OUTPUT[160:, 160:]
    whole = quantize(replace(TASK, output_hessian=blocks))
    for rows in (slice(0, 160), slice(160, None)):
        part = quantize(replace(TASK, weights=WEIGHTS[rows], output_hessian=OUTPUT[rows, rows]))
        np.testing.assert_array_equal(whole.codes[rows], part.codes)
        np.testing.assert_array_equal(whole.params["scale"][rows], part.params["scale"])


@pytest.mark.parametrize("damage", [OUTPUT[:96, :96], OUTPUT * np.float32(np.nan), -OUTPUT])
def test_a_damaged_hessian_of_the_output_is_named(damage: Any) -> None:
    with pytest.raises(BadInputError, match=r"the matrix.*output"):
        quantize(replace(TASK, output_hessian=damage))


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="sides is 3, expected 1 or 2"):
        quantize(replace(TASK, options={"sides": 3}))
    with pytest.raises(UsageError, match="output_dampening"):
        quantize(replace(TASK, options={"sides": 2, "output_dampening": -1.0}))
