"""Weights as small floats beside their scales: what fp8, ModelOpt and Quark folders have in common.

    8 bits    `weight` F8_E4M3 or F8_E5M2 (out, in), one byte a code
    6 bits    `weight` U8 (out, in * 3 / 4), four codes in three bytes, the first one lowest
    4 bits    `weight` U8 (out, in / 2), the even column in the low half

The scales are one tensor, that multiplies; NVFP4 has a second one for the whole matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Bytes, Float32, from_float32_exactly, to_float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.grid import Parameter, Params, Scope
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.extra import Extra, Shape, sized
from anyquant.formats.folder.modules import Along, Stored, refuse_reordered
from anyquant.formats.folder.packing import pack_bits, unpack_bits
from anyquant.grids import grid as find_grid

SCALE_FLOATS = ("F32", "BF16", "F16")
STORED_KINDS = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}
BIAS, NAN, LEAST, MOST = 127, 255, 2.0**-127, 2.0**127  # of E8M0


@dataclass(frozen=True)
class ScaledLayout:
    """The grids "fp8_*", "mxfp4", "mxfp6_*" and "mxfp8_*": codes and the parameter "scale".

    `scale` names the tensor of scales, `scale_dtype` is F32, BF16 or F16, or, for powers of two, F8_E8M0 or U8 (biased
    exponents).
    `scale_shape` is how the folder writes the shape of the parameter, whose order of values is the same in all; it may
    name "high" and "wide", the sizes of the parameter's own array.
    """

    grid: str
    scale: str = "weight_scale"
    scale_dtype: str = "F32"
    scale_shape: Shape = ("high", "wide")
    extras: tuple[Extra, ...] = ()
    quantized: bool = True

    @cached_property
    def parameter(self) -> Parameter:
        return find_grid(self.grid).parameters[0]

    @property
    def row_multiple(self) -> int:
        return self.parameter.rows if self.parameter.scope is Scope.BLOCK else 1

    @property
    def bits(self) -> int:
        return find_grid(self.grid).code_bits

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        high, wide = self.parameter.shape((rows, columns))
        scale = sized(self.scale_shape, high=high, wide=wide)
        along = Along.ONCE if self.parameter.scope is Scope.TENSOR or not scale else Along.ROWS
        return [
            Stored("weight", self._weight_dtype(), (rows, columns * self.bits // 8)),
            Stored(self.scale, self.scale_dtype, scale, along, self.row_multiple),
            *(extra.stored(rows, columns) for extra in self.extras),
        ]

    def _weight_dtype(self) -> str:
        return "U8" if self.bits < 8 else STORED_KINDS[self.grid.partition("_")[2].partition("-")[0]]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, f"{self.grid} in this format")
        codes, scale = pack_bits(rows.codes, self.bits), np.ascontiguousarray(rows.params["scale"]).reshape(-1)
        if scale.dtype == np.float32:
            scale = self._stored(scale)
        return [codes, scale, *(extra.bytes(shape) for extra in self.extras)]

    def _stored(self, scale: Float32) -> Bytes:
        """Scales as the folder has them. Raises UnsupportedError for one that its type cannot hold."""
        if self.scale_dtype not in SCALE_FLOATS:
            return exponents_of(scale, self.scale)
        stored, lost = from_float32_exactly(scale, self.scale_dtype)
        if lost.any():
            raise UnsupportedError(f"{self.scale}: a scale of {self.grid} is no {self.scale_dtype} number")
        return stored

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Raises BadInputError for a scale that is NaN."""
        grid = find_grid(self.grid)
        codes = unpack_bits(raw[0].reshape(rows, -1), self.bits, shape[1])
        scale: npt.NDArray[Any] = raw[1]
        if self.scale_dtype in SCALE_FLOATS:
            scale = to_float32(raw[1], self.scale_dtype)
        if np.any(np.isnan(scale) if self.scale_dtype in SCALE_FLOATS else scale == NAN):
            raise BadInputError(f"{self.scale} of {self.grid}: a scale is not a number")
        if scale.dtype == np.uint8 and self.parameter.dtype == "float32":
            scale = np.ldexp(np.float32(1), scale.astype(np.int32) - BIAS).astype(np.float32)
        return QTensor(grid, (rows, shape[1]), codes, {"scale": scale.reshape(self.parameter.shape((rows, shape[1])))})


@dataclass(frozen=True)
class NvLayout:
    """The grid "nvfp4" as ModelOpt has it: `weight` U8 (out, in / 2), the even column in the low half, `weight_scale`
    F8_E4M3 (out, in / 16), and `weight_scale_2`, one F32 that multiplies: the reciprocal of the grid's."""

    scale_2_shape: tuple[int, ...] = ()
    extras: tuple[Extra, ...] = ()
    grid: str = "nvfp4"
    quantized: bool = True
    row_multiple: int = 1

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        return [
            Stored("weight", "U8", (rows, columns // 2)),
            Stored("weight_scale", "F8_E4M3", (rows, columns // 16)),
            Stored("weight_scale_2", "F32", self.scale_2_shape, Along.ONCE),
            *(extra.stored(rows, columns) for extra in self.extras),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for a scale of the matrix that its reciprocal does not give back."""
        refuse_reordered(rows, f"{self.grid} in this format")
        whole = rows.params["global_scale"]
        reciprocal = (np.float32(1) / whole).astype("<f4")
        if not np.array_equal(np.float32(1) / reciprocal, whole):
            raise UnsupportedError(f"nvfp4: the reciprocal of the matrix's scale {whole.item()!r} is not exact")
        scale = np.ascontiguousarray(rows.params["scale"])
        extras = [extra.bytes(shape) for extra in self.extras]
        return [pack_bits(rows.codes, 4), scale, reciprocal.reshape(-1).view(np.uint8), *extras]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Raises BadInputError for a scale that is no positive number."""
        codes = unpack_bits(raw[0].reshape(rows, -1), 4, shape[1])
        whole = raw[2].view("<f4").reshape(1, 1)
        if not (np.isfinite(whole).all() and (whole > 0).all()):
            raise BadInputError(f"nvfp4: weight_scale_2 is {whole.item()!r}; expected a positive number")
        reciprocal: Float32 = np.reciprocal(whole)
        params: Params = {"scale": raw[1].reshape(rows, -1), "global_scale": reciprocal}
        return QTensor(find_grid("nvfp4"), (rows, shape[1]), codes, params)


def exponents_of(scale: Float32, name: str) -> Bytes:
    """Biased exponents of powers of two. Raises UnsupportedError for other numbers."""
    fraction, exponent = np.frexp(scale)
    if not np.all(fraction == 0.5) or scale.min() < LEAST or scale.max() > MOST:
        raise UnsupportedError(f"{name}: a scale is no power of two, which is all that it can hold")
    return (exponent - 1 + BIAS).astype(np.uint8)
