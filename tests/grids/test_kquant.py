"""K-quants against ggml: its bytes decoded bit for bit, its encoder's error beaten on its own objective."""

import subprocess
import sys

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.grids.kquant import KQuant, make
from support.ggml import stock_decode, stock_encode

NAMES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
Array = npt.NDArray[np.float32]
Unpacked = tuple[dict[str, npt.NDArray[np.generic]], npt.NDArray[np.uint8]]
ROWS, COLUMNS = 24, 1024


@pytest.fixture(params=NAMES)
def grid(request: pytest.FixtureRequest) -> KQuant:
    return make(request.param)


def tensors() -> dict[str, Array]:
    """Weights like those of real models, and some unlike them."""
    generator = np.random.default_rng(7)
    gaussian = generator.standard_normal((ROWS, COLUMNS)) * 0.02
    columns = gaussian.copy()
    columns[:, generator.choice(COLUMNS, 8, replace=False)] *= 15
    shifted = gaussian + 0.03
    made = {
        "gaussian": gaussian,
        "student": generator.standard_t(3, (ROWS, COLUMNS)) * 0.02,
        "outlier columns": columns,
        "shifted": shifted,
        "negative": -np.abs(gaussian) - 0.01,
        "uniform": generator.uniform(-1, 1, (ROWS, COLUMNS)),
        "rows of all sizes": gaussian * 10.0 ** generator.uniform(-2, 3, (ROWS, 1)),
        "sparse": gaussian * (generator.random((ROWS, COLUMNS)) < 0.1),
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


def importance_of(columns: int = COLUMNS) -> Array:
    return np.exp(np.random.default_rng(11).standard_normal(columns) * 1.2).astype(np.float32)


def objective(name: str, weights: Array, importance: Array | None) -> npt.NDArray[np.float64]:
    """ggml's weight of each error, written down from quantize_row_*_ref (plain) and *_impl (with importance)."""
    x = weights.astype(np.float64)
    supers = np.repeat((x.reshape(len(x), -1, 256) ** 2).mean(axis=2), 256, axis=1)
    subs = np.repeat((x.reshape(len(x), -1, 32) ** 2).mean(axis=2), 32, axis=1)
    if importance is None:
        plain = {"q2_k": np.abs(x), "q3_k": x * x, "q6_k": x * x}
        return plain.get(name, np.sqrt(subs) + np.abs(x))
    if name == "q6_k":
        return np.broadcast_to(importance, x.shape).astype(np.float64)
    return importance * np.sqrt((1 if name == "q2_k" else 2) * supers + x * x)


def loss(weights: npt.NDArray[np.float64], x: Array, decoded: Array) -> float:
    return float((weights * (x.astype(np.float64) - decoded) ** 2).sum())


def bits_of(field: npt.NDArray[np.uint8], width: int, planes: int, run: int) -> npt.NDArray[np.uint8]:
    """Fields of `width` bits: each run of bytes holds `planes` consecutive runs of codes, lowest bits first."""
    shifts = (np.arange(planes, dtype=np.uint8) * width).reshape(1, 1, -1, 1)
    return ((field.reshape(len(field), -1, 1, run) >> shifts) & (2**width - 1)).reshape(len(field), -1)


def unpack(name: str, raw: npt.NDArray[np.uint8]) -> Unpacked:
    """ggml's block structs (ggml-common.h) taken apart into our parameters and codes."""
    rows, size = len(raw), gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]][1]
    b = raw.reshape(-1, size)

    def f16(start: int) -> npt.NDArray[np.generic]:
        return np.ascontiguousarray(b[:, start : start + 2]).view(np.float16).reshape(rows, -1)

    params: dict[str, npt.NDArray[np.generic]]
    if name == "q2_k":
        params = {"d": f16(80), "dmin": f16(82), "scale": b[:, :16] & 15, "minimum": b[:, :16] >> 4}
        codes = bits_of(b[:, 16:80], 2, 4, 32)
    elif name == "q3_k":
        low, high = bits_of(b[:, 96:104], 4, 2, 8), bits_of(b[:, 104:108], 2, 4, 4)
        params = {"d": f16(108), "scale": (low | high << 4).astype(np.int8) - np.int8(32)}
        codes = bits_of(b[:, 32:96], 2, 4, 32) | bits_of(b[:, :32], 1, 8, 32) << 2
    elif name == "q6_k":
        params = {"d": f16(208), "scale": b[:, 192:208].view(np.int8)}
        codes = bits_of(b[:, :128], 4, 2, 64) | bits_of(b[:, 128:192], 2, 4, 32) << 4
    else:
        s = b[:, 4:16]
        scale = np.concatenate([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], axis=1)
        minimum = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], axis=1)
        params = {"d": f16(0), "dmin": f16(2), "scale": scale, "minimum": minimum}
        codes = bits_of(b[:, 16:] if name == "q4_k" else b[:, 48:], 4, 2, 32)
        if name == "q5_k":
            codes = codes | bits_of(b[:, 16:48], 1, 8, 32) << 4
    return {key: value.reshape(rows, -1) for key, value in params.items()}, codes.reshape(rows, -1)


