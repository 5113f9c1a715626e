"""A rewritten checkpoint read in ranges, against the rewrite written out in float64."""

from typing import Any

import numpy as np
import pytest

from anyquant.core.checkpoint import read_rows, read_tensor
from anyquant.core.errors import AnyQuantError
from anyquant.transforms import checkpoint as rewriting
from anyquant.transforms.checkpoint import RewrittenCheckpoint
from anyquant.transforms.operations import Operation, Permute, Scale, random_rotation
from anyquant.transforms.rewrites import Axis, Rewrite, Rewrites
from support.memory import MemoryCheckpoint

RNG = np.random.default_rng(1)
HIGH, WIDE = 700, 48


def dense(operation: Operation) -> Any:
    return operation.apply(np.eye(operation.size, dtype=np.float32)).astype(np.float64).T


@pytest.fixture
def base() -> MemoryCheckpoint:
    arrays = {
        "matrix": RNG.standard_normal((HIGH, WIDE)).astype(np.float32),
        "stack": RNG.standard_normal((5, 20, WIDE)).astype(np.float32),
        "vector": RNG.standard_normal(60).astype(np.float32),
        "other": RNG.standard_normal((3, 4)).astype(np.float32),
    }
    return MemoryCheckpoint(arrays, {"tie_word_embeddings": True, "width": WIDE})


def test_any_range_of_rows(base: MemoryCheckpoint) -> None:
    """Columns and rows of parts of one tensor, in order, read whole and in pieces across every border."""
    columns, scale = random_rotation(WIDE, WIDE, 0), Scale(np.exp(RNG.standard_normal(400)).astype(np.float32))
    rows = Permute(RNG.permutation(300))
    changed = RewrittenCheckpoint(
        base,
        Rewrites(
            {
                "matrix": (
                    Rewrite(columns, Axis.COLUMNS, 0, 350),
                    Rewrite(rows, Axis.ROWS, 100, 400),
                    Rewrite(scale, Axis.ROWS, 300, 700),
                )
            }
        ),
    )
    expected = base.arrays["matrix"].astype(np.float64)
    expected[:350] = expected[:350] @ dense(columns).T
    expected[100:400] = dense(rows) @ expected[100:400]
    expected[300:] *= scale.values[:, None]
    assert changed.spec("matrix").dtype == "F32" and changed.spec("matrix").shape == (HIGH, WIDE)
    whole = read_tensor(changed, "matrix")
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
    for start, stop in ((0, 1), (99, 101), (255, 257), (399, 401), (380, 700), (699, 700), (5, 5)):
        again = RewrittenCheckpoint(base, changed.rewrites)
        np.testing.assert_array_equal(read_rows(again, "matrix", start, stop), whole[start:stop])


def test_expert_of_a_stack_and_part_of_a_vector(base: MemoryCheckpoint) -> None:
    turn, move = random_rotation(20, 20, 0), Permute(RNG.permutation(15))
    rewrites = Rewrites(
        {
            "stack": (Rewrite(turn, Axis.ROWS, 40, 60),),
            "vector": (Rewrite(move, Axis.ROWS, 30, 45),),
        }
    )
    changed = RewrittenCheckpoint(base, rewrites)
    stack = base.arrays["stack"].astype(np.float64)
    stack[2] = dense(turn) @ stack[2]
    np.testing.assert_allclose(read_tensor(changed, "stack"), stack, atol=1e-5)
    vector = base.arrays["vector"].copy()
    vector[30:45] = vector[30:45][move.index]
    np.testing.assert_array_equal(read_tensor(changed, "vector"), vector)
    np.testing.assert_array_equal(base.arrays["vector"][:30], vector[:30])  # the base is not written to


def test_added_tensors_and_config(base: MemoryCheckpoint) -> None:
    double = Rewrite(Scale(np.full(4, 2, dtype=np.float32)), Axis.COLUMNS, 0, 3)
    first = Rewrites({"other": (double,)})
    second = Rewrites({"copy": (double,)}, {"copy": "other"}, {"tie_word_embeddings": False})
    both = RewrittenCheckpoint(base, first.then(second))
    nested = RewrittenCheckpoint(RewrittenCheckpoint(base, first), second)
    for changed in (both, nested):
        assert changed.config == {"tie_word_embeddings": False, "width": WIDE}
        assert list(changed.names()) == ["matrix", "stack", "vector", "other", "copy"]
        np.testing.assert_array_equal(read_tensor(changed, "copy"), 4 * base.arrays["other"])
        np.testing.assert_array_equal(read_tensor(changed, "other"), 2 * base.arrays["other"])


def test_untouched_tensors_pass_as_stored(base: MemoryCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = RewrittenCheckpoint(base, Rewrites())
    monkeypatch.setattr(rewriting, "read_rows", lambda *_: pytest.fail("decoded"))
    np.testing.assert_array_equal(read_tensor(changed, "matrix"), base.arrays["matrix"])


def test_memory_is_bounded(base: MemoryCheckpoint) -> None:
    rewrites = Rewrites({"matrix": (Rewrite(Scale(np.ones(HIGH, dtype=np.float32)), Axis.ROWS, 0, HIGH),)})
    changed = RewrittenCheckpoint(base, rewrites)
    read_tensor(changed, "matrix")
    assert sum(piece.nbytes for piece in changed._kept.values()) <= rewriting.KEPT * rewriting.STEP * WIDE * 4


def test_rewrites_that_do_not_fit_are_refused(base: MemoryCheckpoint) -> None:
    scale = Scale(np.ones(7, dtype=np.float32))
    for name, rewrite, message in (
        ("absent", Rewrite(scale, Axis.ROWS, 0, 7), "no tensor absent"),
        ("matrix", Rewrite(scale, Axis.ROWS, 0, 8), "does not fit rows 0 to 8"),
        ("matrix", Rewrite(scale, Axis.COLUMNS, 0, 8), "does not fit"),
        ("vector", Rewrite(scale, Axis.ROWS, 54, 61), "does not fit"),
    ):
        with pytest.raises(AnyQuantError, match=message):
            RewrittenCheckpoint(base, Rewrites({name: (rewrite,)}))
