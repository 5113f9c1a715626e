"""Zero-points, whole rows, whole matrices, plain parameters: against exhaustive search and compressed-tensors."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from anyquant.core.dtypes import Float32, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.errors import UnsupportedError
from anyquant.core.grid import Params
from anyquant.core.qtensor import QTensor
from anyquant.formats.compressed_tensors.layouts import layout
from anyquant.grids import grid

Float64 = npt.NDArray[np.float64]
KINDS = ["normal", "heavy", "positive", "shifted"]


def weights_of(kind: str, rows: int, columns: int) -> Float32:
    random = np.random.default_rng(11)
    drawn = {
        "normal": random.standard_normal((rows, columns)),
        "heavy": random.standard_t(3, (rows, columns)),
        "positive": random.random((rows, columns)) + 0.3,
        "shifted": random.standard_normal((rows, columns)) + 1.5,
    }[kind]
    return (drawn * 0.02).astype(np.float32)


def importance_of(columns: int) -> Float32:
    return np.random.default_rng(12).lognormal(0, 1.5, columns).astype(np.float32)


def brain(values: npt.NDArray[np.floating]) -> Float64:
    return bfloat16_to_float32(float32_to_bfloat16(values.astype(np.float32))).astype(np.float64)


def left(x: Float64, w: Float64, scale: Float64, zero: Float64 | int, bits: int) -> Float64:
    """Weighted squared error of each group (groups, n) under scale and zero-point (groups, 1), from the definition."""
    levels = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
    total: Float64 = (w * (x - scale * (levels - zero)) ** 2).sum(axis=1)
    return total


def ranges(x: Float64) -> tuple[Float64, Float64]:
    return np.minimum(x.min(axis=1, keepdims=True), 0), np.maximum(x.max(axis=1, keepdims=True), 0)


def groups_of(weights: Float32, importance: Float32 | None, group: int) -> tuple[Float64, Float64]:
    wide = np.ones(weights.shape[1]) if importance is None else importance.astype(np.float64)
    x = weights.astype(np.float64).reshape(-1, group)
    return x, np.broadcast_to(wide, weights.shape).reshape(-1, group)


def errors_of(weights: Float32, importance: Float32 | None, params: Params, bits: int, group: int) -> Float64:
    x, w = groups_of(weights, importance, group)
    scale = params["scale"].astype(np.float64).reshape(-1, 1)
    zero = (
        params["zero"].astype(np.float64).reshape(-1, 1) if "zero" in params else np.full_like(scale, 2 ** (bits - 1))
    )
    return left(x, w, scale, zero, bits)


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_come_near_the_best_of_all(bits: int, important: bool) -> None:
    """The optimum by trying every zero-point with every bfloat16 scale that could matter."""
    found, best = [], []
    importance = importance_of(256) if important else None
    for kind in KINDS:
        weights = weights_of(kind, 6, 256)
        params = grid(f"int{bits}-g32-asym").fit(weights, importance)
        x, w = groups_of(weights, importance, 32)
        low, high = ranges(x)
        least = np.full(len(x), np.inf)
        for ratio, zero in itertools.product(np.geomspace(0.25, 2.2, 400), range(2**bits)):
            least = np.minimum(least, left(x, w, brain((high - low) * ratio / (2**bits - 1)), zero, bits))
        best.append(least / least.mean())
        found.append(errors_of(weights, importance, params, bits, 32) / least.mean())
    # each kind counts alike
    assert np.mean(found) <= 1.01 * np.mean(best)


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["int2-g16-asym", "int4-g128-asym", "int8-g64-asym", "int4-channel-asym", "int8-channel"]
)
def test_no_group_is_worse_than_minimum_to_maximum(name: str, kind: str, important: bool) -> None:
    made, bits = grid(name), int(name[3])
    weights = weights_of(kind, 6, 640)
    group = made.block[1] if "-g" in name else 640
    importance = importance_of(640) if important else None
    params, codes = made.quantize(weights, importance)
    x, w = groups_of(weights, importance, group)
    low, high = ranges(x)
    if "asym" in name:
        scale = brain((high - low) / (2**bits - 1))
        plain = left(x, w, scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1), bits)
    else:
        plain = left(x, w, brain(np.maximum(high, -low) / (2 ** (bits - 1) - 1)), 2 ** (bits - 1), bits)
    ours = errors_of(weights, importance, params, bits, group)
    assert (ours <= plain * (1 + 1e-4)).all()
    assert bits == 8 or ours.sum() < plain.sum() * 0.95
    QTensor(made, weights.shape, codes, params)
    exact = made.weighting(weights, importance) * (made.decode(codes, params).astype(np.float64) - weights) ** 2
    assert exact.sum() == pytest.approx(ours.sum(), rel=1e-4)
    assert (params["scale"].view(np.uint32) & 0xFFFF == 0).all() and (params["scale"] > 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("reach", ["channel", "tensor"])
def test_wide_scales_come_near_the_best_of_all(reach: str, bits: int) -> None:
    """The optimum by trying every bfloat16 scale; a width that is no multiple of anything, some weights far out."""
    weights, importance = weights_of("heavy", 5, 777), importance_of(777)
    weights[:, 13] *= 8
    group = 777 if reach == "channel" else weights.size
    for steering in (None, importance):
        params = grid(f"int{bits}-{reach}").fit(weights, steering)
        x, w = groups_of(weights, steering, 777)
        x, w = x.reshape(-1, group), w.reshape(-1, group)
        best = np.full(len(x), np.inf)
        for ratio in np.geomspace(0.03, 1.5, 1500):
            scale = brain(np.abs(x).max(axis=1, keepdims=True) * ratio / 2 ** (bits - 1))
            best = np.minimum(best, left(x, w, scale, 2 ** (bits - 1), bits))
        found = left(x, w, params["scale"].astype(np.float64), 2 ** (bits - 1), bits)
        assert found.sum() <= 1.01 * best.sum()


@pytest.mark.parametrize("name", ["int4-g32-asym", "int4-channel", "int8-channel-asym"])
def test_rows_are_independent(name: str) -> None:
    made, weights, importance = grid(name), weights_of("heavy", 7, 96), importance_of(96)
    params, codes = made.quantize(weights, importance)
    some, part = made.quantize(weights[3:5], importance)
    np.testing.assert_array_equal(part, codes[3:5])
    for parameter in made.parameters:
        np.testing.assert_array_equal(some[parameter.name], params[parameter.name][3:5])


@pytest.mark.parametrize("importance", [None, np.zeros(64, dtype=np.float32), np.full(64, 1e30, dtype=np.float32)])
@pytest.mark.parametrize("reach", ["g64", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hard_rows_with_zero_points(bits: int, reach: str, importance: Float32 | None) -> None:
    made = grid(f"int{bits}-{reach}-asym")
    constants = np.array([0.0, 0.7, -0.3, 1e4, 1e-20, -1e-42, 3e38], dtype=np.float32)
    weights = np.repeat(constants[:, None], 64, axis=1)
    params, codes = made.quantize(weights, importance)
    values = made.decode(codes, params)
    assert np.isfinite(values).all() and (params["scale"] > 0).all() and (values[0] == 0).all()
    np.testing.assert_allclose(values[1:5], weights[1:5], rtol=4e-3)
    assert np.abs(values[5]).max() <= 1e-30


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tensor_scale_covers_the_tie_group(bits: int) -> None:
    weights = weights_of("normal", 4, 100)
    largest = float(np.abs(weights).max())
    for asymmetric in ("", "-asym"):
        made = grid(f"int{bits}-tensor{asymmetric}")
        shared = made.prepare(largest, (largest / 2, largest * 3))
        params, codes = made.quantize(weights, None, shared)
        QTensor(made, weights.shape, codes, params)
        for name in shared:
            np.testing.assert_array_equal(params[name], shared[name])
        scale = float(shared["scale"][0, 0])
        assert largest * 3 <= scale * (2 ** (bits - 1) - 1) <= largest * 3 * 1.01
        assert np.abs(made.decode(codes, params) - weights).max() <= scale * 0.5001
        assert made.prepare(0.0)["scale"] > 0
    assert grid("int4-g32").prepare(1.0) == {} and grid("int4-channel-asym").prepare(1.0) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_plain_rounding_of_tokens_is_compressed_tensors_own(bits: int, kind: str) -> None:
    weights = weights_of(kind, 32, 200)
    weights[3] = 0
    arguments = QuantizationArgs(num_bits=bits, strategy=QuantizationStrategy.TOKEN, dynamic=True, symmetric=True)
    tokens = torch.from_numpy(weights)[None]
    scale, zero = compute_dynamic_scales_and_zp(tokens, arguments, torch.nn.Module())
    theirs = quantize(tokens, scale, zero, arguments)
    made = grid(f"int{bits}-channel")
    params = made.plain(weights)
    np.testing.assert_array_equal(params["scale"], scale[0].numpy())
    codes = made.encode(weights, params)
    np.testing.assert_array_equal(codes, theirs[0].numpy().astype(np.int8))
    values = dequantize(theirs, scale, zero, arguments)
    np.testing.assert_array_equal(made.decode(codes, params), values[0].numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_zero_points_are_compressed_tensors_own(kind: str) -> None:
    """The library counts levels from -128. Its codes may differ at ties: it adds the zero-point before it rounds."""
    weights = weights_of(kind, 32, 200)
    arguments = QuantizationArgs(num_bits=8, strategy=QuantizationStrategy.TOKEN, dynamic=True, symmetric=False)
    scale, zero = compute_dynamic_scales_and_zp(torch.from_numpy(weights)[None], arguments, torch.nn.Module())
    params = grid("int8-channel-asym").plain(weights)
    np.testing.assert_array_equal(params["scale"], scale[0].numpy())
    np.testing.assert_array_equal(params["zero"].astype(np.int32) - 128, zero[0].numpy().astype(np.int32))


def test_plain_reaches_as_far_as_the_grid_does() -> None:
    weights = np.array([[1.0, 2.0, -3.0, 0.5] * 8, [0.25] * 32], dtype=np.float32)
    assert grid("int8-tensor").plain(weights)["scale"].tolist() == [[np.float32(3 / 127.5)]]
    assert grid("int8-g32").plain(weights)["scale"].tolist() == [[np.float32(3 / 127.5)], [np.float32(0.25 / 127.5)]]
    found = grid("int4-g32-asym").plain(weights)
    assert found["scale"].tolist() == [[np.float32(5 / 15)], [np.float32(0.25 / 15)]]
    assert found["zero"].tolist() == [[9], [0]]


@pytest.mark.parametrize("name", ["int8-tensor", "int3-g128-asym", "int6-channel-asym"])
def test_what_the_packed_format_cannot_hold_it_refuses(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        layout(name)
