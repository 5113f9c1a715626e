"""Which groups of consecutive weights some columns touch, and how a value per group reaches its weights."""

from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError

WHOLE_ROW = 2**31 - 1  # the width of the one group of a row


def touched(columns: slice | None, width: int) -> tuple[slice, int]:
    """The groups of `width` that the columns (all: None) touch, and the place of the first column in the first one.

    Raises AnyQuantError for a slice with a step or counted from the end.
    """
    if columns is None:
        return slice(None), 0
    if columns.step not in (None, 1) or (columns.start or 0) < 0 or columns.stop is None or columns.stop < 0:
        raise AnyQuantError(f"a slice of columns must be contiguous and counted from the start, got {columns}")
    start = columns.start or 0
    return slice(start // width, -(-columns.stop // width)), start % width


def scale_up(values: Float32, scale: Float32, first: int, width: int) -> Float32:
    """`values` (rows, columns), which begin at place `first` of a group, times `scale` (rows, groups); in place."""
    columns = values.shape[1]
    if scale.shape[1] == 1:
        values *= scale
    elif first == 0 and columns % width == 0:
        per_group = values.reshape(len(values), -1, width)  # a view: values are contiguous
        per_group *= scale[:, :, None]
    else:
        values *= scale[:, (np.arange(columns) + first) // width]
    return values


def gathered(table: Float32, codes: npt.NDArray[Any]) -> Float32:
    """table[codes], contiguous."""
    values: Float32 = np.take(table, codes, mode="clip")
    return values
