"""I-quants against ggml: its bytes decoded bit for bit, its encoder's error beaten on its own objective."""

import itertools

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.core.grid import Params
from anyquant.formats.gguf.layouts import layout
from anyquant.grids.iquant import IQuant, LatticeQuant, make
from anyquant.grids.iquant_search import codebook
from support.ggml import stock_decode, stock_encode

NAMES = ("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s")
LATTICES = NAMES[2:]
Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
ROWS, COLUMNS = 16, 512


@pytest.fixture(params=NAMES)
def grid(request: pytest.FixtureRequest) -> IQuant:
    return make(request.param)


def tensors() -> dict[str, Array]:
    """Weights like those of real models, and some unlike them."""
    generator = np.random.default_rng(7)
    gaussian = generator.standard_normal((ROWS, COLUMNS)) * 0.02
    columns = gaussian.copy()
    columns[:, generator.choice(COLUMNS, 8, replace=False)] *= 15
    made = {
        "gaussian": gaussian,
        "student": generator.standard_t(3, (ROWS, COLUMNS)) * 0.02,
        "outlier columns": columns,
        "shifted": gaussian + 0.03,
        "negative": -np.abs(gaussian) - 0.01,
        "uniform": generator.uniform(-1, 1, (ROWS, COLUMNS)),
        "rows of all sizes": gaussian * 10.0 ** generator.uniform(-2, 3, (ROWS, 1)),
        "sparse": gaussian * (generator.random((ROWS, COLUMNS)) < 0.1),
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


def importance_of(columns: int = COLUMNS) -> Array:
    return np.exp(np.random.default_rng(11).standard_normal(columns) * 1.2).astype(np.float32)


def objective(name: str, weights: Array, importance: Array | None) -> Float64:
    """ggml's weight of each error, written down from quantize_row_iq*_impl."""
    x = weights.astype(np.float64)
    block = 32 if name == "iq4_nl" else 256
    mean: Float64 = np.repeat((x.reshape(len(x), -1, block) ** 2).mean(axis=2), block, axis=1)
    if importance is None:
        return x * x + mean * (0.5 if name == "iq2_s" else 0.0)
    weighted: Float64 = importance.astype(np.float64) * np.sqrt(2 * mean + x * x)
    return weighted


def loss(by: Float64, weights: Array, decoded: Array) -> float:
    return float((by * (weights.astype(np.float64) - decoded) ** 2).sum())


def random_params(grid: IQuant, rows: int, columns: int) -> Params:
    """Parameters of which every stored bit is used, and d of either sign."""
    generator = np.random.default_rng(3)
    params = {"d": (generator.standard_normal((rows, columns // grid.block[1])) * 0.01).astype(np.float16)}
    if grid.name == "iq4_xs":
        params["scale"] = generator.integers(-32, 32, (rows, columns // 32)).astype(np.int8)
    elif isinstance(grid, LatticeQuant):
        width = grid.parameters[1].columns
        params["scale"] = generator.integers(0, 16, (rows, columns // width)).astype(np.uint8)
    return params


def test_decode_is_ggufs_reader_bit_for_bit(grid: IQuant) -> None:
    generator = np.random.default_rng(5)
    params, shape = random_params(grid, 64, COLUMNS), (64, COLUMNS // grid.vector)
    codes = generator.integers(0, 2**grid.code_bits, shape).astype(grid.code_dtype)
    expected = stock_decode(grid.name.upper(), layout(grid.name).pack(codes, params))
    assert np.array_equal(grid.decode(codes, params).view(np.uint32), expected.view(np.uint32))
    for start, stop in ((0, 8), (264, 488)):
        part = codes[:, start // grid.vector : stop // grid.vector]
        decoded = grid.decode(part, params, slice(start, stop))
        assert np.array_equal(decoded.view(np.uint32), expected[:, start:stop].view(np.uint32))


def test_bits_are_those_of_ggmls_blocks(grid: IQuant) -> None:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[grid.name.upper()]]
    assert grid.bits((3, 5 * block)) == 3 * 5 * size * 8
    with pytest.raises(UnsupportedError, match="multiple"):
        grid.quantize(np.zeros((1, 300), dtype=np.float32))


@pytest.mark.parametrize("steered", [False, True])
def test_weighting_is_ggmls(grid: IQuant, steered: bool) -> None:
    weights, importance = tensors()["student"], importance_of() if steered else None
    expected = objective(grid.name, weights, importance)
    np.testing.assert_allclose(grid.weighting(weights, importance), expected, rtol=1e-5)


@pytest.mark.parametrize("steered", [False, True])
def test_error_is_below_ggmls_on_every_tensor(grid: IQuant, steered: bool) -> None:
    importance = importance_of() if steered else None
    for label, weights in tensors().items():
        by = objective(grid.name, weights, importance)
        stock = stock_decode(grid.name.upper(), stock_encode(grid.name.upper(), weights, importance))
        params, codes = grid.quantize(weights, importance)
        assert loss(by, weights, grid.decode(codes, params)) <= 1.0005 * loss(by, weights, stock), label


@pytest.mark.parametrize("steered", [False, True])
def test_kernel_is_the_reference(grid: IQuant, steered: bool) -> None:
    """The reference compares every entry of a codebook: this also says what looking at few of them costs."""
    importance = importance_of() if steered else None
    # far from uniform importance, the nearest entry is not always one of the candidates
    few = steered and isinstance(grid, LatticeQuant)
    same = []
    for label, weights in tensors().items():
        weights = weights[:4]
        params, codes = grid.quantize(weights, importance)
        expected_params, expected_codes = grid.quantize_reference(weights, importance)
        by = grid.weighting(weights, importance).astype(np.float64)
        expected = loss(by, weights, grid.decode(expected_codes, expected_params))
        assert loss(by, weights, grid.decode(codes, params)) == pytest.approx(expected, rel=0.02 if few else 5e-3), (
            label
        )
        same.append((codes == expected_codes).mean())
    assert np.mean(same) > (0.92 if few else 0.99)


def test_rows_are_independent_and_runs_repeat(grid: IQuant) -> None:
    weights, importance = tensors()["student"], importance_of()
    params, codes = grid.quantize(weights, importance)
    for start, stop in ((0, ROWS), (0, 1), (5, 14), (4, 4)):
        some_params, some_codes = grid.quantize(weights[start:stop], importance)
        assert np.array_equal(some_codes, codes[start:stop])
        assert all(np.array_equal(some_params[key], params[key][start:stop]) for key in params)
    fitted = grid.fit(weights, importance)
    assert all(np.array_equal(fitted[key], params[key]) for key in params)


def best_distance(grid: IQuant, weights: Array, scales: Float64) -> Float64:
    """Squared distance of each vector to the nearest value, every code tried: `scales` (rows, vectors)."""
    if not isinstance(grid, LatticeQuant):
        values = scales[:, :, None] * np.array(gguf.quants.IQ4_NL.kvalues)
        closest: Float64 = ((weights[:, :, None] - values) ** 2).min(axis=2)
        return closest
    x = weights.astype(np.float64).reshape(len(weights), -1, grid.vector)
    book = codebook(grid.name).astype(np.float64)
    dims = book.shape[1]
    best = np.full(x.shape[:2], np.inf)
    # magnitudes are positive: a vector whose signs are free takes those of the weights
    even = [signs for signs in itertools.product((1, -1), repeat=8) if np.prod(signs) > 0]
    for signs in even if grid.name == "iq3_xxs" else [np.where(x < 0, -1, 1)]:
        total = np.zeros(x.shape[:2])
        for first in range(0, grid.vector, dims):
            target = (x * np.array(signs))[:, :, first : first + dims]
            square = (scales**2)[:, :, None] * (book * book).sum(axis=1)
            cross = -2 * scales[:, :, None] * (target @ book.T)
            total += (square + cross).min(axis=2) + (target**2).sum(axis=2)
        best = np.minimum(best, total)
    return best


def test_encode_finds_the_nearest_value_of_all(grid: IQuant) -> None:
    weights = tensors()["student"][:3]
    params, codes = grid.quantize(weights)
    assert np.array_equal(grid.encode(grid.decode(codes, params), params), codes)
    moved = weights + np.random.default_rng(5).standard_normal(weights.shape).astype(np.float32) * np.float32(0.01)
    found = grid.encode(moved, params)
    ones = grid.decode(np.zeros_like(codes), params).astype(np.float64)  # code 0 is a known multiple of the scale
    first = codebook(grid.name)[0, 0] if isinstance(grid, LatticeQuant) else gguf.quants.IQ4_NL.kvalues[0]
    scales = ones[:, :: grid.vector] / first
    error = ((grid.decode(found, params).astype(np.float64) - moved) ** 2).reshape(len(moved), -1, grid.vector).sum(2)
    np.testing.assert_allclose(error, best_distance(grid, moved, scales), rtol=1e-4, atol=1e-9)
    for start, stop in ((0, 8), (248, 264), (504, 512), (8, 8)):
        some = grid.encode(moved[:, start:stop], params, slice(start, stop))
        assert np.array_equal(some, found[:, start // grid.vector : stop // grid.vector])


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs"])
def test_the_lattice_lists_what_codes_decode_to(name: str) -> None:
    grid = make(name)
    params = random_params(grid, 4, COLUMNS)
    lattice = grid.lattice(params)
    assert lattice is not None and not lattice.uniform and (np.diff(lattice.levels) > 0).all()
    for level, code in zip(lattice.levels, lattice.codes, strict=True):
        decoded = grid.decode(np.full((4, COLUMNS), code), params)
        np.testing.assert_allclose(decoded, np.repeat(lattice.scale * level, lattice.width, axis=1), rtol=1e-6)


@pytest.mark.parametrize("name", LATTICES)
def test_vectors_are_whole(name: str) -> None:
    grid = make(name)
    params = random_params(grid, 2, COLUMNS)
    assert grid.lattice(params) is None
    with pytest.raises(AnyQuantError, match="vectors of"):
        grid.encode(np.zeros((2, 9), dtype=np.float32), params, slice(1, 10))


def odd_rows() -> dict[str, Array]:
    gaussian = np.random.default_rng(2).standard_normal((4, 512)).astype(np.float32)
    outlier = gaussian * np.float32(0.01)
    outlier[:, 77] = 5000
    zeros = gaussian.copy()
    zeros[:2, 256:] = 0
    zeros[3] = 0
    return {
        "zero": np.zeros((1, 512), dtype=np.float32),
        "zero blocks": zeros,
        "one": np.ones((1, 512), dtype=np.float32),
        "minus one": -np.ones((1, 512), dtype=np.float32),
        "denormal": gaussian * np.float32(1e-41),
        "below float16": gaussian * np.float32(1e-9),
        "outlier": outlier,
    }


@pytest.mark.parametrize("steered", [False, True])
def test_odd_rows_are_no_worse_than_ggmls(grid: IQuant, steered: bool) -> None:
    importance = importance_of(512) if steered else None
    for label, weights in odd_rows().items():
        params, codes = grid.quantize(weights, importance)
        decoded = grid.decode(codes, params)
        stock = stock_decode(grid.name.upper(), stock_encode(grid.name.upper(), weights, importance))
        by = objective(grid.name, weights, importance)
        rounding = 2.0**-20 * loss(by, weights, np.zeros_like(weights))  # that of d, a float16, alone
        assert loss(by, weights, decoded) <= max(1.0005 * loss(by, weights, stock), rounding), label
        assert weights.any() or not decoded.any()


def test_small_weights_keep_a_step_and_large_ones_saturate(grid: IQuant) -> None:
    """d below the smallest float16 is not rounded to 0, which would lose a whole super-block, nor to infinity."""
    weights = np.random.default_rng(2).standard_normal((4, 512)).astype(np.float32)
    tiny = weights * np.float32(1e-5)
    params, codes = grid.quantize(tiny)
    assert np.square(grid.decode(codes, params) - tiny).mean() < 0.2 * np.square(tiny).mean()
    weights[0, :2] = 3e38, -3e38
    params, codes = grid.quantize(weights)
    decoded = grid.decode(codes, params)
    assert np.isfinite(decoded).all() and decoded[0, 0] > 1e5 and decoded[0, 1] < -1e5


def test_channels_without_importance_are_still_rounded_well(grid: IQuant) -> None:
    weights, importance = tensors()["gaussian"], importance_of()
    importance[:256] = 0  # a whole super-block
    importance[256:320] = 0  # whole sub-blocks
    importance[320::2] = 0
    params, codes = grid.quantize(weights, importance)
    error = grid.decode(codes, params) - weights
    plain_params, plain_codes = grid.quantize(weights)
    plain = grid.decode(plain_codes, plain_params) - weights
    assert np.square(error[:, :320]).mean() < 1.5 * np.square(plain[:, :320]).mean()


def test_impossible_importance_is_refused(grid: IQuant) -> None:
    weights = tensors()["gaussian"]
    with pytest.raises(BadInputError, match="shape"):
        grid.quantize(weights, importance_of(256))
    with pytest.raises(BadInputError, match="negative"):
        grid.quantize(weights, -importance_of())
    with pytest.raises(BadInputError, match="non-finite"):
        grid.quantize(weights, np.full(COLUMNS, np.nan, dtype=np.float32))
