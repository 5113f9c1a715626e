"""How ModelOpt lays out integers, and how a folder is read whose activations were scaled for AWQ.

Source: nvidia-modelopt 0.47, torch/export/quant_utils.py (pack_int4_in_uint8, to_quantized_weight); the tests compare
with files that it wrote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import DTYPES, Bytes, Float32, to_float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.extra import Extra
from anyquant.formats.folder.integers import Int8Layout, finite_scales, parse
from anyquant.formats.folder.minifloat import NvLayout, ScaledLayout
from anyquant.formats.folder.modules import FLOATS, Along, ModuleLayout, Stored, refuse_reordered
from anyquant.grids import grid as find_grid

SMOOTHING = "pre_quant_scale"
INPUT_SCALE = "input_scale"
# TensorRT-LLM expects the factors in modules that it does not fuse; ours are folded into the weights, if there are any
ONES = Extra(SMOOTHING, "BF16", ("columns",), 1.0)


@dataclass(frozen=True)
class Int4Layout:
    """Symmetric 4-bit integers in groups: `weight` U8 (out / 2, in), the even row in the low half of a byte, two's
    complement; `weight_scale` F32 (out, in / group)."""

    group: int
    extras: tuple[Extra, ...] = (ONES,)
    quantized: bool = True
    row_multiple: int = 2

    @property
    def grid(self) -> str:
        return f"int4-g{self.group}"

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        return [
            Stored("weight", "U8", (rows // 2, columns), per=2),
            Stored("weight_scale", "F32", (rows, columns // self.group)),
            *(extra.stored(rows, columns) for extra in self.extras),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, "modelopt")
        low, high = (rows.codes[start::2].view(np.uint8) & np.uint8(15) for start in (0, 1))
        scale = np.ascontiguousarray(rows.params["scale"], dtype="<f4")
        return [low | high << np.uint8(4), scale.view(np.uint8), *(extra.bytes(shape) for extra in self.extras)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        packed = raw[0].reshape(rows // 2, shape[1])
        codes = np.empty((rows, shape[1]), dtype=np.int8)
        # an arithmetic shift brings the sign along
        codes[0::2] = (packed << np.uint8(4)).view(np.int8) >> 4
        codes[1::2] = packed.view(np.int8) >> 4
        return QTensor(find_grid(self.grid), (rows, shape[1]), codes, {"scale": finite_scales(raw[1], rows)})


@dataclass(frozen=True)
class InputFactors:
    """A correction: what enters the matrix is multiplied with `factors` (in,) first, which scales its columns."""

    factors: Float32
    kind: str = "input factors"

    def apply(self, weights: Float32) -> Float32:
        return weights * self.factors

    def rows(self, start: int, stop: int) -> "InputFactors":
        return self

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        return {"factors_shared": self.factors[None, :]}


@dataclass(frozen=True)
class Smoothed:
    """A layout with a further tensor `pre_quant_scale` of type `dtype`: factors of the inputs. Only read."""

    inner: ModuleLayout
    dtype: str
    quantized: bool = True

    @property
    def grid(self) -> str:
        return self.inner.grid

    @property
    def row_multiple(self) -> int:
        return self.inner.row_multiple

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        return [*self.inner.tensors(rows, columns), Stored(SMOOTHING, self.dtype, (columns,), Along.ONCE)]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        raise UnsupportedError("factors of inputs are folded into the weights, not written")

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Raises BadInputError for factors that are not finite."""
        found = self.inner.unpack(raw[:-1], rows, shape)
        factors = to_float32(raw[-1], self.dtype)
        if not np.isfinite(factors).all():
            raise BadInputError(f"{SMOOTHING} holds a value that is not finite")
        return found if np.all(factors == 1) else replace(found, corrections=(InputFactors(factors),))


WRITTEN: Mapping[str, ModuleLayout] = {
    "nvfp4": NvLayout(),
    "fp8_e4m3-tensor": ScaledLayout("fp8_e4m3-tensor", scale_shape=()),
    "fp8_e4m3-channel": ScaledLayout("fp8_e4m3-channel", scale_shape=("high",)),
    "fp8_e4m3-block": ScaledLayout("fp8_e4m3-block", scale_shape=("high", 1, "wide", 1)),
    "mxfp8_e4m3": ScaledLayout("mxfp8_e4m3", scale_dtype="U8"),
    "int8-channel": Int8Layout(),
}


def layout(grid_name: str) -> ModuleLayout:
    """The layout in which a grid is written. Raises UnsupportedError for a grid that the format cannot hold."""
    if grid_name in WRITTEN:
        return WRITTEN[grid_name]
    name = parse(grid_name)
    if name is None or grid_name != f"int4-g{name.group}":
        raise UnsupportedError(
            f"modelopt has no place for grid {grid_name!r}; it holds: {', '.join((*FLOATS, *WRITTEN))} and int4-gN"
        )
    return Int4Layout(name.group)


def one_value(dtype: str, shape: tuple[int, ...], nbytes: int) -> bool:
    """Whether a tensor holds one number, whatever its shape."""
    return nbytes == DTYPES[dtype].size and all(size == 1 for size in shape)