def test_decode_is_ggufs_reader_bit_for_bit(grid: KQuant) -> None:
    weights = tensors()["student"]
    generator = np.random.default_rng(3)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[grid.name.upper()]][1]
    noise = generator.integers(0, 256, (ROWS, 4 * size), dtype=np.uint8)  # every field takes every value
    half_at = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}.get(grid.name, (0, 2))
    for start in half_at:  # exponents of d below infinity
        noise.reshape(-1, size)[:, start + 1] &= 0xBB
    for raw in (stock_encode(grid.name.upper(), weights), noise):
        params, codes = unpack(grid.name, raw)
        expected = stock_decode(grid.name.upper(), raw)
        assert np.array_equal(grid.decode(codes, params).view(np.uint32), expected.view(np.uint32))
        part = grid.decode(codes[:, 300:777], params, slice(300, 777))
        assert np.array_equal(part.view(np.uint32), expected[:, 300:777].view(np.uint32))


def test_bits_are_those_of_ggmls_blocks(grid: KQuant) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[grid.name.upper()]]
    assert grid.bits((3, 5 * block)) == 3 * 5 * size * 8
    assert grid.refuses((3, 300)) is not None
    with pytest.raises(UnsupportedError, match="256"):
        grid.quantize(np.zeros((1, 300), dtype=np.float32))


@pytest.mark.parametrize("steered", [False, True])
def test_weighting_is_ggmls(grid: KQuant, steered: bool) -> None:
    weights, importance = tensors()["student"], importance_of() if steered else None
    np.testing.assert_allclose(
        grid.weighting(weights, importance), objective(grid.name, weights, importance), rtol=1e-5
    )


@pytest.mark.parametrize("steered", [False, True])
def test_error_is_below_ggmls_on_every_tensor(grid: KQuant, steered: bool) -> None:
    importance = importance_of() if steered else None
    for label, weights in tensors().items():
        by = objective(grid.name, weights, importance)
        stock = stock_decode(grid.name.upper(), stock_encode(grid.name.upper(), weights, importance))
        params, codes = grid.quantize(weights, importance)
        ours = grid.decode(codes, params)
        assert loss(by, weights, ours) <= 1.0005 * loss(by, weights, stock), label
        if grid.name == "q2_k" and not steered:  # ggml searches on absolute errors here
            assert (by * np.abs(weights - ours)).sum() <= 1.0005 * (by * np.abs(weights - stock)).sum(), label


