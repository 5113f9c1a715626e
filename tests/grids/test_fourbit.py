"""NF4 and FP4: tables from their definitions, scales against trying many, double quantization against its recipe."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import norm

from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid, Params
from anyquant.core.qtensor import QTensor
from anyquant.grids import fourbit, grid

NAMES = ["nf4-g32", "nf4-g64", "nf4-g256", "fp4-g64", "nf4-g64-double", "fp4-g32-double"]
PLAIN_NAMES = NAMES[:4]


def weights_of(kind: str = "normal", rows: int = 12, columns: int = 768) -> Float32:
    random = np.random.default_rng(3)
    shape = (rows, columns)
    values = random.standard_normal(shape) if kind == "normal" else random.standard_t(3, shape)
    return (values * 0.02 * random.lognormal(0, 1, (rows, 1))).astype(np.float32)


def importance_of(columns: int = 768, sigma: float = 1.0) -> Float32:
    return np.random.default_rng(4).lognormal(0, sigma, columns).astype(np.float32)


def errors(made: Grid, weights: Float32, params: Params, importance: Float32 | None) -> npt.NDArray[np.float64]:
    """Weighted squared error of each group from decoded values."""
    values = made.decode(made.encode(weights, params), params).astype(np.float64)
    lost = (1.0 if importance is None else importance) * (values - weights) ** 2
    total: npt.NDArray[np.float64] = lost.reshape(len(weights), -1, made.block[1]).sum(axis=2)
    return total


def test_nf4_are_the_quantiles_of_the_normal_distribution() -> None:
    """QLoRA: eight positive and seven negative quantiles evenly spaced in probability up to `offset`, and 0."""
    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(fourbit.NF4, levels / levels.max(), atol=2e-7)


def test_fp4_are_bitsandbytes_magnitudes_in_its_order() -> None:
    expected = [0, 0.00520833, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25]
    np.testing.assert_allclose(fourbit.FP4, [*expected, *(-value for value in expected)], rtol=1e-6)


def test_the_dynamic_map_is_bitsandbytes() -> None:
    """Its recipe, in the library it is written in; torch's linspace may differ by one rounding between processors."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10 ** (decade - 6) * ((edges[1:] + edges[:-1]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    expected = np.sort(torch.tensor(values).numpy())
    np.testing.assert_array_max_ulp(fourbit.dynamic_map(), expected, 2)


@pytest.mark.parametrize("name", ["nf4-g64", "fp4-g64"])
def test_the_nearest_level_is_chosen(name: str) -> None:
    made = grid(name)
    x = np.linspace(-1.1, 1.1, 6400, dtype=np.float32)[None]
    x[0, :64] = 0
    codes = made.encode(x, {"absmax": np.ones((1, 100), dtype=np.float32)})
    values = np.array(fourbit.TABLES[name[:3]], dtype=np.float32)
    distance = np.abs(x[0, :, None].astype(np.float64) - values)
    np.testing.assert_allclose(np.abs(x[0] - values[codes[0]]), distance.min(axis=1), atol=1e-7)
    assert (codes[0, :64] == (7 if name == "nf4-g64" else 0)).all() and len(np.unique(codes)) >= 15


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_no_group_is_worse_than_plain_and_all_are_near_the_best_scale(name: str, kind: str, important: bool) -> None:
    made, weights = grid(name), weights_of(kind)
    importance = importance_of() if important else None
    params, plain = made.fit(weights, importance), made.plain(weights)
    largest = np.abs(weights).reshape(12, -1, made.block[1]).max(axis=2)
    np.testing.assert_array_equal(plain["absmax"], largest)
    ours, theirs = (errors(made, weights, chosen, importance) for chosen in (params, plain))
    assert (ours <= theirs * (1 + 1e-4)).all() and ours.sum() < 0.93 * theirs.sum()
    best = np.full(ours.shape, np.inf)
    for factor in np.linspace(0.2, 2.0, 700, dtype=np.float32):
        best = np.minimum(best, errors(made, weights, {"absmax": largest * factor}, importance))
    assert ours.sum() <= best.sum() * 1.005


