"""Low-rank corrections against truncated singular value decompositions in double precision."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from algorithms.slow_feedback import correlated, loss, moments
from anyquant.algorithms.base import Task
from anyquant.algorithms.eora import correct as eora
from anyquant.algorithms.lorc import correct as lorc
from anyquant.algorithms.rtn import quantize
from anyquant.core.corrections import LowRank
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid

SHAPES = [(48, 128), (160, 128)]


def example(rows: int, columns: int, options: dict[str, Any], masked: bool = False) -> tuple[Task, QTensor]:
    weights, inputs = correlated(rows, columns)
    keep = np.random.default_rng(1).random(weights.shape) > 0.4 if masked else None
    task = Task(weights, grid("int3-g64"), moments(inputs), options, place="block 3 down")
    return task, quantize(replace(task, options={}, keep=keep))


def pair_of(result: QTensor) -> LowRank:
    pair = result.corrections[-1]
    assert isinstance(pair, LowRank)
    return pair


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_lorc_is_the_truncated_decomposition_of_the_error(shape: tuple[int, int], masked: bool) -> None:
    task, before = example(*shape, {"rank": 8}, masked)
    error = task.weights.astype(np.float64) - before.decode()
    left, sizes, right = np.linalg.svd(error, full_matrices=False)
    expected = (left[:, :8] * sizes[:8]) @ right[:8]
    result = lorc(task, before)
    added = result.decode().astype(np.float64) - before.decode()
    assert np.abs(added - expected).max() < 2e-3 * np.abs(expected).max()
    assert ((error - added) ** 2).sum() == pytest.approx((sizes[8:] ** 2).sum(), rel=1e-5)
    assert result.corrections[:-1] == before.corrections and pair_of(result).left.shape == (shape[0], 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_eora_leaves_the_least_output_error_that_its_rank_can(shape: tuple[int, int]) -> None:
    task, before = example(*shape, {"rank": 8})
    assert task.stats is not None and task.stats.hessian is not None
    hessian = task.stats.hessian
    error = task.weights.astype(np.float64) - before.decode()
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    sizes = np.linalg.svd(error @ vectors * np.sqrt(values), compute_uv=False)
    best = float((sizes[8:] ** 2).sum())
    assert loss(task.weights - eora(task, before).decode(), hessian) == pytest.approx(best, rel=1e-4)
    assert loss(task.weights - lorc(task, before).decode(), hessian) > 1.1 * best
    assert loss(error, hessian) > 1.5 * best


def test_a_singular_hessian_will_do() -> None:
    task, before = example(48, 128, {"rank": 8})
    _, inputs = correlated(48, 128)
    few = moments(inputs[:5])
    result = eora(replace(task, stats=few), before)
    assert few.hessian is not None
    ours, theirs = (loss(task.weights - q.decode(), few.hessian) for q in (result, before))
    assert np.isfinite(result.decode()).all() and ours < 1e-5 * theirs


def test_halves_neither_overflow_nor_vanish_and_no_error_needs_no_pair() -> None:
    for scale in (1e-5, 3e8):
        task, before = example(48, 128, {"rank": 4})
        task = replace(task, weights=(task.weights * np.float32(scale)).astype(np.float32))
        before = quantize(replace(task, options={}))
        pair = pair_of(lorc(task, before))
        assert np.isfinite(pair.left).all() and np.isfinite(pair.right).all()
        ours, theirs = (((task.weights - q.decode()) ** 2).sum(dtype=np.float64) for q in (lorc(task, before), before))
        assert ours < 0.9 * theirs
    task, before = example(48, 128, {"rank": 4})
    exact = replace(task, weights=before.decode())
    np.testing.assert_array_equal(lorc(exact, before).decode(), before.decode())
    np.testing.assert_array_equal(eora(exact, before).decode(), before.decode())


def test_ranks_and_statistics_are_checked() -> None:
    task, before = example(48, 128, {"rank": 49})
    for function, name in ((lorc, "lorc"), (eora, "eora")):
        with pytest.raises(UsageError, match=f"block 3 down: {name} with rank 49, but a 48 x 128 matrix takes 1 to 48"):
            function(task, before)
        with pytest.raises(UsageError, match=f"{name} has no option 'ranks'; did you mean rank"):
            function(replace(task, options={"ranks": 8}), before)
    task = replace(task, options={"rank": 8})
    with pytest.raises(UsageError, match="block 3 down: eora needs the Hessian"):
        eora(replace(task, stats=None), before)
    broken = replace(moments(correlated(48, 128)[1]), hessian=np.full((128, 128), np.nan, np.float32))
    with pytest.raises(BadInputError, match="block 3 down: the Hessian is not finite"):
        eora(replace(task, stats=broken), before)
