"""The same levels on other grids: values compared through each grid's own decode."""

import gguf
import numpy as np
import pytest

from anyquant.core.corrections import Mask
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid
from anyquant.grids.recode import fitting_zero, recoded, regrouped

SHAPE = (24, 512)


def quantized(name: str, sigma: float = 0.02) -> QTensor:
    weights = np.random.default_rng(3).standard_t(5, SHAPE).astype(np.float32) * np.float32(sigma)
    made = grid(name)
    params, codes = made.quantize(weights)
    return QTensor(made, SHAPE, codes, params)


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        (
            "int4-g128",
            ("int4-g64", "int4-g32-asym", "int4-g128-f16", "int8-g16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
        ),
        ("int4-g32-asym", ("int4-g16-asym", "int5-g32-asym", "q8_0", "q5_0")),
        ("int4-channel", ("int4-g128", "int4-g256-asym", "int8-channel", "q4_0")),
        ("int8-g128", ("int8-g64-asym", "int8-g32-f16", "q8_0")),
        ("int8-tensor", ("int8-channel", "int8-g32", "q8_0")),
        ("int2-g64-asym", ("int4-g64-asym", "int3-g32", "q4_0", "q4_1")),
        ("q4_0", ("q4_1", "q5_0", "q8_0", "int4-g32-asym-f16", "int8-g32-f16")),
        ("q8_0", ("int8-g32-f16",)),
    ],
)
def test_what_a_grid_holds_it_holds_exactly(source: str, targets: tuple[str, ...]) -> None:
    rows = quantized(source)
    for target in targets:
        found = recoded(rows, grid(target))
        assert found is not None, target
        np.testing.assert_array_equal(found.decode(), rows.decode(), err_msg=target)
        assert found.grid.name == target


def test_q4_0_is_what_the_gguf_library_reads() -> None:
    """int4 in groups becomes a q4_0 that gguf's own reader decodes to the same numbers."""
    from anyquant.formats.gguf.layouts import layout

    rows = quantized("int4-g128")
    found = recoded(rows, grid("q4_0"))
    assert found is not None
    raw = layout("q4_0").pack(found.codes, found.params)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(theirs, rows.decode())


def test_scales_that_another_type_rounds_change_by_so_much() -> None:
    """float16 scales on a grid of bfloat16 ones: the same codes, scales off by at most half of 2^-7."""
    rows = quantized("int4-g64-f16")
    found = recoded(rows, grid("int4-g64"))
    assert found is not None
    np.testing.assert_array_equal(found.codes, rows.codes)
    nonzero = rows.decode() != 0
    change = np.abs(found.decode()[nonzero] / rows.decode()[nonzero] - 1).max()
    assert 0 < change <= 2**-8


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("int4-g32", "int4-g128"),  # neighbours differ
        ("int8-g128", "int4-g128"),  # more levels
        ("int4-g128-asym", "int4-g128"),  # zeros
        ("q4_1", "int4-g32-asym"),  # minima are no multiples
        ("int4-g128", "q4_k"),
        ("nf4-g64", "int4-g64"),
        ("int4-g128", "mxfp4"),
    ],
)
def test_what_a_grid_cannot_hold(source: str, target: str) -> None:
    assert recoded(quantized(source), grid(target)) is None


def test_masks_are_not_taken_over() -> None:
    rows = quantized("int4-g128")
    masked = QTensor(rows.grid, rows.shape, rows.codes, rows.params, None, (Mask(np.ones(SHAPE, bool)),))
    assert recoded(masked, grid("int4-g64")) is None


def test_equal_neighbours_become_one_group() -> None:
    values = np.array([[1.0, 1.0, 2.0, 2.0]], dtype=np.float32)
    np.testing.assert_array_equal(regrouped(values, 2), [[1.0, 2.0]])
    np.testing.assert_array_equal(regrouped(values, 8), [[1, 1, 1, 1, 2, 2, 2, 2]])
    assert regrouped(values, 1) is None and regrouped(values, 3) is None


def test_zero_points_by_hand() -> None:
    """Levels -3 to 5 of a group fit under 3 to 10 of 0 to 15, those of -16 to 0 nowhere."""
    levels = np.array([[[-3, 0, 5]]], dtype=np.int32)
    for preferred, found in ((0, 3), (7, 7), (12, 10)):
        assert fitting_zero(levels, np.array([[preferred]], dtype=np.int32), 15) == found
    assert fitting_zero(np.array([[[-16, 0]]], dtype=np.int32), np.array([[8]], dtype=np.int32), 15) is None