@pytest.mark.parametrize("steered", [False, True])
def test_kernel_is_the_reference(grid: KQuant, steered: bool) -> None:
    importance = importance_of() if steered else None
    equal: list[float] = []
    for label, weights in tensors().items():
        ties = label in ("sparse", "outlier columns")  # or sums dominated by one weight: noise decides more often
        params, codes = grid.quantize(weights, importance)
        expected_params, expected_codes = grid.quantize_reference(weights, importance)
        by = grid.weighting(weights, importance).astype(np.float64)
        expected = loss(by, weights, grid.decode(expected_codes, expected_params))
        assert loss(by, weights, grid.decode(codes, params)) == pytest.approx(expected, rel=0.05 if ties else 5e-3), (
            label
        )
        same = [params[key] == expected_params[key] for key in params] + [codes == expected_codes]
        if not ties:
            equal += [block.reshape(-1, block.size * 256 // weights.size).all(axis=1).mean() for block in same]
    assert np.mean(equal) > 0.9


def test_rows_are_independent_and_runs_repeat(grid: KQuant) -> None:
    weights, importance = tensors()["student"], importance_of()
    params, codes = grid.quantize(weights, importance)
    for start, stop in ((0, ROWS), (0, 1), (5, 22), (23, 24), (4, 4)):
        some_params, some_codes = grid.quantize(weights[start:stop], importance)
        assert np.array_equal(some_codes, codes[start:stop])
        assert all(np.array_equal(some_params[key], params[key][start:stop]) for key in params)
    fitted = grid.fit(weights, importance)
    assert all(np.array_equal(fitted[key], params[key]) for key in params)


def test_encode_finds_the_nearest_value(grid: KQuant) -> None:
    weights = tensors()["student"]
    params, codes = grid.quantize(weights)
    assert np.array_equal(grid.encode(grid.decode(codes, params), params), codes)
    moved = weights + np.random.default_rng(5).standard_normal(weights.shape).astype(np.float32) * 0.01
    every = np.stack([grid.decode(np.full_like(codes, code), params) for code in range(2**grid.code_bits)])
    best = np.abs(every - moved).min(axis=0)
    assert np.allclose(np.abs(grid.decode(grid.encode(moved, params), params) - moved), best, rtol=1e-4, atol=1e-9)
    whole = grid.encode(moved, params)
    for columns in (slice(0, 1), slice(250, 262), slice(1023, 1024), slice(512, 1024)):
        assert np.array_equal(grid.encode(moved[:, columns], params, columns), whole[:, columns])


def odd_rows() -> dict[str, Array]:
    gaussian = np.random.default_rng(2).standard_normal((16, 512)).astype(np.float32)
    outlier = gaussian * np.float32(0.01)
    outlier[:, 77] = 5000
    zero_block = gaussian.copy()
    zero_block[:, 256:] = 0
    zero_row = gaussian.copy()
    zero_row[3] = 0
    return {
        "zero": np.zeros((1, 512), dtype=np.float32),
        "zero block": zero_block,
        "zero row": zero_row,
        "one": np.ones((1, 512), dtype=np.float32),
        "minus one": -np.ones((1, 512), dtype=np.float32),
        "denormal": gaussian * np.float32(1e-41),
        "below float16": gaussian * np.float32(1e-9),
        "near the smallest float16": gaussian * np.float32(3e-6),
        "outlier": outlier,
    }


@pytest.mark.parametrize("steered", [False, True])
def test_odd_rows_are_no_worse_than_ggmls(grid: KQuant, steered: bool) -> None:
    importance = importance_of(512) if steered else None
    for label, weights in odd_rows().items():
        params, codes = grid.quantize(weights, importance)
        decoded = grid.decode(codes, params)
        assert np.isfinite(decoded).all(), label
        stock = stock_decode(grid.name.upper(), stock_encode(grid.name.upper(), weights, importance))
        by = objective(grid.name, weights, importance)
        rounding = 2.0**-20 * loss(by, weights, np.zeros_like(weights))  # that of d, a float16, alone
        assert loss(by, weights, decoded) <= max(1.0005 * loss(by, weights, stock), rounding), label
        if not weights.any():
            assert not decoded.any()


def test_small_weights_keep_a_step(grid: KQuant) -> None:
    """d below the smallest float16 is not rounded to 0, which would lose the whole super-block."""
    weights = odd_rows()["near the smallest float16"]
    params, codes = grid.quantize(weights)
    error = grid.decode(codes, params) - weights
    assert np.square(error).mean() < 0.1 * np.square(weights).mean()


def test_weights_beyond_float16_saturate(grid: KQuant) -> None:
    weights = np.random.default_rng(2).standard_normal((1, 256)).astype(np.float32)
    weights[0, :2] = 3e38, -3e38
    params, codes = grid.quantize(weights)
    decoded = grid.decode(codes, params)
    assert np.isfinite(decoded).all()
    reach = 65504.0 * grid.layout.highest * grid.layout.most
    if grid.layout.symmetric:
        assert decoded[0, 0] > 0.5 * reach
        assert decoded[0, 1] < -0.5 * reach
    else:
        assert decoded[0, 0] > 0.5 * reach
        assert decoded[0, 1] <= decoded.min()


def test_channels_without_importance_are_still_rounded_well(grid: KQuant) -> None:
    weights, importance = tensors()["gaussian"], importance_of()
    importance[:256] = 0  # a whole super-block
    importance[256:320] = 0  # whole sub-blocks
    importance[640::2] = 0
    params, codes = grid.quantize(weights, importance)
    error = grid.decode(codes, params) - weights
    plain_params, plain_codes = grid.quantize(weights)
    plain = grid.decode(plain_codes, plain_params) - weights
    assert np.square(error[:, :320]).mean() < 1.5 * np.square(plain[:, :320]).mean()
    everywhere = grid.quantize(weights, np.zeros_like(importance))
    assert np.square(grid.decode(everywhere[1], everywhere[0]) - weights).mean() < 1.5 * np.square(plain).mean()


def test_impossible_importance_is_refused(grid: KQuant) -> None:
    weights = tensors()["gaussian"]
    with pytest.raises(BadInputError, match="shape"):
        grid.quantize(weights, importance_of(512))
    with pytest.raises(BadInputError, match="negative"):
        grid.quantize(weights, -importance_of())
    with pytest.raises(BadInputError, match="non-finite"):
        grid.quantize(weights, np.full(COLUMNS, np.nan, dtype=np.float32))


def test_reading_facts_loads_no_compiler() -> None:
    code = "import sys; from anyquant.grids import grid; grid('q4_k').bits((1, 256)); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
