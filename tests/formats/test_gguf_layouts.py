"""GGUF layouts against ggml's own encoder and gguf's own decoder."""

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from anyquant.core.errors import UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.gguf.layouts import TYPES, RowLayout, layout, layout_of_type
from anyquant.grids import grid
from support.ggml import stock_decode, stock_encode


def stock_bytes(form: RowLayout, rows: int = 5, columns: int = 768) -> npt.NDArray[np.uint8]:
    """ggml's bytes for weights with rows of very different size, so that every scale and bit field is exercised."""
    random = np.random.default_rng(7)
    weights = random.standard_t(3, (rows, columns)) * np.logspace(-3, 1, rows)[:, None]
    weights[1] = np.abs(weights[1])
    weights[2, 256:512] = 0
    single = weights.astype(np.float32)
    if form.grid == "f32":
        return single.view(np.uint8)
    if form.grid == "f16":
        return single.astype(np.float16).view(np.uint8)
    return stock_encode(form.ggml_type, single)


@pytest.mark.parametrize("name", TYPES)
def test_stock_bytes_survive_unpack_and_pack(name: str) -> None:
    form = layout(name)
    raw = stock_bytes(form)
    params, codes = form.unpack(raw)
    packed = form.pack(codes, params)
    assert packed.dtype == np.uint8 and packed.flags.c_contiguous
    np.testing.assert_array_equal(packed, raw)


@pytest.mark.parametrize("name", TYPES)
def test_random_bytes_survive_unpack_and_pack(name: str) -> None:
    """Every bit of a block belongs to a code or a parameter: arbitrary bytes come back unchanged."""
    form = layout(name)
    random = np.random.default_rng(11)
    raw = random.integers(0, 256, (3, form.row_bytes(512)), dtype=np.uint8)
    params, codes = form.unpack(raw)
    np.testing.assert_array_equal(form.pack(codes, params), raw)


@pytest.mark.parametrize("name", TYPES)
def test_decoding_unpacked_stock_bytes_equals_gguf_bit_for_bit(name: str) -> None:
    form = layout(name)
    raw = stock_bytes(form)
    params, codes = form.unpack(raw)
    tensor = QTensor(grid=grid(name), shape=(5, 768), codes=codes, params=params)
    expected = stock_decode(form.ggml_type, raw)
    np.testing.assert_array_equal(tensor.decode().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_gguf_and_of_the_grid(name: str) -> None:
    form = layout(name)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[form.ggml_type]] == (form.block, form.block_bytes)
    assert grid(name).bits((3, 1024)) == 3 * form.row_bytes(1024) * 8
    assert layout_of_type(form.ggml_type) is form


def test_a_slice_of_rows_packs_to_the_slice_of_bytes() -> None:
    form = layout("q6_k")
    raw = stock_bytes(form)
    params, codes = form.unpack(raw)
    some = {key: value[1:3] for key, value in params.items()}
    np.testing.assert_array_equal(form.pack(codes[1:3], some), raw[1:3])


def test_what_gguf_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="int4-g128"):
        layout("int4-g128")
    with pytest.raises(UnsupportedError, match="IQ1_S"):
        layout_of_type("IQ1_S")
    with pytest.raises(UnsupportedError, match="100"):
        layout("q4_k").row_bytes(100)
