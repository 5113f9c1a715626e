"""GPTQ finds what a slow reference finds, code by code, on every kind of grid; bad inputs are named."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from algorithms.slow_feedback import (
    Pairs,
    Slow,
    conditional,
    correlated,
    damped,
    feed_back,
    loss,
    moments,
    without_lattice,
)
from anyquant.algorithms.base import Task
from anyquant.algorithms.gptq import notes, quantize
from anyquant.algorithms.rtn import quantize as round_to_nearest
from anyquant.calibrate.stats import Moments
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.grid import Grid
from anyquant.grids import grid

ROWS, COLUMNS = 256, 512
WEIGHTS, INPUTS = correlated(ROWS, COLUMNS)
STATS = moments(INPUTS)
HESSIAN: Any = STATS.hessian
SQUARE = damped(HESSIAN)
KEEP = np.random.default_rng(1).random(WEIGHTS.shape) > 0.4


def order_of(name: str, span: int, unit: int) -> Any:
    """Columns by falling importance, of the columns themselves or of whole spans and then in these."""
    diagonal = HESSIAN.diagonal().astype(np.float64)
    units = [diagonal[c : c + unit].mean() for c in range(0, COLUMNS, unit)]
    if name == "natural":
        return np.arange(COLUMNS)
    if name == "activation":
        ranks = sorted(range(len(units)), key=lambda u: -units[u])
    else:
        spans = [diagonal[c : c + span].mean() for c in range(0, COLUMNS, span)]
        ranks = sorted(range(len(units)), key=lambda u: (-spans[u * unit // span], -units[u]))
    return np.array([u * unit + i for u in ranks for i in range(unit)])


@dataclass(frozen=True)
class Case:
    """`span` is that of dynamic groups; 0: static."""

    grid: Grid
    span: int
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = False

    @property
    def name(self) -> str:
        said = "-".join(str(value) for value in self.options.values())
        return f"{self.grid.name}-{self.span}-{said}{'-masked' if self.masked else ''}"


CASES = [
    Case(grid("int4-g128"), 128),
    Case(grid("int4-g128"), 128, {"steering": "diagonal"}),
    Case(grid("int4-g128"), 0, {"order": "activation"}),
    Case(grid("int4-g128"), 0, {"groups": "static", "block": 32}, masked=True),
    Case(grid("int3-g64"), 64, {"order": "groups"}),
    Case(without_lattice(grid("int3-g64")), 64, {"order": "groups"}, masked=True),
    Case(grid("q4_k"), 256),
    Case(grid("q4_k"), 256, {"order": "groups"}),
    Case(grid("q3_k"), 256, {"steering": "diagonal", "dampening": 0.1}, masked=True),
    Case(grid("q4_1"), 32),
    Case(grid("iq4_nl"), 32),
    Case(grid("f32"), 0, masked=True),
    Case(grid("bf16"), 0),
    Case(Pairs(), 32),
    Case(Pairs(), 32, {"order": "groups"}, masked=True),
    Case(Pairs(), 0, {"order": "activation"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_finds_what_the_slow_reference_finds(case: Case) -> None:
    keep = KEEP if case.masked else None
    found = quantize(Task(WEIGHTS, case.grid, STATS, {"order": "natural", "refine": 0, **case.options}, keep=keep))
    decoded = found.decode()

    square = damped(HESSIAN, case.options.get("dampening", 0.01))
    columns = order_of(case.options.get("order", "natural"), case.span or COLUMNS, case.grid.vector)
    steered = case.span and case.options.get("steering") != "diagonal"
    importance = conditional(square, columns) if steered else HESSIAN.diagonal()
    slow = Slow(case.grid, columns, case.span, importance, found.params, keep)
    values, met, agreed = feed_back(WEIGHTS.astype(np.float64), square, slow)

    assert agreed > 0.95
    assert keep is None or not decoded[~KEEP].any()
    tolerance = 1e-6 * np.abs(met).max(axis=1)
    close = np.abs(decoded - values) <= tolerance[:, None]
    same = close.all(axis=1)
    assert same.mean() > 0.96
    for row in np.flatnonzero(~same):  # what follows a tie may differ, but nothing before it
        first = columns[~close[row, columns]][0]
        middle = (decoded[row, first] + values[row, first]) / 2
        assert abs(met[row, first] - middle) < tolerance[row]
    ours, theirs = (loss((WEIGHTS - result)[same], HESSIAN) for result in (decoded, values))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", ["int4-g128", "int3-g64", "q4_k", "q3_k"])
def test_it_is_far_better_than_rounding(name: str) -> None:
    rounded = loss(WEIGHTS - round_to_nearest(Task(WEIGHTS, grid(name), STATS)).decode(), HESSIAN)
    plain, ordered, refined = (
        loss(WEIGHTS - quantize(Task(WEIGHTS, grid(name), STATS, options)).decode(), HESSIAN)
        for options in ({"order": "natural", "refine": 0}, {"refine": 0}, {"order": "natural"})
    )
    assert plain < 0.4 * rounded
    assert ordered < plain
    assert refined < 0.8 * plain


@pytest.mark.parametrize(
    "options", [{"refine": 0}, {"refine": 0, "order": "activation"}, {"refine": 2}, {"groups": "static"}]
)
@pytest.mark.parametrize("keep", [None, KEEP[:64]], ids=["whole", "masked"])
def test_grids_with_and_without_a_lattice_get_the_same_codes(options: dict[str, Any], keep: Any) -> None:
    compiled, slow = (
        quantize(Task(WEIGHTS[:64], chosen, STATS, options, keep=keep))
        for chosen in (grid("q4_k"), without_lattice(grid("q4_k")))
    )
    if options.get("refine") == 2:  # stretching needs to know what shares a scale
        assert loss(WEIGHTS[:64] - slow.decode(), HESSIAN) < 1.1 * loss(WEIGHTS[:64] - compiled.decode(), HESSIAN)
    else:
        assert (compiled.decode() == slow.decode()).all(axis=1).mean() > 0.97


@pytest.mark.parametrize("chosen", [grid("int3-g64"), grid("iq4_nl"), Pairs()], ids=lambda chosen: str(chosen.name))
def test_refined_to_the_end_no_code_can_be_improved(chosen: Grid) -> None:
    options = {"refine": 25, "groups": "static"}
    task = Task(WEIGHTS[:4], chosen, STATS, options, keep=KEEP[:4])
    found = quantize(task)
    assert found.params.keys() == {p.name for p in chosen.parameters}
    residual = WEIGHTS[:4].astype(np.float64) - found.decode()
    for code in range(16 if chosen.code_bits == 4 else 8):
        other = np.full_like(found.codes, code if chosen.code_dtype == "uint8" else code - 4)
        change = np.where(KEEP[:4], chosen.decode(other, found.params), 0) - found.decode()
        for first in range(0, COLUMNS, chosen.vector):
            at = slice(first, first + chosen.vector)
            gain = -2 * (residual @ SQUARE[:, at] * change[:, at]).sum(1)
            gain += (change[:, at] @ SQUARE[at, at] * change[:, at]).sum(1)
            if chosen.vector == 1:
                assert gain.min() > -1e-9
    assert loss(residual, HESSIAN) < loss(
        WEIGHTS[:4] - quantize(replace(task, options={"groups": "static", "refine": 0})).decode(), HESSIAN
    )


@pytest.mark.parametrize(
    "chosen",
    [
        grid("q4_k"),
        Pairs(),
        without_lattice(grid("int4-g128")),
        grid("fp8_e4m3-block"),
        grid("nvfp4"),
        grid("int3-tensor"),
    ],
    ids=lambda chosen: str(chosen.name),
)
def test_refinement_never_makes_a_row_block_worse(chosen: Grid) -> None:
    rows = ROWS if chosen.name == "fp8_e4m3-block" else 32
    last: Any = np.inf
    for sweeps in (0, 1, 3):
        found = quantize(Task(WEIGHTS[:rows], chosen, STATS, {"refine": sweeps}))
        residual = WEIGHTS[:rows].astype(np.float64) - found.decode()
        losses = (residual @ SQUARE * residual).sum(1)
        if chosen.name == "fp8_e4m3-block":  # 128 rows share a scale
            losses = losses.reshape(-1, 128).sum(1)
        assert (losses <= last * (1 + 1e-5)).all()
        last = losses


@pytest.mark.parametrize(
    "name", ["int4-channel", "int4-tensor", "nvfp4", "mxfp4", "fp8_e4m3-block", "iq3_s", "codebook3"]
)
def test_parameters_of_every_reach(name: str) -> None:
    chosen = grid(name)
    shared = chosen.prepare(float(np.abs(WEIGHTS).max())) or None
    task = Task(WEIGHTS, chosen, STATS, shared=shared)
    rounded = loss(WEIGHTS - round_to_nearest(task).decode(), HESSIAN)
    assert loss(WEIGHTS - quantize(task).decode(), HESSIAN) < 0.5 * rounded
    np.testing.assert_array_equal(quantize(replace(task, shared=None)).codes, quantize(task).codes)


def test_dead_channels_are_rounded_and_send_no_error() -> None:
    inputs = INPUTS.copy()
    inputs[:, [3, 200, 511]] = 0
    stats = moments(inputs)
    found = quantize(Task(WEIGHTS, grid("int4-g128"), stats, {"groups": "static", "refine": 0}))
    nearest = grid("int4-g128").encode(WEIGHTS, found.params)
    np.testing.assert_array_equal(found.codes[:, [3, 200, 511]], nearest[:, [3, 200, 511]])
    live = np.setdiff1d(np.arange(COLUMNS), [3, 200, 511])
    square = damped(stats.hessian[np.ix_(live, live)])  # type: ignore[index]
    slow = Slow(grid("f32"), np.arange(live.size), 0, np.ones(live.size, np.float32), {}, KEEP[:, live])
    values, _, _ = feed_back(WEIGHTS[:, live].astype(np.float64), square, slow)
    task = Task(WEIGHTS, grid("f32"), stats, {"refine": 0}, keep=KEEP)
    decoded = quantize(task).decode()
    np.testing.assert_allclose(decoded[:, live], values, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(decoded[:, [3, 200, 511]], np.where(KEEP, WEIGHTS, 0)[:, [3, 200, 511]])
    assert notes(task)[-1] == "3 input channels were always 0"


def test_a_singular_hessian_gets_more_dampening_and_the_ledger_hears_of_it() -> None:
    single = np.ones((COLUMNS, COLUMNS), dtype=np.float32)
    task = Task(
        WEIGHTS, grid("int4-g128"), Moments(np.ones(COLUMNS, np.float32), 1, hessian=single), {"dampening": 0.0}
    )
    assert np.isfinite(quantize(task).decode()).all()
    assert notes(task)[0].startswith("dampening raised from 0 to 1e-0")
    assert "dampening" not in notes(replace(task, options={}))[0]
    few = moments(INPUTS[:40])
    assert np.isfinite(quantize(Task(WEIGHTS, grid("int4-g128"), few)).decode()).all()


def test_bad_statistics_and_options_are_named() -> None:
    def attempt(hessian: Any, **options: Any) -> None:
        stats = None if hessian is None else Moments(np.ones(COLUMNS, np.float32), 1, hessian=hessian)
        quantize(Task(WEIGHTS, grid("int4-g128"), stats, options, place="block 3 down"))

    broken = HESSIAN.copy()
    broken[7, 9] = np.nan
    with pytest.raises(BadInputError, match="block 3 down: the Hessian is not finite at channel 9"):
        attempt(broken)
    negative = HESSIAN.copy()
    negative[5, 5] = -1
    with pytest.raises(BadInputError, match="block 3 down: the Hessian is -1 at channel 5"):
        attempt(negative)
    with pytest.raises(BadInputError, match="not positive definite even with dampening 1"):
        attempt(2 * np.eye(COLUMNS, dtype=np.float32) - 1)
    with pytest.raises(BadInputError, match=r"shape \(8, 8\), the matrix 512 columns"):
        attempt(HESSIAN[:8, :8])
    with pytest.raises(UsageError, match="block 3 down: gptq needs the Hessian"):
        attempt(None)
    for options in ({"order": "random"}, {"dampening": -0.1}, {"block": 0}, {"propagation": "all"}, {"refine": -1}):
        with pytest.raises(UsageError, match=f"gptq: option {next(iter(options))} is"):
            attempt(HESSIAN, **options)
    with pytest.raises(UsageError, match="propagation qronos needs the float inputs"):
        attempt(HESSIAN, propagation="qronos")


def test_matrices_with_one_input_share_the_factor() -> None:
    stats = moments(INPUTS)
    for rows in (slice(0, 8), slice(8, 32)):
        for name in ("int4-g128", "int3-g128"):
            quantize(Task(WEIGHTS[rows], grid(name), stats))
    assert [key[0] for key in stats._memo] == ["factor", "damped"]  # type: ignore[index]


def test_without_the_float_inputs_the_ledger_hears_of_it() -> None:
    task = Task(WEIGHTS, grid("int4-g128"), STATS)
    assert notes(task) == ("the float model's inputs are unknown: errors of earlier layers are not made up for",)
    assert notes(replace(task, options={"propagation": "none"})) == ()
    assert notes(replace(task, stats=moments(INPUTS, INPUTS))) == ()
