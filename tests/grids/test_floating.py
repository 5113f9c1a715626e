"""Floating grids against NumPy's and gguf's own conversions."""

import gguf
import numpy as np
import pytest

from anyquant.core.errors import UnsupportedError
from anyquant.grids import grid

EDGES = np.array(
    [[0.0, -0.0, 1.0, -1.5, 65504.0, -65519.9, 6e-8, 3e-8, 2.9e-8, 1e-45, 1.0009765625, 1.00048828125, 1.001464844]],
    dtype=np.float32,
)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_rounding_is_to_nearest_even_and_decoding_exact(name: str) -> None:
    made = grid(name)
    random = np.random.default_rng(0)
    weights = np.concatenate([EDGES, random.standard_normal((50, EDGES.shape[1])).astype(np.float32)])
    params, codes = made.quantize(weights)
    kind = gguf.GGMLQuantizationType[name.upper()]
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights, kind).view(np.uint8), kind)
    assert params == {} and codes.dtype == made.code_dtype
    np.testing.assert_array_equal(made.decode(codes, params).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(made.encode(weights[:, 2:5], params, slice(2, 5)), codes[:, 2:5])


@pytest.mark.parametrize(
    ("name", "value", "told"), [("f16", 65520, "65520"), ("f16", -1e9, "-1e"), ("bf16", 3.4e38, "3.4e")]
)
def test_a_finite_weight_never_becomes_infinite(name: str, value: float, told: str) -> None:
    weights = np.array([[0.5, value]], dtype=np.float32)
    with pytest.raises(UnsupportedError, match=f"{name} cannot hold the weight {told}"):
        grid(name).quantize(weights)


def test_bits_are_those_of_the_type() -> None:
    assert [grid(name).bits((3, 5)) for name in ("f32", "f16", "bf16")] == [480, 240, 240]
