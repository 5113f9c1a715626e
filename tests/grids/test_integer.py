"""Group-wise integers: search against a plain one, against plain rounding group by group, and hard input."""

import numpy as np
import pytest
import torch

from anyquant.core.dtypes import Float32, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid, integer, scales

NAMES = ["int2-g64", "int3-g16", "int4-g128", "int4-g32", "int5-g64", "int8-g256", "int4-g128-f16"]


def weights_of(kind: str, rows: int = 12, columns: int = 768) -> Float32:
    random = np.random.default_rng(3)
    shape = (rows, columns)
    values = random.standard_normal(shape) if kind == "normal" else random.standard_t(3, shape)
    return (values * 0.02).astype(np.float32)


def errors(name: str, weights: Float32, scale: Float32, importance: Float32 | None) -> Float32:
    """Weighted squared error of each group under given scales, from the definition."""
    bits, group = int(name[3]), grid(name).block[1]
    x = weights.astype(np.float64).reshape(len(weights), -1, group)
    d = scale.astype(np.float64)[..., None]
    levels = np.clip(
        np.rint(np.divide(x, d, out=np.zeros_like(x), where=d != 0)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    weight = 1.0 if importance is None else importance.reshape(-1, group)
    total: Float32 = np.sum(weight * (d * levels - x) ** 2, axis=2)
    return total


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("name", NAMES)
def test_no_group_is_worse_than_plain_rounding_and_all_are_better(name: str, kind: str, important: bool) -> None:
    made, weights = grid(name), weights_of(kind)
    group = made.block[1]
    importance = np.random.default_rng(4).lognormal(0, 1, 768).astype(np.float32) if important else None
    params, codes = made.quantize(weights, importance)
    largest = np.abs(weights).reshape(12, -1, group).max(axis=2) / np.float32(2 ** (made.code_bits - 1) - 1)
    plain = errors(name, weights, bfloat16_to_float32(float32_to_bfloat16(largest)), importance)
    ours = errors(name, weights, params["scale"], importance)
    assert (ours <= plain * (1 + 1e-4)).all()
    assert ours.sum() < plain.sum() * 0.97
    values = made.decode(codes, params)
    weight = made.weighting(weights, importance)
    assert np.sum(weight * (values - weights) ** 2) == pytest.approx(ours.sum(), rel=1e-4)


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_search_equals_the_plain_one(name: str, important: bool) -> None:
    made, weights = grid(name), weights_of("heavy")
    assert isinstance(made, integer.IntegerGrid)
    importance = np.random.default_rng(4).lognormal(0, 1, 768).astype(np.float32) if important else None
    fast = made.fit(weights, importance)["scale"]
    slow = scales.slow_scales(weights, importance, made.search.levels(), made.search.ladder())
    assert np.mean(fast == slow) > 0.9
    fast_error, slow_error = (errors(name, weights, scale, importance).sum() for scale in (fast, slow))
    assert fast_error <= slow_error * 1.002


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_positive_of_16_bits_and_values_are_scale_times_code(name: str) -> None:
    made, weights = grid(name), weights_of("normal")
    params, codes = made.quantize(weights)
    scale = params["scale"]
    stored = torch.from_numpy(scale).to(torch.float16 if name.endswith("f16") else torch.bfloat16)
    np.testing.assert_array_equal(stored.float().numpy(), scale)
    assert (scale > 0).all()
    assert codes.min() >= -(2 ** (made.code_bits - 1)) and codes.max() <= 2 ** (made.code_bits - 1) - 1
    tensor = QTensor(grid=made, shape=(12, 768), codes=codes, params=params)
    expected = np.repeat(scale, made.block[1], axis=1) * codes.astype(np.float32)
    np.testing.assert_array_equal(tensor.decode(), expected)
    assert made.bits((12, 768)) == 12 * 768 * made.code_bits + scale.size * 16


def test_the_lowest_level_is_used() -> None:
    """A group whose largest weight is negative reaches -8, which plain rounding to -7..7 would waste."""
    weights = np.linspace(-8, 7, 16, dtype=np.float32)[None] * np.float32(0.5)
    params, codes = grid("int4-g16").quantize(weights)
    np.testing.assert_array_equal(codes, np.arange(-8, 8)[None])
    np.testing.assert_array_equal(params["scale"], [[0.5]])


def test_rows_are_independent_and_columns_encode_alike() -> None:
    made, weights = grid("int4-g64"), weights_of("heavy", columns=192)
    importance = np.random.default_rng(4).lognormal(0, 1, 192).astype(np.float32)
    params, codes = made.quantize(weights, importance)
    some, part = made.quantize(weights[4:5], importance)
    np.testing.assert_array_equal(part, codes[4:5])
    np.testing.assert_array_equal(some["scale"], params["scale"][4:5])
    for columns in (slice(0, 192), slice(63, 130), slice(9, 10)):
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        np.testing.assert_array_equal(
            made.decode(codes[:, columns], params, columns), made.decode(codes, params)[:, columns]
        )


@pytest.mark.parametrize("importance", [None, np.zeros(128, dtype=np.float32), np.full(128, 1e30, dtype=np.float32)])
def test_hard_rows_stay_finite(importance: Float32 | None) -> None:
    made = grid("int4-g128")
    weights = weights_of("normal", 5, 128)
    weights[0], weights[1], weights[2] = 0, 0.5, weights[2] * np.float32(1e-40)
    weights[3, 7], weights[4] = 1e4, weights[4] * np.float32(1e-20)
    params, codes = made.quantize(weights, importance)
    values = made.decode(codes, params)
    assert np.isfinite(values).all() and (values[0] == 0).all() and (params["scale"] >= 0).all()
    np.testing.assert_allclose(values[1], 0.5, rtol=4e-3)
    np.testing.assert_allclose(values[3, 7], 1e4, rtol=1e-2)
    assert np.sum((values[4] - weights[4]) ** 2, dtype=np.float64) < 0.02 * np.sum(weights[4].astype(np.float64) ** 2)
