"""8-bit floats: torch's casts bit for bit, smaller last blocks, searched scales never worse than plain ones."""

import numpy as np
import pytest
import torch

from anyquant.core.dtypes import Float32
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid
from anyquant.grids.minifloat import E4M3, E5M2, MiniFloat, levels_of, values_of

KINDS = {"e4m3": (E4M3, torch.float8_e4m3fn), "e5m2": (E5M2, torch.float8_e5m2)}
NAMES = [f"fp8_{kind}-{reach}" for kind in KINDS for reach in ("tensor", "channel", "block")]


def weights_of(rows: int = 200, columns: int = 300) -> Float32:
    random = np.random.default_rng(3)
    return (random.standard_t(4, (rows, columns)) * 0.02 * random.lognormal(0, 1, (rows, 1))).astype(np.float32)


def cast(values: Float32, name: str) -> Float32:
    """torch's rounding, which does not saturate: values are clipped before."""
    kind, torch_type = KINDS[name]
    clipped = np.clip(values, -kind.highest, kind.highest)
    rounded: Float32 = torch.from_numpy(clipped).to(torch_type).view(torch.uint8).numpy()
    return rounded


@pytest.mark.parametrize("name", KINDS)
def test_codes_and_values_are_torchs_bit_for_bit(name: str) -> None:
    kind, torch_type = KINDS[name]
    random = np.random.default_rng(0)
    finite = values_of(kind)[np.isfinite(values_of(kind))].astype(np.float64)
    middles = ((np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2).astype(np.float32)  # ties
    spread = (random.standard_normal(50000) * 10.0 ** random.uniform(-12, 7, 50000)).astype(np.float32)
    edges = np.array([0.0, -0.0, 448, 463.9, 464, -465, 1e30, -1e-40, 2.0**-10, 2.0**-17], dtype=np.float32)
    values = np.concatenate([finite.astype(np.float32), middles, np.nextafter(middles, 9), spread, edges])[None]
    made, ones = grid(f"fp8_{name}-tensor"), {"scale": np.ones((1, 1), dtype=np.float32)}
    np.testing.assert_array_equal(made.encode(values, ones), cast(values, name))
    patterns = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(values_of(kind), patterns.view(torch_type).float().numpy())


def expanded(scale: Float32, shape: tuple[int, int], name: str) -> Float32:
    if name.endswith("block"):
        scale = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[: shape[0], : shape[1]]
    return np.broadcast_to(scale, shape)


def loss(values: Float32, weights: Float32, importance: Float32) -> float:
    return float((importance.astype(np.float64) * (values.astype(np.float64) - weights) ** 2).sum())


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_weights_over_scale_rounded_and_a_search_is_never_worse(name: str) -> None:
    made, weights = grid(name), weights_of()
    importance = np.random.default_rng(1).lognormal(0, 1, 300).astype(np.float32)
    shared = made.prepare(0.0, (float(np.abs(weights).max()),)) or None
    params, codes = made.quantize(weights, importance, shared)
    tensor = QTensor(made, (200, 300), codes, params)
    scale = expanded(params["scale"], (200, 300), name)
    np.testing.assert_array_equal(codes, cast(weights / scale, name[4:8]))
    kind = KINDS[name[4:8]][0]
    np.testing.assert_array_equal(tensor.decode(), values_of(kind)[codes] * scale)
    plain = made.plain(weights, shared)
    magnitude = np.abs(weights).reshape(200, 1, 300) if name.endswith("channel") else np.abs(weights)[None]
    if not name.endswith("block"):
        top = magnitude.max(axis=(1, 2))[:, None] / np.float32(kind.highest)
        np.testing.assert_array_equal(plain["scale"], top)
    ours = loss(tensor.decode(), weights, importance)
    theirs = loss(made.decode(made.encode(weights, plain), plain), weights, importance)
    assert ours <= theirs * (1.0 if name.endswith("tensor") else 0.995)
    assert made.bits((200, 300)) == 200 * 300 * 8 + 32 * params["scale"].size


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_rows_and_columns_are_slices_of_the_result(name: str) -> None:
    made, weights = grid(name), weights_of()
    shared = made.prepare(float(np.abs(weights).max())) or None
    params, codes = made.quantize(weights, None, shared)
    some, part = made.quantize(weights[128:], None, shared)
    np.testing.assert_array_equal(part, codes[128:])
    np.testing.assert_array_equal(some["scale"], params["scale"][made.parameters[0].slice(128, 72)])
    values = made.decode(codes, params)
    for columns in (slice(0, 300), slice(100, 290), slice(256, 257), slice(127, 129)):
        np.testing.assert_array_equal(made.encode(weights[:, columns], params, columns), codes[:, columns])
        np.testing.assert_array_equal(made.decode(codes[:, columns], params, columns), values[:, columns])


@pytest.mark.parametrize("name", NAMES)
def test_hard_rows_stay_finite(name: str) -> None:
    made, weights = grid(name), weights_of(130, 140)
    weights[0], weights[1], weights[2] = 0, 0.5, weights[2] * np.float32(1e-38)
    huge = weights.copy()
    huge[128:, 130] = [3.4028235e38, -3.4028235e38]
    for matrix in (weights, huge, np.zeros_like(weights)):
        for importance in (None, np.zeros(140, dtype=np.float32), np.full(140, 1e30, dtype=np.float32)):
            params, codes = made.quantize(matrix, importance)
            values = made.decode(codes, params)
            assert np.isfinite(values).all() and (params["scale"] > 0).all() and (values[0] == 0).all()
            if matrix is not huge:
                np.testing.assert_allclose(values[1], matrix[1], rtol=0.13)


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_lattice_lists_every_finite_value_once(kind: MiniFloat) -> None:
    levels, codes = levels_of(kind)
    assert (np.diff(levels) > 0).all() and len(levels) == np.isfinite(values_of(kind)).sum() - 1
    np.testing.assert_array_equal(values_of(kind)[codes], levels)
    made, weights = grid(f"fp8_{kind.name}-block"), weights_of()
    params, chosen = made.quantize(weights)
    lattice = made.lattice(params)
    assert lattice is not None
    unit = lattice.scale[np.arange(200)[:, None], np.arange(300) // lattice.width]
    place = np.abs(weights[..., None] - unit[..., None] * lattice.levels).argmin(axis=2)
    np.testing.assert_allclose(lattice.levels[place] * unit, made.decode(chosen, params), rtol=0.13, atol=1e-9)
