"""MLX's affine groups: error against `mx.quantize`, search against a plain one, values against `mx.dequantize`."""

import functools

import numpy as np
import pytest

from anyquant import api
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.errors import UsageError
from anyquant.grids import affine, grid, scales
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint

mx = pytest.importorskip("mlx.core")
mx.set_default_device(mx.cpu)

NAMES = [f"affine{bits}-g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
SOME = ["affine2-g128", "affine3-g32", "affine4-g64", "affine5-g128", "affine6-g64", "affine8-g32"]


def weights_of(kind: str, rows: int = 12, columns: int = 768) -> Float32:
    random = np.random.default_rng(3)
    shape = (rows, columns)
    made = {
        "normal": random.standard_normal(shape) * 0.02,
        "heavy": random.standard_t(3, shape) * 0.02,
        "shifted": random.random(shape) * 0.1 + 0.03,
    }
    return made[kind].astype(np.float32)


def importance_of(columns: int, seed: int = 4) -> Float32:
    return np.random.default_rng(seed).lognormal(0, 1, columns).astype(np.float32)


def error(weights: Float32, values: Float32, importance: Float32 | None) -> float:
    steering = 1.0 if importance is None else importance.astype(np.float64)
    return float(np.sum(steering * (values.astype(np.float64) - weights) ** 2))


def stock(weights: Float32, bits: int, group: int, dtype: object) -> Float32:
    """What `mx.quantize` makes of them, its parameters in `dtype`, its values in float32."""
    packed, scale, bias = mx.quantize(mx.array(weights).astype(dtype), group_size=group, bits=bits)
    wide = scale.astype(mx.float32), bias.astype(mx.float32)
    return np.array(mx.dequantize(packed, *wide, group_size=group, bits=bits))


def facts(name: str) -> tuple[int, int]:
    return int(name[6]), int(name.split("g")[1])


@functools.cache
def demo_matrices() -> dict[str, Float32]:
    checkpoint = open_checkpoint(api.model_path("demo"))
    linears = detect(checkpoint).linears
    return {linear.name: read_view(checkpoint, linear.view, 0, min(48, linear.view.rows)) for linear in linears}


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_of_the_demo_is_worse_than_mlxs_own(name: str) -> None:
    """Even its float32 parameters lose more than the search with 16 bits, of which float16 and bfloat16 share eight."""
    bits, group = facts(name)
    made = grid(name)
    for number, (label, weights) in enumerate(demo_matrices().items()):
        for importance in (None, importance_of(weights.shape[1], number)):
            params, codes = made.quantize(weights, importance)
            mine = error(weights, made.decode(codes, params), importance)
            for dtype in (mx.bfloat16, mx.float16, mx.float32):
                assert mine < 0.95 * error(weights, stock(weights, bits, group, dtype), importance), label


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize("name", SOME)
def test_compiled_search_equals_the_plain_one(name: str, kind: str, important: bool) -> None:
    made, weights = grid(name), weights_of(kind)
    assert isinstance(made, affine.AffineGrid)
    importance = importance_of(768) if important else None
    fast = made.fit(weights, importance)
    trials = made.trials(important)
    scale, bias = scales.slow_pairs(weights, importance, made.levels, trials, made.changes())
    # of many levels some candidates differ by less than float32 sums tell
    assert np.mean(fast["scale"] == scale) > (0.5 if made.code_bits > 5 else 0.8)
    slow = {"scale": scale, "bias": bias}
    lost = [error(weights, made.decode(made.encode(weights, one), one), importance) for one in (fast, slow)]
    assert lost[0] <= lost[1] * (1.02 if made.code_bits > 5 else 1.002)


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize("name", SOME)
def test_no_group_is_worse_than_from_minimum_to_maximum(name: str, kind: str, important: bool) -> None:
    made, weights = grid(name), weights_of(kind)
    bits, group = facts(name)
    importance = importance_of(768) if important else None
    groups = weights.reshape(12, -1, group)
    scale, bias = (groups.max(axis=2) - groups.min(axis=2)) / np.float32(2**bits - 1), groups.min(axis=2)
    plain = {"scale": brain(scale), "bias": brain(bias)}
    found = made.fit(weights, importance)
    steering = np.ones(768) if importance is None else importance.astype(np.float64)

    def lost(params: dict[str, Float32]) -> Float32:
        squares = steering * (made.decode(made.encode(weights, params), params) - weights.astype(np.float64)) ** 2
        summed: Float32 = squares.reshape(12, -1, group).sum(axis=2)
        return summed

    assert (lost(dict(found)) <= lost(plain) * (1 + 1e-4)).all()


def brain(values: Float32) -> Float32:
    return bfloat16_to_float32(float32_to_bfloat16(values))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_mx_dequantize(name: str) -> None:
    """On parameters of MLX's own, negative scales included, and codes read from its words one by one."""
    bits, group = facts(name)
    weights = np.concatenate([weights_of("normal"), -weights_of("heavy"), weights_of("shifted")])
    packed, scale, bias = mx.quantize(mx.array(weights), group_size=group, bits=bits)
    assert np.array(scale).min() < 0
    stream = "".join(f"{word:032b}"[::-1] for word in np.array(packed)[0].tolist())
    first = [int(stream[at : at + bits][::-1], 2) for at in range(0, 768 * bits, bits)]
    made = grid(name)
    params = {"scale": np.array(scale), "bias": np.array(bias)}
    codes = made.encode(weights, params)
    theirs = np.array(mx.dequantize(packed, scale, bias, group_size=group, bits=bits))
    np.testing.assert_allclose(made.decode(codes, params), theirs, rtol=0, atol=float(np.abs(scale).max()) * 1.001)
    row = made.decode(np.array([first], dtype=np.uint8), {key: value[:1] for key, value in params.items()})
    np.testing.assert_allclose(row, theirs[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted"])
@pytest.mark.parametrize("name", SOME)
def test_parameters_are_exact_in_every_type_of_a_model(name: str, kind: str) -> None:
    made = grid(name)
    for size in (1.0, 1e-4, 1e-6):
        params, codes = made.quantize(weights_of(kind) * np.float32(size))
        for values in params.values():
            np.testing.assert_array_equal(values.astype(np.float16).astype(np.float32), values)
            np.testing.assert_array_equal(brain(values), values)
        assert (params["scale"] >= 0).all() and codes.max() <= 2**made.code_bits - 1
    assert made.bits((12, 768)) == 12 * 768 * made.code_bits + params["scale"].size * 32


def test_rows_are_independent_and_columns_encode_alike() -> None:
    made, weights = grid("affine4-g64"), weights_of("heavy", columns=192)
    importance = importance_of(192)
    params, codes = made.quantize(weights, importance)
    some, part = made.quantize(weights[4:5], importance)
    np.testing.assert_array_equal(part, codes[4:5])
    np.testing.assert_array_equal(some["bias"], params["bias"][4:5])
    for columns in (slice(0, 192), slice(63, 130), slice(9, 10)):
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        np.testing.assert_array_equal(
            made.decode(codes[:, columns], params, columns), made.decode(codes, params)[:, columns]
        )


@pytest.mark.parametrize("importance", [None, np.zeros(128, dtype=np.float32), np.full(128, 1e30, dtype=np.float32)])
@pytest.mark.parametrize("name", ["affine4-g128", "affine8-g32"])
def test_hard_rows_stay_finite(name: str, importance: Float32 | None) -> None:
    made = grid(name)
    weights = weights_of("normal", 6, 128)
    weights[0], weights[1], weights[2] = 0, 0.5, weights[2] * np.float32(1e-40)
    weights[3, 7], weights[4], weights[5] = 1e4, weights[4] * np.float32(1e-20), weights[5] * np.float32(1e30)
    params, codes = made.quantize(weights, importance)
    values = made.decode(codes, params)
    assert np.isfinite(values).all() and (values[0] == 0).all() and (values[2] == 0).all()
    np.testing.assert_allclose(values[1], 0.5, rtol=4e-3)
    np.testing.assert_allclose(values[3, 7], 1e4, rtol=1e-2)
    assert np.abs(values[5]).max() <= 65280 * 256


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(UsageError, match="affine4-g64"):
        affine.make("affine7-g64")
