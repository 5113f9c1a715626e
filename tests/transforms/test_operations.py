"""Operations against their dense matrices in float64, Hadamard matrices by their definition."""

import json
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from anyquant.calibrate.stats import Moments
from anyquant.core.errors import AnyQuantError
from anyquant.transforms.hadamard import hadamard_factors, hadamard_product
from anyquant.transforms.moments import map_moments
from anyquant.transforms.operations import Hadamard, Operation, Permute, Replace, Rotate, Scale, random_rotation
from anyquant.transforms.rewrites import Axis, Rewrite, Rewrites

RNG = np.random.default_rng(0)
OPERATIONS: list[Operation] = [
    Scale(np.exp(RNG.standard_normal(24)).astype(np.float32)),
    Permute(RNG.permutation(24)),
    random_rotation(24, 24, 1),
    random_rotation(24, 8, 1),
    random_rotation(24, 24, 1, "random"),
    random_rotation(24, 6, 1),  # no Hadamard matrix of order 6: a random one
]


def dense(operation: Operation) -> Any:
    """The matrix T: its columns are what becomes of the unit vectors."""
    return operation.apply(np.eye(operation.size, dtype=np.float32)).astype(np.float64).T


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.kind}-{o.size}")
def test_inverse_transposed_and_dual(operation: Operation) -> None:
    matrix = dense(operation)
    np.testing.assert_allclose(operation.apply_down(np.eye(24, dtype=np.float32)), matrix, atol=1e-6)
    np.testing.assert_allclose(dense(operation.inverse), np.linalg.inv(matrix), atol=1e-6)
    np.testing.assert_allclose(dense(operation.transposed), matrix.T, atol=1e-6)
    np.testing.assert_allclose(dense(operation.dual), np.linalg.inv(matrix).T, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 40, 128, 576, 640, 896, 960])
def test_hadamard_matrices(order: int) -> None:
    factors = hadamard_factors(order)
    assert factors is not None
    product = hadamard_product(np.eye(order, dtype=np.float32)[:, :, None], factors)[:, :, 0].T
    assert set(np.unique(product)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(product @ product.T, order * np.eye(order))
    if order & (order - 1) == 0:
        np.testing.assert_array_equal(product, scipy.linalg.hadamard(order))


def test_widths_of_published_models_have_a_fast_rotation() -> None:
    """Hidden sizes and head sizes; only an order without a matrix falls back to a dense one."""
    for order in (64, 80, 96, 128, 256, 896, 1152, 1536, 2304, 2560, 2880, 3072, 3584, 3840, 5120, 5376, 6144, 7168):
        factors = hadamard_factors(order)
        assert factors is not None and max(map(len, factors)) <= 180, order
    assert hadamard_factors(6) is None and hadamard_factors(7 * 2) is None
    assert isinstance(random_rotation(14, 14, 0), Rotate) and isinstance(random_rotation(128, 64, 0), Hadamard)


def test_one_row_does_not_depend_on_its_neighbours() -> None:
    rows = RNG.standard_normal((300, 896)).astype(np.float32)
    rotation = random_rotation(896, 896, 4)
    np.testing.assert_array_equal(rotation.apply(rows)[37:41], rotation.apply(rows[37:41]))


def test_a_hadamard_rotation_spreads_an_outlier() -> None:
    rows = RNG.standard_normal((64, 512)).astype(np.float32)
    rows[:, 7] *= 100
    turned = random_rotation(512, 512, 0).apply(rows)

    def peak(values: Any) -> float:
        return float((np.abs(values).max(axis=1) / np.sqrt(np.square(values).mean(axis=1))).mean())

    assert peak(rows) > 10 and peak(turned) < 5
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-5)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.kind}-{o.size}")
def test_moments_follow(operation: Operation) -> None:
    """Against the statistics of activations that were changed one by one."""
    before, unquantized = (RNG.standard_normal((50, 24)).astype(np.float32) + 0.3 for _ in range(2))

    def measured(x: Any, f: Any) -> Moments:
        second, largest, mean = np.square(x).mean(axis=0), np.abs(x).max(axis=0), x.mean(axis=0)
        return Moments(second, 50, largest, mean, x.T @ x / 50, f.T @ x / 50)

    found = map_moments(measured(before, unquantized), operation)
    expected = measured(operation.apply(before), operation.apply(unquantized))
    for name in ("second_moment", "mean", "hessian", "cross"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5, err_msg=name)
    if operation.kind in ("scale", "permute"):
        assert found.absolute_maximum is not None and expected.absolute_maximum is not None
        np.testing.assert_allclose(found.absolute_maximum, expected.absolute_maximum, rtol=1e-6)
    else:
        assert found.absolute_maximum is None  # it cannot be known
        with pytest.raises(AnyQuantError, match="without the hessian"):
            map_moments(Moments(np.ones(24, dtype=np.float32), 1), operation)


def test_what_cannot_be() -> None:
    with pytest.raises(AnyQuantError, match="scaled by 0"):
        _ = Scale(np.array([1, 0], dtype=np.float32)).inverse
    with pytest.raises(AnyQuantError, match="not finite"):
        Scale(np.array([1, np.inf], dtype=np.float32))
    with pytest.raises(AnyQuantError, match="twice"):
        Permute(np.array([0, 0]))
    with pytest.raises(AnyQuantError, match="restored"):
        _ = Replace(np.ones(2, dtype=np.float32)).dual


def test_rewrites_are_stored_and_hashed() -> None:
    shared = OPERATIONS[2]
    tensors: dict[str, tuple[Rewrite, ...]] = {
        name: (Rewrite(shared, Axis.ROWS, 0, 24), Rewrite(operation, Axis.COLUMNS, 2, 7))
        for name, operation in zip("abcdef", OPERATIONS, strict=True)
    }
    tensors["g"] = (Rewrite(Replace(np.ones(3, dtype=np.float32)), Axis.ROWS, 0, 3),)
    rewrites = Rewrites(tensors, {"g": "a"}, {"tie_word_embeddings": False}, {"group": (shared,)}, ("a note",))
    description, arrays = rewrites.to_arrays()
    assert len(arrays) == 7  # the shared one once
    again = Rewrites.from_arrays(json.loads(json.dumps(description)), arrays)
    assert again.digest() == rewrites.digest() and again.notes == rewrites.notes
    vectors = RNG.standard_normal((4, 24)).astype(np.float32)
    for name, operation in zip("abcdef", OPERATIONS, strict=True):
        np.testing.assert_array_equal(again.tensors[name][1].operation.apply(vectors), operation.apply(vectors))
    arrays["operation.1"] = arrays["operation.1"] * 2
    assert Rewrites.from_arrays(description, arrays).digest() != rewrites.digest()
