"""MX and NVFP4 against gguf's reader, compressed-tensors and torch, and against trying every scale."""

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid, Params
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid
from anyquant.grids.minifloat import E2M1, E2M3, E3M2, E4M3, levels_of, values_of

NAMES = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"]
Bytes = npt.NDArray[np.uint8]


def weights_of(kind: str = "normal", rows: int = 12, columns: int = 256) -> Float32:
    random = np.random.default_rng(3)
    shape = (rows, columns)
    values = random.standard_normal(shape) if kind == "normal" else random.standard_t(2, shape)
    return (values * 0.02 * random.lognormal(0, 1, (rows, 1))).astype(np.float32)


def importance_of(sigma: float = 1.0, columns: int = 256) -> Float32:
    return np.random.default_rng(4).lognormal(0, sigma, columns).astype(np.float32)


def group_errors(made: Grid, weights: Float32, params: Params, importance: Float32) -> npt.NDArray[np.float64]:
    """Weighted squared error of every group, from decoded values."""
    values = made.decode(made.encode(weights, params), params).astype(np.float64)
    lost = importance * (values - weights) ** 2
    total: npt.NDArray[np.float64] = lost.reshape(len(weights), -1, made.block[1]).sum(axis=2)
    return total


def halves(codes: Bytes, half: int) -> Bytes:
    """ggml's nibbles: the low ones are the first half of each block."""
    blocks = codes.reshape(-1, 2, half)
    return (blocks[:, 0] | blocks[:, 1] << 4).astype(np.uint8)


def test_the_six_bit_and_four_bit_values_are_those_of_the_specification() -> None:
    np.testing.assert_array_equal(values_of(E2M1)[:8], [0, 0.5, 1, 1.5, 2, 3, 4, 6])
    np.testing.assert_array_equal(values_of(E2M3)[[1, 7, 8, 31, 63]], [0.125, 0.875, 1.0, 7.5, -7.5])
    np.testing.assert_array_equal(values_of(E3M2)[[1, 3, 4, 31, 63]], [0.0625, 0.1875, 0.25, 28.0, -28.0])


@pytest.mark.parametrize("name", [*NAMES, "nvfp4-bare"])
def test_the_nearest_value_is_chosen(name: str) -> None:
    """Ties to the even pattern; beyond the largest value: the largest."""
    made = grid(name)
    levels, codes = levels_of(made.kind)  # type: ignore[attr-defined]
    middles = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    x = np.concatenate([middles, levels, levels * 1.01, np.random.default_rng(0).uniform(-9, 9, 3000)])
    x = np.pad(x, (0, -len(x) % 32)).astype(np.float32)
    params: Params = {"scale": np.full((1, len(x) // made.block[1]), 127, dtype=np.uint8)}
    if name.startswith("nvfp4"):
        params = {"scale": params["scale"] * 0 + 0x38, "global_scale": np.ones((1, 1), dtype=np.float32)}
    distance = np.abs(x[:, None] - levels)
    nearest = distance == distance.min(axis=1, keepdims=True)
    ties = nearest.sum(axis=1) == 2
    chosen = made.decode(made.encode(x[None], params), params)[0]
    np.testing.assert_array_equal(chosen[~ties], levels[nearest.argmax(axis=1)][~ties])
    even = nearest & (codes % 2 == 0)
    np.testing.assert_array_equal(chosen[ties], levels[even.argmax(axis=1)][ties])


def test_mxfp4_decodes_as_ggufs_reader_for_every_exponent() -> None:
    random = np.random.default_rng(0)
    scale = np.arange(255, dtype=np.uint8).reshape(-1, 3)
    codes = random.integers(0, 16, (85, 96), dtype=np.uint8)
    blocks = np.concatenate([scale.reshape(-1, 1), halves(codes, 16)], axis=1).reshape(85, -1)
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
        ours = grid("mxfp4").decode(codes, {"scale": scale})
    np.testing.assert_array_equal(ours, expected)


def test_nvfp4_decodes_as_ggufs_reader_and_as_compressed_tensors() -> None:
    made, weights = grid("nvfp4"), weights_of()
    params, codes = made.quantize(weights, importance_of())
    divisor = params["global_scale"]
    assert np.frexp(divisor)[0] == 0.5  # a power of two: 1 / divisor is exact
    nibbles = halves(codes, 8).reshape(12, -1, 32)
    blocks = np.concatenate([params["scale"].reshape(12, -1, 4), nibbles], axis=2).reshape(12, -1)
    ggufs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.NVFP4) * (np.float32(1) / divisor)
    values = QTensor(made, (12, 256), codes, params).decode()
    np.testing.assert_array_equal(values, ggufs)
    arguments = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scale = torch.from_numpy(params["scale"].copy()).view(torch.float8_e4m3fn).float()
    unpacked = torch.from_numpy(values_of(E2M1)[codes])
    theirs = dequantize(unpacked, scale, args=arguments, global_scale=torch.from_numpy(divisor.reshape(1)))
    np.testing.assert_array_equal(values, theirs.float().numpy())
    assert pack_fp4_to_uint8(unpacked).shape == (12, 128)


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("name", [*NAMES, "nvfp4-bare"])
def test_no_group_is_worse_than_plain_and_all_are_near_the_best_scale(name: str, kind: str, important: bool) -> None:
    # without a global scale, of a size at which scales are normal numbers
    made, weights = grid(name), weights_of(kind) * np.float32(16 if name == "nvfp4-bare" else 1)
    importance = importance_of() if important else np.ones(256, dtype=np.float32)
    params, plain = made.fit(weights, importance if important else None), made.plain(weights)
    ours, theirs = (group_errors(made, weights, chosen, importance) for chosen in (params, plain))
    assert (ours <= theirs * (1 + 1e-5)).all()
    standard = plain if name.startswith("nvfp4") else {"scale": ocp_exponents(made, weights)}
    assert ours.sum() < group_errors(made, weights, standard, importance).sum() * 0.995
    best = np.full(ours.shape, np.inf)
    for scale in range(127 if name.startswith("nvfp4") else 255):
        tried = {**params, "scale": np.full_like(params["scale"], scale)}
        with np.errstate(over="ignore", invalid="ignore"):
            best = np.fmin(best, group_errors(made, weights, tried, importance))
    assert ours.sum() <= best.sum() * 1.0001 and (ours <= best * 1.05).all()


def ocp_exponents(made: Grid, weights: Float32) -> npt.NDArray[np.uint8]:
    """OCP MX 1.0, section 6.3."""
    largest = np.abs(weights).reshape(12, -1, 32).max(axis=2).astype(np.float64)
    exponent = np.floor(np.log2(largest)) - made.kind.top_exponent  # type: ignore[attr-defined]
    return (exponent + 127).astype(np.uint8)


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4), ("mxfp8_e4m3", 8)])
def test_plain_is_the_rule_of_compressed_tensors(name: str, bits: int) -> None:
    weights = weights_of("heavy")
    weights[0, 0] = 1.75 * 2.0**9  # exactly on the border
    largest = torch.from_numpy(np.abs(weights).reshape(12, -1, 32).max(axis=2))
    expected = generate_mx_scales(largest, bits).numpy()
    np.testing.assert_array_equal(grid(name).plain(weights)["scale"], expected)
    assert not grid(name).plain(np.zeros((2, 64), np.float32))["scale"].any()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_nvfp4_plain_is_compressed_tensors_rule_and_the_search_beats_its_own_global_scale(size: float) -> None:
    made, weights = grid("nvfp4"), weights_of() * np.float32(size)
    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    groups = torch.from_numpy(weights.reshape(12, -1, 16))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    ours = made.prepare(float(np.abs(weights).max()))
    scales, _ = calculate_qparams(low, high, arguments, torch.from_numpy(ours["global_scale"].reshape(1)))
    expected = scales.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(made.plain(weights, ours)["scale"], expected)
    divisor = generate_gparam(torch.from_numpy(weights).amin(), torch.from_numpy(weights).amax())
    scales, _ = calculate_qparams(low, high, arguments, divisor)
    theirs = {
        "scale": scales.to(torch.float8_e4m3fn).view(torch.uint8).numpy(),
        "global_scale": divisor.numpy().reshape(1, 1).astype(np.float32),
    }
    ones = np.ones(256, dtype=np.float32)
    searched = group_errors(made, weights, made.fit(weights, None, ours), ones).sum()
    assert searched < 0.85 * group_errors(made, weights, theirs, ones).sum()
    normal = made.fit(weights, None, ours)["scale"]
    assert (normal >= 8).all() and normal.max() <= 126  # no subnormal scale


