"""How the hqq package stores a matrix: groups as rows of one tensor, halves, quarters or tenths of it in one word.

Source: hqq 0.2.8, core/bitpack.py, core/quantize.py (HQQLinear.state_dict) and core/utils.py (encode_safetensor_type);
the package itself is the oracle of the tests.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import DTYPES, Bytes, Float32, from_float32_exactly, to_float32
from anyquant.core.errors import UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.integers import middle_of, parse, signed, unsigned
from anyquant.formats.folder.modules import FLOATS, Along, Stored, refuse_reordered
from anyquant.grids import grid as find_grid

FLOAT_ZERO = re.compile(r"hqq([1234568])-g(\d+)")
WHOLE = 1 << 30  # more rows than any matrix has
TORCH_NAMES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


@dataclass(frozen=True)
class Packing:
    """`parts` equal parts of the groups lie in one element of type `dtype`, the first in its highest bits, each `bits`.

    The last part is filled up with zeros where the groups are not a multiple.
    """

    name: str
    dtype: str
    parts: int
    bits: int
    padded: bool = False

    def pack(self, codes: Bytes) -> Bytes:
        """(groups, group) as bytes of (groups / parts, group) elements."""
        count = -(-len(codes) // self.parts)
        numpy_type = DTYPES[self.dtype].numpy
        wide = np.zeros((self.parts * count, codes.shape[1]), dtype=numpy_type)
        wide[: len(codes)] = codes
        packed = np.zeros((count, codes.shape[1]), dtype=numpy_type)
        for part in range(self.parts):
            packed |= wide[part * count : (part + 1) * count] << wide.dtype.type(self.bits * (self.parts - 1 - part))
        return packed.view(np.uint8)

    def unpack(self, raw: Bytes, groups: int, group: int) -> Bytes:
        """Inverse of `pack`."""
        packed: npt.NDArray[np.int32] = raw.view(DTYPES[self.dtype].numpy).reshape(-1, group)
        mask = packed.dtype.type((1 << self.bits) - 1)
        parts = [
            (packed >> packed.dtype.type(self.bits * (self.parts - 1 - part))) & mask for part in range(self.parts)
        ]
        return np.concatenate(parts)[:groups].astype(np.uint8)


PACKINGS = {
    one.name: one
    for one in (
        Packing("8bit_u8", "U8", 1, 8),
        Packing("4bit_u8", "U8", 2, 4),
        Packing("3bit_32", "I32", 10, 3, padded=True),
        Packing("2bit_u8", "U8", 4, 2),
        Packing("1bit_u8", "U8", 8, 1),
    )
}
OF_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


@dataclass(frozen=True)
class GroupLayout:
    """weight = (code - zero) * scale, both stored in type `dtype` for a group of columns of a row (axis 1).

    Of a symmetric grid the zero-point is the middle level. `group` 0 is the whole row. `storage`: the type as which the
    packed tensor is viewed, where it is another one. Small tensors beside them are facts that the package decodes;
    `found` are those of a folder that has other ones than we write.
    """

    grid: str
    bits: int
    group: int
    dtype: str = "BF16"
    storage: str = ""
    found: tuple[Stored, ...] = ()
    quantized: bool = True

    @property
    def packing(self) -> Packing:
        return PACKINGS[OF_BITS[self.bits]]

    @property
    def row_multiple(self) -> int:
        """All rows at once, where the first is stored with one of the middle."""
        return 1 if self.packing.parts == 1 else WHOLE

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        group, kind = self.group or columns, self.packing
        groups = rows * columns // group
        packed = -(-groups // kind.parts)
        along = (1, columns // group) if kind.parts == 1 else (rows, packed)
        storage = self.storage or kind.dtype
        wide = group * DTYPES[kind.dtype].size // DTYPES[storage].size
        facts = [Stored(name, dtype, size, Along.ONCE) for name, dtype, size, _ in self._facts((rows, columns))]
        return [
            Stored("W_q", storage, (packed, wide), Along.ROWS, *along),
            Stored("scale", self.dtype, (groups, 1), Along.ROWS, 1, columns // group),
            Stored("zero", self.dtype, (groups, 1), Along.ROWS, 1, columns // group),
            *(self.found or facts),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for parameters that the stored type does not hold."""
        refuse_reordered(rows, "HQQ")
        if self.packing.parts > 1 and rows.shape[0] != shape[0]:
            raise UnsupportedError(f"HQQ packs {self.bits} bits of a whole matrix, and these are some of its rows")
        scale = rows.params["scale"]
        zero = rows.params["zero"] if "zero" in rows.params else np.full_like(scale, middle_of(self.bits))
        packed = self.packing.pack(unsigned(rows.codes, self.bits).reshape(-1, self.group or shape[1]))
        raw = [packed, self._exact(scale, "scale"), self._exact(zero.astype(np.float32), "zero-point")]
        return [*raw, *(data for *_, data in self._facts(shape))]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        group = self.group or shape[1]
        codes = self.packing.unpack(raw[0], rows * shape[1] // group, group).reshape(rows, shape[1])
        scale, zero = (to_float32(one, self.dtype).reshape(rows, -1) for one in raw[1:3])
        grid = find_grid(self.grid)
        names = {parameter.name: parameter.dtype for parameter in grid.parameters}
        if "zero" in names:
            return QTensor(grid, (rows, shape[1]), codes, {"scale": scale, "zero": zero.astype(names["zero"])})
        return QTensor(grid, (rows, shape[1]), signed(codes, self.bits), {"scale": scale})

    def _exact(self, values: Float32, what: str) -> Bytes:
        raw, lost = from_float32_exactly(values, self.dtype)
        if lost.any():
            raise UnsupportedError(f"a {what} of the grid is not a number of type {self.dtype}; HQQ cannot hold it so")
        return raw

    def _facts(self, shape: tuple[int, int]) -> list[tuple[str, str, tuple[int, ...], Bytes]]:
        """(name, type, shape, bytes) of what HQQLinear's state says besides."""
        group = self.group or shape[1]
        numbers = {"nbits": self.bits, "group_size": group, "axis": 1}
        view = "torch.int32" if self.packing.dtype == "I32" else "torch.uint8"
        texts = {"packing": self.packing.name, "unpack_view_dtype": view, "compute_dtype": TORCH_NAMES[self.dtype]}
        flags = dict.fromkeys(("encoded_state_dict", "stores_quant_config", "channel_wise", "round_zero"), 1)
        flags |= dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta", "optimize"), 0)
        return [
            *((name, "I32", (), np.array([value], "<i4").view(np.uint8)) for name, value in numbers.items()),
            *((name, "U8", (), np.array([value], np.uint8)) for name, value in flags.items()),
            *((name, "U8", (len(text),), np.frombuffer(text.encode(), np.uint8)) for name, text in texts.items()),
            ("shape", "I64", (2,), np.array(shape, "<i8").view(np.uint8)),
        ]


def layout(name: str) -> GroupLayout:
    """The layout of a grid. Raises UnsupportedError for a grid that the format cannot hold."""
    whole, free = parse(name), FLOAT_ZERO.fullmatch(name)
    if whole is not None and whole.bits in OF_BITS:
        return GroupLayout(name, whole.bits, whole.group, "F16" if whole.half else "BF16")
    if free is not None:
        return GroupLayout(name, int(free[1]), int(free[2]), "F32")
    raise UnsupportedError(
        f"HQQ has no place for grid {name!r}; it holds: {', '.join(FLOATS)}, int2 to int6 and int8 (-gN or -channel, "
        "each with -asym and -f16)"
    )
