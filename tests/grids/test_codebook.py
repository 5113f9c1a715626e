"""Learned codebooks against the exact optimum of k-means in one dimension."""

import numpy as np
import numpy.typing as npt
import pytest

from anyquant.core.dtypes import Float32
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid

Float64 = npt.NDArray[np.float64]


def weights_of(kind: str, rows: int = 4, columns: int = 240) -> Float32:
    random = np.random.default_rng(3)
    shape = (rows, columns)
    values = random.standard_normal(shape) if kind == "normal" else random.standard_t(3, shape)
    return (values * 0.02 * random.lognormal(0, 1, (rows, 1))).astype(np.float32)


def importance_of(columns: int = 240) -> Float32:
    return np.random.default_rng(4).lognormal(0, 1.5, columns).astype(np.float32)


def losses(values: Float32, weights: Float32, importance: Float32 | None) -> Float64:
    """Weighted squared error of each row."""
    weight = 1.0 if importance is None else importance.astype(np.float64)
    total: Float64 = (weight * (values.astype(np.float64) - weights) ** 2).sum(axis=1)
    return total


def optimum(row: Float32, importance: Float32 | None, many: int) -> float:
    """The least weighted error of `many` values: dynamic programming over all intervals of the sorted row."""
    order = np.argsort(row)
    x = row[order].astype(np.float64)
    w = np.ones(len(x)) if importance is None else importance[order].astype(np.float64)
    total, first, second = (np.concatenate([[0.0], np.cumsum(w * x**power)]) for power in range(3))
    with np.errstate(invalid="ignore", divide="ignore"):
        cost = second[None] - second[:, None] - (first[None] - first[:, None]) ** 2 / (total[None] - total[:, None])
    cost[np.tril_indices(len(cost))] = np.inf
    np.fill_diagonal(cost, 0)
    best = cost[0].copy()
    for _ in range(many - 1):
        best = (best[:, None] + cost).min(axis=0)
    return float(best[-1])


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_error_is_that_of_the_optimum(bits: int, kind: str, important: bool) -> None:
    made, weights = grid(f"codebook{bits}"), weights_of(kind)
    importance = importance_of() if important else None
    params, codes = made.quantize(weights, importance)
    lost = losses(made.decode(codes, params), weights, importance)
    best = np.array([optimum(row, importance, 2**bits) for row in weights])
    assert (lost >= best * 0.9999).all() and (lost <= best * 1.02).all()
    plain = made.plain(weights)
    assert lost.sum() < 0.8 * losses(made.decode(made.encode(weights, plain), plain), weights, importance).sum()


@pytest.mark.parametrize(("bits", "columns"), [(3, 1500), (5, 1500), (7, 1500), (8, 1500)])
def test_long_rows_which_are_searched_in_bins_lose_little(bits: int, columns: int) -> None:
    made, weights = grid(f"codebook{bits}"), weights_of("heavy", 1, columns)
    params, codes = made.quantize(weights)
    lost = losses(made.decode(codes, params), weights, None)[0]
    # float16 values: half an ulp of each, whatever they are
    rounding = np.sum((weights * 2.0**-11) ** 2 / 3)
    assert lost <= 1.02 * optimum(weights[0], None, 2**bits) + rounding


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_the_nearest_values(bits: int) -> None:
    made, weights = grid(f"codebook{bits}"), weights_of("heavy", 3, 700)
    params, codes = made.quantize(weights)
    values = params["values"].astype(np.float32)
    assert (np.diff(values, axis=1) >= 0).all() and params["values"].dtype == np.float16
    distance = np.abs(weights[..., None].astype(np.float64) - values[:, None])
    decoded = QTensor(made, (3, 700), codes, params).decode()
    np.testing.assert_array_equal(decoded, values[np.arange(3)[:, None], codes])
    np.testing.assert_allclose(np.abs(weights - decoded), distance.min(axis=2), atol=1e-8)
    lattice = made.lattice(params)
    assert lattice is not None and lattice.scale.shape == (3, 1)
    np.testing.assert_array_equal(lattice.levels, values)
    assert made.bits((3, 700)) == 3 * 700 * bits + 3 * 2**bits * 16


def test_slices_of_rows_and_columns_are_slices_of_the_result() -> None:
    made, weights = grid("codebook4"), weights_of("heavy", 70, 600)
    importance = importance_of(600)
    params, codes = made.quantize(weights, importance)
    some, part = made.quantize(weights[61:68], importance)
    np.testing.assert_array_equal(part, codes[61:68])
    np.testing.assert_array_equal(some["values"], params["values"][61:68])
    for columns in (slice(0, 600), slice(31, 570), slice(64, 65)):
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        expected = made.decode(codes, params)[:, columns]
        np.testing.assert_array_equal(made.decode(codes[:, columns], params, columns), expected)


def test_rows_of_few_values_are_exact_and_pruned_weights_stay_zero() -> None:
    made = grid("codebook3")
    weights = np.tile(np.array([-0.5, 0.25, 0.0, -0.0, 1.5, 0.25, 3.0, -0.5], dtype=np.float32), (2, 8))
    weights[1] = 0.125
    params, codes = made.quantize(weights)
    np.testing.assert_array_equal(made.decode(codes, params), weights)
    pruned = weights_of("normal", 6, 256) + np.float32(0.004)
    pruned[:, ::2] = 0
    for bits in (2, 4, 8):
        params, codes = grid(f"codebook{bits}").quantize(pruned)
        assert (grid(f"codebook{bits}").decode(codes, params)[:, ::2] == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hard_rows_stay_finite(bits: int) -> None:
    made, weights = grid(f"codebook{bits}"), weights_of("normal", 6, 320)
    weights[0], weights[1], weights[2] = 0, 0.5, weights[2] * np.float32(1e-38)
    weights[3, 7], weights[4, 9:11] = 1e4, (3.4028235e38, -3.4028235e38)
    sparse = np.zeros(320, dtype=np.float32)
    sparse[40] = 1
    for importance in (None, np.zeros(320, dtype=np.float32), np.full(320, 1e30, dtype=np.float32), sparse):
        params, codes = made.quantize(weights, importance)
        values = made.decode(codes, params)
        assert np.isfinite(values).all() and (values[0] == 0).all()
        np.testing.assert_array_equal(values[1], 0.5)
        assert np.abs(values[2]).max() <= 6e-8
        if importance is not sparse:
            np.testing.assert_allclose(values[3, 7], 1e4, rtol=1e-3)
            np.testing.assert_array_equal(values[4, 9:11], [65504, -65504])
