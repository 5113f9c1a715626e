"""ggml's simple blocks: error against ggml's encoder, search against a plain one and the optimum, hard input."""

import functools

import numpy as np
import numpy.typing as npt
import pytest

from anyquant import api
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.grids import grid, legacy, scales
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from support.ggml import stock_decode, stock_encode

NAMES = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
SEARCHED = NAMES[1:]


def matrices(columns: int = 512) -> dict[str, Float32]:
    random = np.random.default_rng(5)
    spread = random.lognormal(0, 1, columns)
    return {
        "normal": (random.standard_normal((24, columns)) * 0.02).astype(np.float32),
        "heavy": (random.standard_t(3, (24, columns)) * 0.02).astype(np.float32),
        "channels": (random.standard_normal((24, columns)) * spread * 0.02).astype(np.float32),
        "shifted": (random.random((24, columns)) * 0.1 + 0.03).astype(np.float32),
    }


def importance_of(columns: int) -> Float32:
    return np.random.default_rng(6).lognormal(0, 1.5, columns).astype(np.float32)


def error(weights: Float32, values: Float32, weighting: Float32) -> float:
    return float(np.sum(weighting.astype(np.float64) * (values.astype(np.float64) - weights) ** 2))


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_that_of_the_stock_encoder(name: str, important: bool) -> None:
    made = grid(name)
    ours = stock = 0.0
    for label, weights in matrices().items():
        importance = importance_of(weights.shape[1]) if important else None
        params, codes = made.quantize(weights, importance)
        weighting = np.ones_like(weights)
        if important and name != "q8_0":
            rows = np.mean(weights.astype(np.float64) ** 2, axis=1, keepdims=True)
            weighting = (importance * np.sqrt(rows + weights**2)).astype(np.float32)
            np.testing.assert_allclose(made.weighting(weights, importance), weighting, rtol=1e-6)
        mine = error(weights, made.decode(codes, params), weighting)
        theirs = error(weights, stock_decode(name.upper(), stock_encode(name.upper(), weights, importance)), weighting)
        assert mine <= 1.0005 * theirs, label
        ours, stock = ours + mine, stock + theirs
    # 4 and 5 bits: the stock encoder does not search without importance, and tries one end of the range with it
    assert ours <= stock * (1.0 if name == "q8_0" else 0.985)


def assert_never_worse(name: str, weights: Float32, importance: Float32, label: str) -> None:
    made = grid(name)
    params, codes = made.quantize(weights, importance)
    weighting = made.weighting(weights, importance)
    stock = stock_decode(name.upper(), stock_encode(name.upper(), weights, importance))
    theirs = error(weights, stock, weighting)
    assert error(weights, made.decode(codes, params), weighting) <= 1.0005 * theirs, label


@functools.cache
def demo_matrices() -> dict[str, Float32]:
    """The first rows of every linear layer of the demo model."""
    checkpoint = open_checkpoint(api.model_path("demo"))
    linears = detect(checkpoint).linears
    return {linear.name: read_view(checkpoint, linear.view, 0, min(96, linear.view.rows)) for linear in linears}


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_of_the_demo_is_worse_than_the_stock_encoders(name: str) -> None:
    """Nearly flat importance is the hardest to beat, and what a model's statistics often are."""
    for number, (label, weights) in enumerate(demo_matrices().items()):
        for sigma in (0.01, 0.3, 1.0, 2.0):
            for seed in range(2):
                drawn = np.random.default_rng([seed, number]).lognormal(0, sigma, (weights.shape[1],))
                assert_never_worse(name, weights, drawn.astype(np.float32), f"{label}, sigma {sigma}, seed {seed}")


