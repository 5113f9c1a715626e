"""HQQ against a slow loop in double precision; never worse than the grid's own search, on any kind of grid."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from algorithms.slow_feedback import Pairs, correlated
from anyquant.algorithms.base import Task
from anyquant.algorithms.hqq import quantize, shrink
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.grid import Grid
from anyquant.grids import grid

WEIGHTS = correlated(24, 512)[0]
P = 0.7


def objective(weights: Float32, decoded: Float32, span: int) -> Any:
    """sum |w - q|^p of every group, (rows, groups)."""
    powers = np.abs(weights.astype(np.float64) - decoded) ** P
    return powers.reshape(len(weights), -1, span).sum(2)


def slow(weights: Float32, chosen: Grid, span: int, iterations: int) -> npt.NDArray[np.float64]:
    """The best objective of every group on the way, one weight after the other."""
    found = np.full((len(weights), weights.shape[1] // span), np.inf)
    target, beta = weights, 10.0
    for _ in range(iterations + 1):
        params = chosen.fit(target)
        decoded = chosen.decode(chosen.encode(weights, params), params)
        found = np.minimum(found, objective(weights, decoded, span))
        error = weights.astype(np.float64) - decoded
        moved = weights.astype(np.float64)
        for row in range(len(weights)):
            unit = 2 * 12**0.5 * (sum(e * e for e in error[row]) / error.shape[1]) ** 0.5
            for column, e in enumerate(error[row] / unit):
                left = abs(e) - abs(e) ** (P - 1) / beta if e else 0.0
                moved[row, column] -= unit * max(left, 0.0) * (1 if e > 0 else -1)
        target = moved.astype(np.float32)
        beta *= 1.01
    return found


def test_it_finds_what_the_slow_loop_finds() -> None:
    chosen = grid("int4-g64-asym")
    task = Task(WEIGHTS, chosen, options={"iterations": 6})
    ours = objective(WEIGHTS, quantize(task).decode(), 64)
    theirs = slow(WEIGHTS, chosen, 64, 6)
    # where a search jumps because its weights differ in the last bit, a single group may differ
    assert np.isclose(ours, theirs, rtol=1e-5).mean() > 0.97
    assert ours.sum() == pytest.approx(theirs.sum(), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "span", "gain"),
    [
        ("int4-g128", 128, 0.93),
        ("int2-g64-asym", 64, 0.95),
        ("q4_k", 256, 0.999),
        ("nf4-g64-double", 512, 0.997),
        ("int4-channel", 512, 0.9),
        ("mxfp4", 32, 1),
        ("fp8_e4m3-block", 512, 1),
        ("f16", 512, 1),
    ],
)
def test_it_never_loses_to_the_plain_search_and_mostly_gains(name: str, span: int, gain: float) -> None:
    chosen = grid(name)
    ours = objective(WEIGHTS, quantize(Task(WEIGHTS, chosen)).decode(), span)
    params = chosen.fit(WEIGHTS)
    plain = objective(WEIGHTS, chosen.decode(chosen.encode(WEIGHTS, params), params), span)
    if name == "fp8_e4m3-block":
        ours, plain = ours.sum(0), plain.sum(0)
    assert (ours <= plain * (1 + 1e-6)).all()
    assert ours.sum() <= gain * plain.sum()


def test_grids_without_a_lattice_and_masks_are_handled() -> None:
    keep = np.random.default_rng(1).random(WEIGHTS.shape) > 0.4
    for chosen in (Pairs(), grid("int3-g64")):
        found = quantize(Task(WEIGHTS, chosen, keep=keep))
        assert not found.decode()[~keep].any()
        params = chosen.fit(np.where(keep, WEIGHTS, np.float32(0)))
        plain = chosen.decode(chosen.encode(np.where(keep, WEIGHTS, np.float32(0)), params), params)
        ours = (np.abs(WEIGHTS - found.decode()) ** P)[keep].sum()
        assert ours <= (np.abs(WEIGHTS - plain) ** P)[keep].sum() * 1.001


def test_slices_of_rows_are_slices_of_the_result() -> None:
    for name in ("int3-g64-asym", "q3_k", "int8-tensor"):
        chosen = grid(name)
        shared = chosen.prepare(float(np.abs(WEIGHTS).max())) or None
        whole, part = (quantize(Task(weights, chosen, shared=shared)).decode() for weights in (WEIGHTS, WEIGHTS[8:13]))
        np.testing.assert_array_equal(part, whole[8:13])


def test_shrinkage_by_hand() -> None:
    shrunk = shrink(np.array([0, 0.1, -1, 4], np.float32), 10, 0.5)
    np.testing.assert_allclose(shrunk, [0, 0, -0.9, 3.95], rtol=1e-6)


def test_bad_options_and_shapes_are_named() -> None:
    task = Task(WEIGHTS, grid("int4-g128"))
    for options in ({"p": 0.0}, {"p": 1.5}, {"beta": -1.0}, {"kappa": 0.0}, {"iterations": -1}):
        with pytest.raises(UsageError, match=f"hqq: option {next(iter(options))} is"):
            quantize(replace(task, options=options))
    with pytest.raises(UnsupportedError, match="shape 24 x 500"):
        quantize(replace(task, weights=WEIGHTS[:, :500]))
