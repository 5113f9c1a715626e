"""Learned rotations: what they gain is measured on the rewritten matrices, and what is known to be there is found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from anyquant.core.checkpoint import read_view
from anyquant.core.errors import BadInputError
from anyquant.core.linear import Linear, Role, View
from anyquant.core.options import complete_options
from anyquant.core.progress import Silent
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.prepare import prepare
from anyquant.pipeline.recipe import Recipe
from anyquant.transforms import rotate
from anyquant.transforms.checkpoint import RewrittenCheckpoint, settle
from anyquant.transforms.learn import Problem, Turned, learn
from anyquant.transforms.operations import Hadamard, Rotate, random_rotation
from anyquant.transforms.rewrites import Rewrites
from support.checkpoints import make_checkpoint
from support.memory import MemoryCheckpoint

GRID = "int3-g32"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MemoryCheckpoint:
    """Grouped key-value heads, and outliers in single channels."""
    folder = make_checkpoint(tmp_path_factory.mktemp("learned") / "model", "llama", hidden=64, blocks=2)
    found = MemoryCheckpoint.of(folder)
    for name, array in found.arrays.items():
        if name.endswith(("up_proj.weight", "q_proj.weight")):
            array[:, 5] *= 30
    return found


def rewrites(checkpoint: Any, **options: Any) -> Rewrites:
    if "kind" in options:
        options = {"grid": GRID, **options}
    complete = complete_options("rotate", options, rotate.DEFAULTS)
    assert rotate.refuses(detect(checkpoint), complete) is None
    return rotate.prepare(detect(checkpoint), checkpoint, complete)


def loss(checkpoint: Any, found: Rewrites, roles: set[Role], grid: str = GRID) -> float:
    """Relative squared error of rounding to nearest, the sum over the rewritten matrices."""
    changed, lies_on = RewrittenCheckpoint(checkpoint, found), find_grid(grid)
    total = 0.0
    for linear in detect(changed).linears:
        if linear.role in roles and linear.block is not None:
            weights = read_view(changed, linear.view, 0, linear.view.rows)
            params, codes = lies_on.quantize(weights)
            error = np.square(lies_on.decode(codes, params).astype(np.float64) - weights)
            total += float(error.sum() / np.square(weights, dtype=np.float64).sum())
    return total


STREAM = {Role.ATTN_Q, Role.ATTN_K, Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN}
VALUES = {Role.ATTN_V, Role.ATTN_OUTPUT}


def test_rounding_loses_less_than_behind_a_hadamard_matrix(llama: MemoryCheckpoint) -> None:
    drawn, learned = rewrites(llama), rewrites(llama, kind="learned", steps=120)
    assert loss(llama, drawn, STREAM) < 0.9 * loss(llama, Rewrites(), STREAM)
    assert loss(llama, learned, STREAM) < 0.93 * loss(llama, drawn, STREAM)
    assert loss(llama, learned, VALUES) < 0.75 * loss(llama, drawn, VALUES)
    for part, roles in (({"r2": False}, STREAM), ({"r1": False}, VALUES)):
        alone = loss(llama, rewrites(llama, kind="learned", steps=120, **part), roles)
        assert alone < 0.9 * loss(llama, rewrites(llama, **part), roles), part


def test_it_is_learned_for_the_grid_that_is_named(llama: MemoryCheckpoint) -> None:
    ours, other = (rewrites(llama, kind="learned", steps=60, grid=name) for name in ("mxfp4", GRID))
    assert loss(llama, ours, STREAM, "mxfp4") < 0.95 * loss(llama, other, STREAM, "mxfp4")
    # the recipe's grid where none is
    options = {"kind": "learned", "steps": 2}
    for grid, expected in (("mxfp4", "mxfp4"), (None, rotate.PROXY)):
        recipe = Recipe(grid=grid, preset=None if grid else "Q4_K_M", algorithm="rotate -> rtn", options=options)
        found = prepare(llama, recipe).checkpoint
        assert isinstance(found, RewrittenCheckpoint)
        assert found.rewrites.digest() == rewrites(llama, **options, grid=expected).digest()


def test_rotations_are_orthogonal_and_the_same_for_a_seed(llama: MemoryCheckpoint) -> None:
    found = rewrites(llama, kind="learned", steps=40)
    rotations = {id(r.operation): r.operation for several in found.tensors.values() for r in several}
    turning = [one for one in rotations.values() if isinstance(one, Rotate)]
    assert {len(one.matrix) for one in turning} == {64, detect(llama).dimensions.head_dim}
    for one in turning:
        exact = one.matrix.astype(np.float64)
        np.testing.assert_allclose(exact @ exact.T, np.eye(len(exact)), atol=1e-6)
        np.testing.assert_array_equal(one.inverse.matrix, one.matrix.T)
    assert rewrites(llama, kind="learned", steps=40).digest() == found.digest()
    assert rewrites(llama, kind="learned", steps=40, seed=1).digest() != found.digest()
    restored = Rewrites.from_arrays(*found.to_arrays())
    assert restored.digest() == found.digest()


def test_drawn_rotations_are_what_they_were(llama: MemoryCheckpoint) -> None:
    found = rewrites(llama, seed=7)
    signs = 2 * np.random.default_rng([7, 64]).integers(0, 2, 64) - 1
    stream = found.tensors["model.embed_tokens.weight"][-1].operation
    assert isinstance(stream, Hadamard)
    np.testing.assert_array_equal(stream.signs, signs)
    assert not any(isinstance(r.operation, Rotate) for several in found.tensors.values() for r in several)


def test_planning_learns_nothing(llama: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(problem: Problem, progress: Any) -> Any:
        calls.append(problem.order)
        return learn(problem, progress)

    monkeypatch.setattr(rotate, "learn", counted)
    changed = RewrittenCheckpoint(llama, rewrites(llama, kind="learned", steps=2))
    assert detect(changed).by_name["blocks.0.attn_q"].shape == (64, 64) and not calls
    settle(changed, Silent())
    size = detect(llama).dimensions.head_dim
    assert calls == [64, size, size]
    read_view(changed, detect(changed).by_name["blocks.1.attn_v"].view, 0, 1)
    assert len(calls) == 3  # what was learned is kept


def in_memory(values: Any, writes: bool) -> Turned:
    whole = values.astype(np.float32)
    view = View("w", 0, *whole.shape)
    return Turned(Linear("w", Role.FFN_UP, view, 0, "x", "m"), writes, lambda start, stop: whole[start:stop])


@pytest.mark.parametrize("writes", [False, True])
def test_a_rotation_that_is_known_to_be_there_is_found(writes: bool) -> None:
    """Matrices that lie on the grid, turned a little: turning back takes nearly all of the error away."""
    rng, order = np.random.default_rng(3), 32
    skew = rng.standard_normal((order, order)) * 0.01
    away = scipy.linalg.expm(skew - skew.T)
    matrices = [rng.integers(-3, 4, (256, order)) * 0.125 for _ in range(2)]
    turned = [in_memory(away @ exact.T if writes else exact @ away.T, writes) for exact in matrices]
    start = Rotate(order, np.eye(order, dtype=np.float32))
    found = learn(Problem(start, turned, find_grid("int3-g32"), 300, 0.02, (0,)), Silent())
    assert found.ratio < 0.05
    # up to signs, which are drawn
    np.testing.assert_allclose(np.abs(found.matrix @ away), np.eye(order), atol=0.01)


def test_no_direction_is_laid_where_errors_add_up() -> None:
    """int2 has two levels below zero and one above: rows that all lie on one side round better, and all err there."""
    rng, order = np.random.default_rng(5), 64
    common = rng.standard_normal(order)
    turned = [in_memory(rng.standard_normal((512, order)) + 0.7 * common, False) for _ in range(3)]
    start = random_rotation(order, order, 0)
    found = learn(Problem(start, turned, find_grid("int2-g32"), 200, 0.05, (0,)), Silent())
    assert found.ratio < 0.97
    along = found.matrix @ (common / np.linalg.norm(common))
    assert abs(along.sum()) / np.sqrt(order) < 0.4


def test_damaged_weights_are_named(llama: MemoryCheckpoint, tmp_path: Path) -> None:
    broken = MemoryCheckpoint({name: array.copy() for name, array in llama.arrays.items()}, dict(llama.config))
    broken.arrays["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    with pytest.raises(BadInputError, match="a weight is not finite"):
        settle(RewrittenCheckpoint(broken, rewrites(broken, kind="learned", steps=30)), Silent())