def uneven(seed: int) -> tuple[dict[str, Float32], dict[str, Float32]]:
    """Small matrices and importances in which a few blocks or weights decide."""
    random = np.random.default_rng(seed)
    shape = (32, 256)
    normal = random.standard_normal(shape) * 0.02
    outliers = normal.copy()
    outliers[:, ::37] *= 30
    weights = {
        "heavy": random.standard_t(2, shape) * 0.02,
        "rows": normal * random.lognormal(0, 2, (32, 1)),
        "channels": normal * random.lognormal(0, 2, 256),
        "outliers": outliers,
        "sparse": normal * (random.random(shape) < 0.05),
        "ternary": np.rint(random.standard_normal(shape)).clip(-1, 1) * 0.05 + normal * 0.05,
        "one sign": random.exponential(0.02, shape),
    }
    spikes = np.ones(256)
    spikes[random.integers(0, 256, 5)] = 1e4
    importance = {
        "flat": random.lognormal(0, 0.1, 256),
        "wide": random.lognormal(0, 3, 256),
        "correlated": np.exp(np.convolve(random.standard_normal(295), np.ones(40) / 6, "valid")),
        "heavy": np.abs(random.standard_t(1.5, 256)),
        "spikes": spikes,
        "squares": (weights["channels"] ** 2).mean(axis=0),
    }
    return (
        {label: values.astype(np.float32) for label, values in weights.items()},
        {label: values.astype(np.float32) for label, values in importance.items()},
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_no_uneven_matrix_is_worse_than_the_stock_encoders(name: str, seed: int) -> None:
    matrices_of_seed, importances = uneven(seed)
    for label, weights in matrices_of_seed.items():
        for kind, importance in importances.items():
            assert_never_worse(name, weights, importance, f"{label}, {kind}")


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("name", SEARCHED)
def test_compiled_search_equals_the_plain_one(name: str, important: bool) -> None:
    made = grid(name)
    assert isinstance(made, legacy.LegacyGrid)
    for weights in matrices(352).values():
        importance = importance_of(352) if important else None
        params = made.fit(weights, importance)
        if made.affine:
            d, m = scales.slow_pairs(weights, importance, made.levels, made.trials(important))
            plain = {"d": d.astype(np.float16), "m": m.astype(np.float16)}
        else:
            plain = {
                "d": scales.slow_scales(weights, importance, made.levels, made.ladder(important)).astype(np.float16)
            }
        # near ties fall differently in single and double precision
        assert np.mean(params["d"] == plain["d"]) > 0.9
        weighting = made.weighting(weights, importance)
        fast, slow = (error(weights, made.decode(made.encode(weights, p), p), weighting) for p in (params, plain))
        assert fast <= slow * 1.002


@pytest.mark.parametrize("name", ["q4_0", "q5_0"])
def test_search_comes_near_the_best_of_all_scales(name: str) -> None:
    """The optimum by trying every float16 d that could matter, block by block."""
    made = grid(name)
    weights = matrices(64)["normal"]
    half = 8 if name == "q4_0" else 16
    params, codes = made.quantize(weights)
    found = ((made.decode(codes, params) - weights) ** 2).reshape(-1, 32).sum(axis=1)
    blocks = weights.reshape(-1, 32)
    best = np.full(len(blocks), np.inf)
    ratios = np.linspace(0.6, 1.5, 1500) / half
    for ratio in np.concatenate([ratios, -ratios]):
        d = (np.abs(blocks).max(axis=1) * ratio).astype(np.float16).astype(np.float32)[:, None]
        levels = np.clip(np.rint(blocks / d), -half, half - 1)
        best = np.minimum(best, ((d * levels - blocks) ** 2).sum(axis=1))
    assert found.sum() <= 1.01 * best.sum()


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_search_comes_near_the_best_of_all_pairs(name: str) -> None:
    """The optimum over a dense lattice of ranges and positions, block by block."""
    made = grid(name)
    weights = matrices(64)["normal"]
    high = 15 if name == "q4_1" else 31
    params, codes = made.quantize(weights)
    found = ((made.decode(codes, params) - weights) ** 2).reshape(-1, 32).sum(axis=1)
    blocks = weights.reshape(-1, 32)
    bottom, length = blocks.min(axis=1, keepdims=True), np.ptp(blocks, axis=1)[:, None]
    best = np.full(len(blocks), np.inf)
    for steps in np.linspace(high - 1.2, high + 1.5, 60):
        d = (length / steps).astype(np.float16).astype(np.float32)
        for shift in np.linspace(-0.8, 1.2, 50):
            m = (bottom + shift * d).astype(np.float16).astype(np.float32)
            levels = np.clip(np.rint((blocks - m) / d), 0, high)
            best = np.minimum(best, ((d * levels + m - blocks) ** 2).sum(axis=1))
    assert found.sum() <= (1.04 if name == "q4_1" else 1.07) * best.sum()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent_and_columns_encode_alike(name: str) -> None:
    made = grid(name)
    weights = matrices(160)["heavy"]
    importance = importance_of(160)
    params, codes = made.quantize(weights, importance)
    some, part = made.quantize(weights[7:9], importance)
    np.testing.assert_array_equal(part, codes[7:9])
    for key, values in some.items():
        np.testing.assert_array_equal(values, params[key][7:9])
    for columns in (slice(0, 160), slice(31, 70), slice(64, 65)):
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        np.testing.assert_array_equal(
            made.decode(codes[:, columns], params, columns), made.decode(codes, params)[:, columns]
        )


def hard_rows() -> npt.NDArray[np.float32]:
    random = np.random.default_rng(8)
    rows = (random.standard_normal((10, 64)) * 0.02).astype(np.float32)
    rows[0] = 0
    rows[1, :32] = 0.5
    rows[2, :32] = -0.25
    rows[3] *= 1e-6
    rows[4] *= 1e-40
    rows[5, 3] = 1e4
    rows[6, 40] = -3e30
    rows[7, 1:32] = 0
    rows[8, ::2] = 0
    rows[9, 3], rows[9, 4] = 3e38, -3e38  # their difference overflows
    return rows


@pytest.mark.parametrize("kind", ["none", "ones", "zero", "sparse", "large", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_stay_finite_and_close(name: str, kind: str) -> None:
    made, weights = grid(name), hard_rows()
    sparse = np.zeros(64, dtype=np.float32)
    sparse[[5, 50]] = 2.0
    importance = {
        "none": None,
        "ones": np.ones(64, dtype=np.float32),
        "zero": np.zeros(64, dtype=np.float32),
        "sparse": sparse,
        "large": np.full(64, 1e30, dtype=np.float32),
        "small": np.full(64, 1e-30, dtype=np.float32),
    }[kind]
    params, codes = made.quantize(weights, importance)
    values = made.decode(codes, params)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values[0], 0)
    np.testing.assert_allclose(values[1, :32], 0.5, rtol=1e-3)
    np.testing.assert_allclose(values[2, :32], -0.25, rtol=1e-3)
    assert np.abs(values[4]).max() <= 6e-8
    np.testing.assert_allclose(values[5, 3], 1e4, rtol=2e-2 if kind != "sparse" else 1)
    np.testing.assert_allclose(values[7, 0], weights[7, 0], rtol=1e-2 if kind != "sparse" else 2)
    if kind == "sparse":
        np.testing.assert_allclose(values[8, 50], weights[8, 50], atol=2e-3)
