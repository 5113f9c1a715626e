"""Pruners: scores by hand, exact counts, patterns, and SparseGPT against its slow reference."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from algorithms.slow_feedback import Float64, correlated, damped, loss, moments, sparse
from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.calibrate.stats import Moments
from anyquant.core.corrections import Mask
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.grids import grid

WEIGHTS, INPUTS = correlated(48, 256, seed=8)
STATS = moments(INPUTS)
SMALL = np.array([[1, -5, 2, 3, -4, 0.5, 6, 0], [8, 7, -6, 5, 4, 3, -2, 1]], dtype=np.float32)


def keep_of(name: str, task: Task) -> npt.NDArray[np.bool_]:
    prune = ALGORITHMS.get(name).prune
    assert prune is not None
    return prune(task)


def lowest(scores: Float64, dropped: int) -> npt.NDArray[np.bool_]:
    keep = np.ones(scores.size, dtype=bool)
    keep[np.argsort(scores.reshape(-1), kind="stable")[:dropped]] = False
    return keep.reshape(scores.shape)


def test_magnitude_by_hand() -> None:
    keep = keep_of("magnitude", Task(SMALL, grid("f32")))
    np.testing.assert_array_equal(keep, np.abs(SMALL) > 3.5)
    pairs = keep_of("magnitude", Task(SMALL, grid("f32"), options={"pattern": "2:4"}))
    np.testing.assert_array_equal(pairs, np.array([[0, 1, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 1, 1, 0, 0]], dtype=bool))


def test_of_equal_weights_the_exact_number_goes() -> None:
    keep = keep_of("magnitude", Task(np.ones((3, 10), np.float32), grid("f32"), options={"sparsity": 0.4}))
    assert keep.sum() == 18
    assert keep_of("magnitude", Task(SMALL, grid("f32"), options={"sparsity": 0.0})).all()


def test_wanda_by_hand() -> None:
    stats = Moments(np.array([100, 1, 1, 1, 1, 100, 1, 4], np.float32), 1)
    keep = keep_of("wanda", Task(SMALL, grid("f32"), stats))
    np.testing.assert_array_equal(keep, np.array([[1, 1, 0, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0]], dtype=bool))
    part = keep_of("wanda", Task(SMALL[1:], grid("f32"), stats))
    np.testing.assert_array_equal(part, keep[1:])


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_sparsegpt_and_gptq_behind_it_find_the_weights_of_the_slow_reference(pattern: str) -> None:
    task = Task(WEIGHTS, grid("f32"), STATS, {"pattern": pattern})
    keep = keep_of("sparsegpt", task)
    size = int(pattern[-1]) if pattern != "unstructured" else 128

    def choose(scores: Float64) -> npt.NDArray[np.bool_]:
        runs = [scores] if pattern == "unstructured" else list(scores)
        return np.stack([lowest(run, run.size // 2) for run in runs]).reshape(scores.shape)

    assert STATS.hessian is not None
    expected = sparse(WEIGHTS, damped(STATS.hessian), choose, size)
    np.testing.assert_array_equal(keep, expected != 0)

    gptq = ALGORITHMS.get(ALGORITHMS.get("sparsegpt").finisher).quantize
    assert gptq is not None
    found = gptq(Task(WEIGHTS, task.grid, STATS, {"refine": 0}, keep=keep))
    np.testing.assert_allclose(found.decode(), expected, rtol=0, atol=1e-6)
    assert isinstance(found.corrections[0], Mask)


def test_the_better_informed_pruner_loses_less() -> None:
    gptq = ALGORITHMS.get("gptq").quantize
    assert gptq is not None and STATS.hessian is not None
    losses = []
    for name in ("magnitude", "wanda", "sparsegpt"):
        keep = keep_of(name, Task(WEIGHTS, grid("f32"), STATS))
        found = gptq(Task(WEIGHTS, grid("int4-g128"), STATS, keep=keep))
        losses.append(loss(WEIGHTS - found.decode(), STATS.hessian))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_bad_options_are_named(name: str) -> None:
    def attempt(columns: int = 256, **options: Any) -> None:
        keep_of(name, Task(WEIGHTS[:, :columns], grid("f32"), STATS, options, place="block 0 up"))

    with pytest.raises(UsageError, match=f"{name}: option pattern is '1:4', expected"):
        attempt(pattern="1:4")
    with pytest.raises(UsageError, match=f"{name}: option sparsity is 1.0, expected"):
        attempt(sparsity=1.0)
    with pytest.raises(UsageError, match=r"pattern 2:4 has sparsity 0\.5, not 0\.6"):
        attempt(sparsity=0.6, pattern="2:4")
    with pytest.raises(UnsupportedError, match="block 0 up: pattern 4:8 needs a multiple of 8 columns, not 250"):
        attempt(250, pattern="4:8")
