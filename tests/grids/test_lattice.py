"""Lattices: what they list is what the grid decodes, and what the grid encodes is nearest among it."""

import numpy as np
import numpy.typing as npt
import pytest

from anyquant.core.dtypes import bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.grid import Grid, Lattice, Params, Scope
from anyquant.grids import grid

LEGACY = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"]
KQUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
AFFINE = ["affine2-g32", "affine4-g64", "affine8-g128"]
INTEGERS = [
    f"int{bits}-{reach}{asymmetric}"
    for bits, reach in ((2, "g16"), (3, "channel"), (4, "g128"), (5, "tensor"), (8, "g64"), (8, "channel"))
    for asymmetric in ("", "-asym")
]
ROWS, COLUMNS = 6, 512


def random_params(made: Grid) -> Params:
    """Any stored values: small scales of both signs, integers over their whole range."""
    random = np.random.default_rng(7)
    params = {}
    for parameter in made.parameters:
        shape = parameter.shape((ROWS, COLUMNS))
        if parameter.dtype == "float32":
            drawn = random.lognormal(-4, 1, shape).astype(np.float32)
            params[parameter.name] = bfloat16_to_float32(float32_to_bfloat16(drawn))
        elif parameter.dtype == "float16":
            params[parameter.name] = (random.standard_normal(shape) * 0.01).astype(np.float16)
        else:
            low = -(1 << (parameter.bits - 1)) if parameter.dtype == "int8" else 0
            params[parameter.name] = random.integers(low, low + (1 << parameter.bits), shape).astype(parameter.dtype)
    return params


def values_of(lattice: Lattice) -> npt.NDArray[np.float64]:
    """(rows, columns, codes), float64, from the definition in `core.grid.Lattice`."""
    place = np.arange(COLUMNS) // lattice.width
    scale, shift = (
        np.broadcast_to(part, (ROWS, part.shape[1])).astype(np.float64)[:, place, None]
        for part in (lattice.scale, lattice.shift)
    )
    values: npt.NDArray[np.float64] = scale * lattice.levels.astype(np.float64) + shift
    return values


@pytest.mark.parametrize("name", LEGACY + KQUANTS + AFFINE + INTEGERS)
def test_the_lattice_lists_what_the_grid_decodes_and_encodes(name: str) -> None:
    made = grid(name)
    params = random_params(made)
    lattice = made.lattice(params)
    assert lattice is not None and lattice.uniform and lattice.scale.dtype == np.float32
    assert (np.diff(lattice.levels) == 1).all() and lattice.codes.dtype == np.dtype(made.code_dtype)
    values = values_of(lattice)
    sizes = np.abs(values).max(axis=2)
    for index, code in enumerate(lattice.codes):
        decoded = made.decode(np.full((ROWS, COLUMNS), code, dtype=made.code_dtype), params)
        assert (np.abs(decoded - values[:, :, index]) <= 1e-6 * sizes).all()
    low, high = values.min(axis=2), values.max(axis=2)
    random = np.random.default_rng(8)
    weights = (low + (high - low) * random.uniform(-0.2, 1.2, low.shape)).astype(np.float32)
    chosen = made.decode(made.encode(weights, params), params)
    nearest = np.abs(values - weights[:, :, None]).min(axis=2)
    assert (np.abs(chosen - weights) <= nearest + 1e-6 * np.maximum(sizes, np.abs(weights))).all()


@pytest.mark.parametrize("name", LEGACY + KQUANTS + AFFINE + INTEGERS)
def test_columns_apart_are_encoded_and_decoded_as_with_their_rows(name: str) -> None:
    made = grid(name)
    params = random_params(made)
    weights = (np.random.default_rng(9).standard_normal((ROWS, COLUMNS)) * 0.05).astype(np.float32)
    codes = made.encode(weights, params)
    values = made.decode(codes, params)
    for columns in (slice(0, 1), slice(33, 34), slice(30, 70), slice(128, 256), slice(511, 512), slice(0, COLUMNS)):
        part = made.encode(weights[:, columns], params, columns)
        assert part.shape == codes[:, columns].shape and part.dtype == codes.dtype
        np.testing.assert_array_equal(part, codes[:, columns])
        np.testing.assert_array_equal(made.decode(part, params, columns), values[:, columns])


@pytest.mark.parametrize("name", INTEGERS)
def test_scopes_are_those_of_the_reach(name: str) -> None:
    made = grid(name)
    expected = Scope.ROW if "channel" in name else Scope.TENSOR if "tensor" in name else Scope.BLOCK
    assert {parameter.scope for parameter in made.parameters} == {expected}
    assert made.tensor_wide == ("tensor" in name)
