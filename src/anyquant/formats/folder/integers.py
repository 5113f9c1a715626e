"""Integer grids in folders: what their names say, codes counted from 0 and around it, and what formats have in common.

GPTQ, AWQ, AutoRound      transposed, codes and zero-points counted from 0
ModelOpt, Quark           plain 8-bit integers beside their scales
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Bytes, Float32, from_float32_exactly
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.grid import Codes
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.extra import Extra
from anyquant.formats.folder.modules import Along, Stored
from anyquant.grids import grid as find_grid

NAME = re.compile(r"int([2-8])-(g[1-9]\d*|channel|tensor)(-asym)?(-f16)?")
LONG_RUNS = 256  # rows packed together: they lie side by side, and so fewer and longer pieces are written
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class IntegerGridName:
    """What the name of an integer grid says. `reach` of a scale: "g128", "channel" or "tensor"; `half`: scales are
    float16 numbers, not bfloat16 ones."""

    bits: int
    reach: str
    asymmetric: bool = False
    half: bool = False

    @property
    def grid(self) -> str:
        return f"int{self.bits}-{self.reach}{'-asym' if self.asymmetric else ''}{'-f16' if self.half else ''}"

    @property
    def group(self) -> int:
        """Columns of a group, 0 where a scale reaches over whole rows."""
        return int(self.reach[1:]) if self.reach.startswith("g") else 0

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return middle_of(self.bits)

    @property
    def highest(self) -> int:
        return (1 << self.bits) - 1

    @property
    def group_size(self) -> int:
        """As configs have it."""
        return self.group or -1

    def groups(self, columns: int) -> int:
        return columns // self.group if self.group else 1


def parse(grid: str, *, tensor: bool = False) -> IntegerGridName | None:
    """The parts of a grid's name, or None where it is no integer grid with scales by group or row.

    `tensor`: or with one scale for the matrix. Whether a grid has groups of this size is not asked.
    """
    match = NAME.fullmatch(grid)
    if match is None or (match[2] == "tensor" and not tensor):
        return None
    return IntegerGridName(int(match[1]), match[2], match[3] is not None, match[4] is not None)


def middle_of(bits: int) -> int:
    """The code of zero, counted from 0, on a symmetric grid."""
    return 1 << (bits - 1)


def unsigned(codes: Codes, bits: int) -> Bytes:
    """Codes counted from 0, uint8, as those of asymmetric grids are."""
    if codes.dtype == np.uint8:
        return codes
    return codes.view(np.uint8) + np.uint8(middle_of(bits))  # wraps around, as it should


def signed(codes: Bytes, bits: int) -> npt.NDArray[np.int8]:
    """Codes counted from the middle, int8, from those counted from 0."""
    return (codes - np.uint8(middle_of(bits))).view(np.int8)  # wraps around, as it should


def zero_points(rows: QTensor, name: IntegerGridName) -> Bytes:
    """The code of zero of every group, uint8 (rows, groups)."""
    if name.asymmetric:
        return np.asarray(rows.params["zero"], dtype=np.uint8)
    return np.full(rows.params["scale"].shape, name.middle, dtype=np.uint8)


def from_unsigned(
    name: IntegerGridName, codes: Bytes, scale: Float32, zero: Bytes, order: npt.NDArray[np.int32] | None = None
) -> QTensor:
    """Codes counted from 0 on their grid. Raises BadInputError for zero-points that a symmetric grid does not have."""
    grid = find_grid(name.grid)
    if name.asymmetric:
        return QTensor(grid, codes.shape, codes, {"scale": scale, "zero": zero}, order)
    if (zero != name.middle).any():
        wrong = int(zero[zero != name.middle][0])
        raise BadInputError(
            f"a zero-point is {wrong}, and the settings say that {name.bits}-bit weights are symmetric around "
            f"{name.middle}; correct the settings"
        )
    return QTensor(grid, codes.shape, signed(codes, name.bits), {"scale": scale}, order)


def exact_scales(values: Float32, dtype: str = "F16") -> Bytes:
    """The bytes of `values` as F16 or BF16. Raises UnsupportedError for what that cannot hold."""
    stored, lost = from_float32_exactly(values, dtype)
    if lost.any():
        wrong = float(values.reshape(-1)[lost][0])
        raise UnsupportedError(
            f"a scale is {wrong:.9g}, which {dtype} cannot hold; quantize to a grid with -f16 in its name"
        )
    return stored


def transposed(values: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    return np.ascontiguousarray(values.T)


@dataclass(frozen=True)
class Int8Layout:
    """Symmetric integers with one scale per row or for the matrix ("int8-channel", "int8-tensor"): `weight` I8 (out,
    in), `weight_scale` F32 (out,) or ()."""

    grid: str = "int8-channel"
    extras: tuple[Extra, ...] = ()
    quantized: bool = True
    row_multiple: int = 1

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        whole = self.grid == "int8-tensor"
        return [
            Stored("weight", "I8", (rows, columns)),
            Stored("weight_scale", "F32", () if whole else (rows,), Along.ONCE if whole else Along.ROWS),
            *(extra.stored(rows, columns) for extra in self.extras),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        scale = np.ascontiguousarray(rows.params["scale"], dtype="<f4").reshape(-1).view(np.uint8)
        return [np.ascontiguousarray(rows.codes).view(np.uint8), scale, *(extra.bytes(shape) for extra in self.extras)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Raises BadInputError for a scale that is no number."""
        codes = raw[0].view(np.int8).reshape(rows, shape[1])
        scale = finite_scales(raw[1], 1 if self.grid == "int8-tensor" else rows)
        return QTensor(find_grid(self.grid), codes.shape, codes, {"scale": scale})


def finite_scales(raw: Bytes, rows: int) -> Float32:
    """Scales (rows, groups) from float32 bytes. Raises BadInputError for one that is no number."""
    scale: Float32 = raw.view("<f4").reshape(rows, -1)
    if not np.isfinite(scale).all():
        raise BadInputError("weight_scale holds a value that is not finite")
    return scale
