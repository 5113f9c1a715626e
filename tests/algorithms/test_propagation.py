"""Weights to aim at when inputs deviate: what least squares on the inputs themselves would say."""

from dataclasses import replace

import numpy as np
import pytest

from algorithms.slow_feedback import correlated, damped, moments
from anyquant.algorithms.base import Task
from anyquant.algorithms.gptq import quantize
from anyquant.algorithms.hessian import Route, factor
from anyquant.algorithms.propagation import best_target
from anyquant.core.errors import BadInputError
from anyquant.grids import grid

WEIGHTS, FLOATS = correlated(32, 128, seed=4)
INPUTS = (FLOATS + 0.1 * np.random.default_rng(5).standard_normal(FLOATS.shape) * FLOATS.std(0)).astype(np.float32)
INPUTS += 0.15 * np.roll(FLOATS, 1, axis=1)
STATS = moments(INPUTS, FLOATS)
TASK = Task(WEIGHTS, grid("int4-g128"), STATS)


def output_error(values: np.ndarray) -> float:
    return float(((FLOATS.astype(np.float64) @ WEIGHTS.T - INPUTS.astype(np.float64) @ values.T) ** 2).sum())


def test_qronos_aims_at_the_least_squares_solution() -> None:
    nearly_none = factor(STATS, Route("natural"), 1e-9, "here")
    wanted = best_target(TASK, nearly_none, "qronos", 1.0)
    expected = np.linalg.lstsq(INPUTS.astype(np.float64), FLOATS.astype(np.float64) @ WEIGHTS.T, rcond=None)[0].T
    np.testing.assert_allclose(wanted, expected, rtol=1e-3, atol=2e-5)
    half = best_target(TASK, nearly_none, "qronos", 0.5)
    np.testing.assert_allclose(half, (WEIGHTS + expected) / 2, rtol=1e-3, atol=2e-5)


def test_what_the_stream_has_gone_wrong_by_is_made_up_for() -> None:
    drift = (FLOATS.astype(np.float64) - INPUTS) @ np.random.default_rng(6).standard_normal((128, 32)) * 0.02
    residual = (drift.T @ INPUTS / len(INPUTS)).astype(np.float32)
    task = replace(TASK, stats=replace(STATS, residual=residual, _memo={}))
    wanted = best_target(task, factor(STATS, Route("natural"), 1e-9, "here"), "auto", 1.0)
    outputs = FLOATS.astype(np.float64) @ WEIGHTS.T + drift
    expected = np.linalg.lstsq(INPUTS.astype(np.float64), outputs, rcond=None)[0].T
    np.testing.assert_allclose(wanted, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_gptaq_lets_only_the_columns_behind_take_up_a_deviation(order: str) -> None:
    found = factor(STATS, Route(order), 0.01, "here")
    assert STATS.hessian is not None and STATS.cross is not None
    square = damped(STATS.hessian)
    deviation = STATS.cross.astype(np.float64) - STATS.hessian
    expected = WEIGHTS.astype(np.float64).copy()
    for place, column in enumerate(found.columns[:-1]):
        behind = found.columns[place + 1 :]
        inverse = np.linalg.inv(square[np.ix_(behind, behind)])
        expected[:, behind] += np.outer(WEIGHTS[:, column], deviation[column, behind] @ inverse)
    np.testing.assert_allclose(best_target(TASK, found, "gptaq", 1.0), expected, rtol=1e-4, atol=1e-6)


def test_propagation_lowers_the_error_of_the_output() -> None:
    plain, gptaq, qronos = (
        output_error(quantize(replace(TASK, options={"propagation": kind})).decode())
        for kind in ("none", "gptaq", "qronos")
    )
    assert qronos == output_error(quantize(TASK).decode())
    assert qronos < gptaq < plain
    assert qronos < 0.7 * plain


def test_without_a_deviation_nothing_changes() -> None:
    same = Task(WEIGHTS, TASK.grid, moments(INPUTS, INPUTS))
    expected = quantize(same).codes
    for kind in ("gptaq", "qronos"):
        codes = quantize(replace(same, options={"propagation": kind})).codes
        assert (codes == expected).mean() > 0.999


def test_damaged_cross_moments_are_named() -> None:
    assert STATS.cross is not None
    cross = STATS.cross.copy()
    cross[3, 4] = np.inf
    with pytest.raises(BadInputError, match="down: the cross moments are not finite"):
        quantize(replace(TASK, stats=replace(STATS, cross=cross), options={"propagation": "qronos"}, place="down"))