@pytest.mark.parametrize("name", [*NAMES, "nvfp4-bare"])
def test_slices_of_rows_and_columns_are_slices_of_the_result(name: str) -> None:
    made, weights = grid(name), weights_of("heavy")
    shared = made.prepare(float(np.abs(weights).max()), (1.0,)) or None
    params, codes = made.quantize(weights, importance_of(), shared)
    some, part = made.quantize(weights[5:9], importance_of(), shared)
    np.testing.assert_array_equal(part, codes[5:9])
    np.testing.assert_array_equal(some["scale"], params["scale"][5:9])
    values = made.decode(codes, params)
    for columns in (slice(0, 256), slice(31, 70), slice(64, 65), slice(10, 250)):
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        np.testing.assert_array_equal(made.decode(codes[:, columns], params, columns), values[:, columns])
    lattice = made.lattice(params)
    assert lattice is not None
    unit = lattice.scale[:, np.arange(256) // lattice.width]
    place = np.abs(weights[..., None] - unit[..., None] * lattice.levels).argmin(axis=2)
    np.testing.assert_array_equal(np.abs(lattice.levels[place] * unit - weights), np.abs(values - weights))


@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_stay_finite(name: str) -> None:
    made, weights = grid(name), weights_of(columns=64)
    weights[0], weights[1], weights[2] = 0, 0.5, weights[2] * np.float32(1e-38)
    weights[3, :16] = 0
    huge = weights.copy()
    huge[4:, 5] = [3.4028235e38, -3.4028235e38, 3e38, 2.6e38, 2e38, 1e38, 1e37, 1e36]
    sparse = np.zeros(64, dtype=np.float32)
    sparse[40] = 1
    for matrix in (weights, huge, np.zeros_like(weights), weights * np.float32(1e-42)):
        for importance in (None, np.zeros(64, dtype=np.float32), np.full(64, 1e30, dtype=np.float32), sparse):
            params, codes = made.quantize(matrix, importance)
            values = made.decode(codes, params)
            assert np.isfinite(values).all() and (values[0] == 0).all()
            if matrix is weights:
                np.testing.assert_allclose(values[1], 0.5, rtol=0.04)
            if matrix is huge and importance is None:
                np.testing.assert_allclose(values[4:, 5], huge[4:, 5], rtol=0.26)


def test_one_scale_serves_tied_tensors() -> None:
    made = grid("nvfp4")
    assert made.tensor_wide and made.prepare(0.5, (2.0, 1.0)) == made.prepare(2.0)
    assert made.prepare(0.0)["global_scale"] == 1 and E4M3.highest == 448
    assert made.bits((4, 32)) == 4 * 32 * 4 + 4 * 2 * 8 + 32
