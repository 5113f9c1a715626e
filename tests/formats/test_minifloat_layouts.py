"""What a tensor beside the weight cannot hold exactly is refused, not rounded."""

import dataclasses

import numpy as np
import pytest

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.extra import Extra
from anyquant.formats.folder.minifloat import NvLayout, ScaledLayout
from anyquant.grids import grid as find_grid

SHAPE = (4, 64)


def rows_on(name: str, **params: object) -> QTensor:
    grid = find_grid(name)
    weights = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    found, codes = grid.quantize(weights)
    return QTensor(grid, SHAPE, codes, {**found, **params})  # type: ignore[dict-item]


def whole(value: float) -> np.ndarray:
    return np.full((1, 1), value, dtype=np.float32)


@pytest.mark.parametrize(
    ("dtype", "exact", "odd"), [("BF16", 0.75, 1 / 3), ("F16", 0.75, 1e-9), ("F8_E8M0", 0.25, 0.75), ("U8", 4.0, 3.0)]
)
def test_scales_of_another_type(dtype: str, exact: float, odd: float) -> None:
    kind = ScaledLayout("fp8_e4m3-tensor", scale_dtype=dtype, scale_shape=())
    good = rows_on("fp8_e4m3-tensor", scale=whole(exact))
    raw = [np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in kind.pack(good, SHAPE)]
    assert [one.size for one in raw] == [one.nbytes for one in kind.tensors(*SHAPE)]
    np.testing.assert_array_equal(kind.unpack(raw, 4, SHAPE).decode(), good.decode())
    with pytest.raises(UnsupportedError, match="weight_scale"):
        kind.pack(rows_on("fp8_e4m3-tensor", scale=whole(odd)), SHAPE)


def test_the_reciprocal_of_a_scale_must_come_back() -> None:
    """Powers of two, which this package makes, always do; of other packages' scales some do not."""
    numbers = np.linspace(1, 2, 1000, dtype=np.float32)
    lost = numbers[1 / (1 / numbers) != numbers]
    assert 0 < lost.size < numbers.size
    with pytest.raises(UnsupportedError, match="reciprocal"):
        NvLayout().pack(rows_on("nvfp4", global_scale=whole(float(lost[0]))), SHAPE)
    kept = numbers[1 / (1 / numbers) == numbers][3]
    for value in (kept, 2.0**40, 2.0**-40):
        rows = rows_on("nvfp4", global_scale=whole(float(value)))
        raw = [np.ascontiguousarray(one).reshape(-1).view(np.uint8) for one in NvLayout().pack(rows, SHAPE)]
        np.testing.assert_array_equal(raw[2].view("<f4"), [1 / np.float32(value)])
        np.testing.assert_array_equal(NvLayout().unpack(raw, 4, SHAPE).decode(), rows.decode())


def test_what_is_no_number_or_out_of_order_is_refused() -> None:
    raw = [np.zeros(4 * 64, np.uint8), np.full(1, 255, np.uint8)]
    with pytest.raises(BadInputError, match="not a number"):
        ScaledLayout("fp8_e4m3-tensor", scale_dtype="F8_E8M0", scale_shape=()).unpack(raw, 4, SHAPE)
    order = np.arange(64, dtype=np.int32) % 4
    with pytest.raises(UnsupportedError, match="reordered"):
        NvLayout().pack(dataclasses.replace(rows_on("nvfp4"), column_groups=order), SHAPE)
    with pytest.raises(UnsupportedError, match="input_scale comes from calibration"):
        ScaledLayout("fp8_e4m3-tensor", extras=(Extra("input_scale", "F32"),)).pack(rows_on("fp8_e4m3-tensor"), SHAPE)