@pytest.mark.parametrize("name", NAMES[4:])
def test_double_quantization_follows_its_recipe_and_costs_little(name: str) -> None:
    made, weights, group = grid(name), weights_of("heavy", 5, 19200), 64 if "64" in name else 32
    largest = np.abs(weights).reshape(5, -1, group).max(axis=2).astype(np.float64)
    offset = largest.mean(axis=1)
    plain = made.plain(weights)
    np.testing.assert_allclose(plain["offset"][:, 0], offset, rtol=1e-6)
    scales = np.empty_like(largest)
    for row in range(5):
        for first in range(0, largest.shape[1], 256):
            part = largest[row, first : first + 256] - offset[row]
            nested = np.abs(part).max()
            np.testing.assert_allclose(plain["nested"][row, first // 256], nested, rtol=1e-5)
            distance = np.abs(part[:, None] / nested - fourbit.dynamic_map().astype(np.float64))
            found = fourbit.dynamic_map()[distance.argmin(axis=1)]
            scales[row, first : first + 256] = found * nested + offset[row]
    codes = made.encode(weights, plain)
    values = np.array(fourbit.TABLES[name[:3]])[codes] * np.repeat(scales, group, axis=1)
    np.testing.assert_allclose(made.decode(codes, plain), values, atol=2e-3 * largest.max(), rtol=1e-3)
    importance = importance_of(19200)
    params, codes = made.quantize(weights, importance)
    ours = errors(made, weights, params, importance).sum(axis=1)
    assert (ours <= errors(made, weights, plain, importance).sum(axis=1) * (1 + 1e-4)).all()
    single = grid(name.removesuffix("-double"))
    assert ours.sum() <= 1.02 * errors(single, weights, single.fit(weights, importance), importance).sum()
    QTensor(made, (5, 19200), codes, params)
    assert made.bits((5, 19200)) == 5 * 19200 * 4 + largest.size * 8 + plain["nested"].size * 32 + 5 * 32


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_rows_and_columns_are_slices_of_the_result(name: str) -> None:
    made, weights = grid(name), weights_of("heavy", 6, 19200 if "double" in name else 768)
    importance = importance_of(weights.shape[1])
    params, codes = made.quantize(weights, importance)
    some, part = made.quantize(weights[2:5], importance)
    np.testing.assert_array_equal(part, codes[2:5])
    for key, values in some.items():
        np.testing.assert_array_equal(values, params[key][2:5])
    values = made.decode(codes, params)
    for columns in (slice(0, 768), slice(31, 570), slice(64, 65), slice(700, 768)):
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        np.testing.assert_array_equal(made.decode(codes[:, columns], params, columns), values[:, columns])
    if "double" in name:  # the second block of 256 maxima
        columns = slice(16390, 19000)
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        np.testing.assert_array_equal(made.decode(codes[:, columns], params, columns), values[:, columns])
    lattice = made.lattice(params)
    assert lattice is not None and len(lattice.levels) == (16 if name.startswith("nf4") else 15)
    unit = lattice.scale[:, np.arange(64) // lattice.width]
    place = np.abs(weights[:, :64, None] - unit[..., None] * lattice.levels).argmin(axis=2)
    np.testing.assert_array_equal(made.decode(lattice.codes[place], params, slice(0, 64)), values[:, :64])


@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_stay_finite(name: str) -> None:
    made, weights = grid(name), weights_of("normal", 6, 512)
    weights[0], weights[1], weights[2] = 0, 0.5, weights[2] * np.float32(1e-38)
    weights[3, :64] = 0
    weights[4, 5], weights[5, 300:302] = 1e4, (3.4028235e38, -3.4028235e38)
    sparse = np.zeros(512, dtype=np.float32)
    sparse[40] = 1
    for importance in (None, np.zeros(512, dtype=np.float32), np.full(512, 1e30, dtype=np.float32), sparse):
        params, codes = made.quantize(weights, importance)
        values = made.decode(codes, params)
        assert np.isfinite(values).all() and (values[0] == 0).all()
        np.testing.assert_allclose(values[1], 0.5, rtol=1e-3)
        if importance is None:
            np.testing.assert_allclose(values[4, 5], 1e4, rtol=1e-2)
            assert values[5, 300] > 9e37 and values[5, 301] < -9e37
    np.testing.assert_array_equal(made.decode(*made.quantize(np.zeros((2, 256), dtype=np.float32))[::-1]), 0)
