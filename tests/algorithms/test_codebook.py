"""Learned values: what least squares in double precision finds for given codes; no step makes a row worse."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from algorithms.slow_feedback import correlated, damped, loss, moments
from anyquant.algorithms.base import Task
from anyquant.algorithms.codebook import ALGORITHM, improve_table, quantize
from anyquant.algorithms.rtn import quantize as round_to_nearest
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes
from anyquant.grids import grid

WEIGHTS, INPUTS = correlated(32, 128)
STATS = moments(INPUTS)
KEEP = np.random.default_rng(1).random(WEIGHTS.shape) > 0.4


def best_table(row: Float32, codes: Codes, keep: Any, square: Any, count: int) -> Any:
    """The values that minimise (w - A t) H (w - A t), A one-hot, from the normal equations."""
    chosen = np.eye(count)[codes] * keep[:, None]
    return np.linalg.lstsq(chosen.T @ square @ chosen, chosen.T @ square @ row.astype(np.float64), rcond=None)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_values_are_those_of_least_squares_for_the_codes(masked: bool) -> None:
    assert STATS.hessian is not None
    chosen, square = grid("codebook3"), damped(STATS.hessian).astype(np.float32)
    keep = KEEP if masked else np.ones_like(KEEP)
    task = Task(WEIGHTS, chosen, STATS, keep=KEEP if masked else None)
    params = chosen.fit(WEIGHTS)
    before = chosen.encode(WEIGHTS, params)
    codes, improved = improve_table(task, before, params, square)
    assert (np.diff(improved["values"].astype(np.float32), axis=1) >= 0).all()
    values = chosen.decode(codes, improved) * keep
    for row in range(len(WEIGHTS)):
        best = best_table(WEIGHTS[row], before[row], keep[row], square, 8)
        expected = (best[before[row]] * keep[row] - WEIGHTS[row])[None]
        ours = loss(WEIGHTS[row][None] - values[row][None], square)
        assert ours == pytest.approx(loss(expected, square), rel=3e-3)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "masked"])
def test_rounds_never_make_a_row_worse_and_the_end_is_far_better(keep: Any) -> None:
    assert STATS.hessian is not None
    task, square = Task(WEIGHTS, grid("codebook3"), STATS, keep=keep), damped(STATS.hessian)
    last = np.full(len(WEIGHTS), np.inf)
    for rounds in range(4):
        result = quantize(replace(task, options={"rounds": rounds}))
        assert keep is None or not result.decode()[~keep].any()
        residual = WEIGHTS.astype(np.float64) - result.decode()
        losses = (residual @ square * residual).sum(1)
        assert (losses <= last * (1 + 1e-5)).all()
        last = losses
    rounded = round_to_nearest(task).decode()
    limit = 0.3 if keep is None else 0.6
    assert loss(residual, STATS.hessian) < limit * loss(WEIGHTS - rounded, STATS.hessian)


def test_without_feedback_it_is_weighted_k_means() -> None:
    bare = replace(STATS, hessian=None)
    result = quantize(Task(WEIGHTS, grid("codebook4"), bare, {"feedback": False}))
    params, codes = grid("codebook4").quantize(WEIGHTS, STATS.second_moment)
    np.testing.assert_array_equal(result.decode(), grid("codebook4").decode(codes, params))
    assert ALGORITHM.needed({"feedback": False}) == {"second_moment"}
    assert ALGORITHM.needed({"feedback": True}) == {"second_moment", "hessian"}


def test_other_grids_options_and_missing_statistics_are_named() -> None:
    task = Task(WEIGHTS, grid("codebook3"), STATS, place="block 3 down")
    for name in ("int4-g128", "int4-channel", "nf4-g64", "q4_k"):
        with pytest.raises(UsageError, match=f"block 3 down: codebook needs a grid with a table .* not {name}"):
            quantize(replace(task, grid=grid(name)))
    with pytest.raises(UsageError, match="block 3 down: codebook needs the Hessian"):
        quantize(replace(task, stats=replace(STATS, hessian=None)))
    for options in ({"rounds": -1}, {"dampening": -0.1}):
        with pytest.raises(UsageError, match=f"codebook: option {next(iter(options))} is"):
            quantize(replace(task, options=options))
