"""How the weight of a module on a grid lies in tensors, for each of the library's ways of storing.

    pack-quantized          integers of 2 to 8 bits in 32-bit words
    int-quantized           integers, one byte each: what engines multiply with rounded activations
    float-quantized         FP8
    nvfp4-pack-quantized    NVFP4, two codes to a byte
    mxfp4-pack-quantized    MXFP4
    mxfp8-quantized         MXFP8

Source: compressed-tensors 0.19, compressors/; the library itself is the oracle of the tests.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anyquant.core.dtypes import Bytes, Float32, from_float32_exactly, to_float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.grid import Codes, Grid
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.integers import IntegerGridName, parse, signed, transposed, unsigned
from anyquant.formats.folder.modules import FLOATS, Along, ModuleLayout, Stored, refuse_reordered
from anyquant.formats.folder.packing import pack_bits, packed_words, to_words, unpack_bits
from anyquant.grids import grid as find_grid

NAME = "compressed-tensors"  # which has no order of columns since 0.18
FP8 = re.compile(r"fp8_e4m3-(tensor|channel|block)")
PLAIN = ":plain"  # behind the name of an integer grid: one byte each
TILE = 128  # rows and columns of a block of fp8_e4m3-block
HOLDS = (
    f"{', '.join(FLOATS)}, int2 to int8 (-gN, -channel, -asym, -f16), fp8_e4m3 (-tensor, -channel, -block), "
    "nvfp4, mxfp4, mxfp8_e4m3"
)


class Layout(ModuleLayout, Protocol):
    """A layout of this format; `format` is the library's name of it."""

    @property
    def format(self) -> str: ...

    def arguments(self) -> Mapping[str, Any]:
        """The `weights` entry of a config group (compressed_tensors.quantization.QuantizationArgs)."""
        ...


@dataclass(frozen=True)
class IntegerLayout:
    """Integers in groups of columns of a row, or whole rows: weight = scale * (code - zero).

    Codes lie biased by 2^(bits - 1), the first column lowest, rows filled up to whole words. Scales are bfloat16 or
    float16, as the grid has them. Zero-points lie packed along the rows. A last tensor holds the shape.
    """

    name: IntegerGridName
    quantized: bool = True
    format: str = "pack-quantized"

    @property
    def grid(self) -> str:
        return self.name.grid

    @property
    def row_multiple(self) -> int:
        """Rows whose zero-points share words."""
        return 32 // self.name.bits if self.name.asymmetric else 1

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        groups = self.name.groups(columns)
        found = [
            Stored("weight_packed", "I32", (rows, packed_words(columns, self.name.bits))),
            Stored("weight_scale", SCALES[self.name.half], (rows, groups)),
        ]
        if self.name.asymmetric:
            words = packed_words(rows, self.name.bits)
            found.append(Stored("weight_zero_point", "I32", (words, groups), per=self.row_multiple))
        return [*found, Stored("weight_shape", "I64", (2,), Along.ONCE)]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, NAME)
        bits = self.name.bits
        words = to_words(pack_bits(unsigned(rows.codes, bits), bits), packed_words(shape[1], bits))
        found = [words, scale_bytes(rows.params["scale"], self.name.half)]
        if self.name.asymmetric:
            zero = transposed(rows.params["zero"])
            packed = to_words(pack_bits(zero, bits), packed_words(zero.shape[1], bits))
            found.append(transposed(packed.view("<u4")).view(np.uint8))
        return [*found, np.array(shape, dtype="<i8").view(np.uint8)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        codes = unpack_bits(raw[0].reshape(rows, -1), self.name.bits, shape[1])
        params: dict[str, Codes] = {"scale": to_float32(raw[1], SCALES[self.name.half]).reshape(rows, -1)}
        if self.name.asymmetric:
            groups = params["scale"].shape[1]
            words = transposed(raw[2].view("<u4").reshape(-1, groups)).view(np.uint8)
            params["zero"] = transposed(unpack_bits(words, self.name.bits, rows))
        _expect_shape(raw[-1], shape)
        ours = codes if self.name.asymmetric else signed(codes, self.name.bits)
        return QTensor(find_grid(self.grid), (rows, shape[1]), ours, params)

    def arguments(self) -> Mapping[str, Any]:
        return _integer_arguments(self.name)


@dataclass(frozen=True)
class PlainIntegerLayout:
    """Symmetric integers, a byte each, with a scale per group, per row or per module: bfloat16 or float16, as the grid
    has them."""

    name: IntegerGridName
    quantized: bool = True
    row_multiple: int = 1
    format: str = "int-quantized"

    @property
    def grid(self) -> str:
        return self.name.grid

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        scale = SCALES[self.name.half]
        found = Stored("weight_scale", scale, (rows, self.name.groups(columns)))
        if self.name.reach == "tensor":
            found = Stored("weight_scale", scale, (1,), Along.ONCE)
        return [Stored("weight", "I8", (rows, columns)), found]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, NAME)
        codes = np.ascontiguousarray(rows.codes, dtype=np.int8)
        return [codes.view(np.uint8), scale_bytes(rows.params["scale"], self.name.half)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        scale = to_float32(raw[1], SCALES[self.name.half])
        scale = scale.reshape(1 if self.name.reach == "tensor" else rows, -1)
        codes = raw[0].view(np.int8).reshape(rows, shape[1])
        return QTensor(find_grid(self.grid), (rows, shape[1]), codes, {"scale": scale})

    def arguments(self) -> Mapping[str, Any]:
        return _integer_arguments(self.name)


@dataclass(frozen=True)
class Float8Layout:
    """E4M3 values with a float32 scale per module, row, or block of 128 x 128."""

    reach: str
    quantized: bool = True
    format: str = "float-quantized"

    @property
    def grid(self) -> str:
        return f"fp8_e4m3-{self.reach}"

    @property
    def row_multiple(self) -> int:
        return TILE if self.reach == "block" else 1

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        scales = {
            "tensor": Stored("weight_scale", "F32", (1,), Along.ONCE),
            "channel": Stored("weight_scale", "F32", (rows, 1)),
            "block": Stored("weight_scale", "F32", (-(-rows // TILE), -(-columns // TILE)), per=TILE),
        }
        return [Stored("weight", "F8_E4M3", (rows, columns)), scales[self.reach]]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, NAME)
        return [np.ascontiguousarray(rows.codes), _float32(rows.params["scale"])]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        high = {"tensor": 1, "channel": rows, "block": -(-rows // TILE)}[self.reach]
        scale = raw[1].view("<f4").reshape(high, -1)
        return QTensor(find_grid(self.grid), (rows, shape[1]), raw[0].reshape(rows, shape[1]), {"scale": scale})

    def arguments(self) -> Mapping[str, Any]:
        return {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": self.reach,
            "group_size": None,
            "block_structure": [TILE, TILE] if self.reach == "block" else None,
            "dynamic": False,
        }


@dataclass(frozen=True)
class SmallFloatLayout:
    """NVFP4 and MXFP4: two codes to a byte, the first column low; MXFP8: a byte each. Scales as the grids have them."""

    grid: str
    format: str
    quantized: bool = True
    row_multiple: int = 1

    @property
    def _found(self) -> Grid:
        return find_grid(self.grid)

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        bits, group = self._found.code_bits, self._found.block[1]
        name, kind = ("weight", "F8_E4M3") if bits == 8 else ("weight_packed", "U8")
        scale = "F8_E4M3" if self.grid == "nvfp4" else "U8"
        found = [
            Stored(name, kind, (rows, columns * bits // 8)),
            Stored("weight_scale", scale, (rows, columns // group)),
        ]
        if self.grid == "nvfp4":
            found.append(Stored("weight_global_scale", "F32", (1,), Along.ONCE))
        return found

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, NAME)
        found = [pack_bits(rows.codes, self._found.code_bits), np.ascontiguousarray(rows.params["scale"])]
        if self.grid == "nvfp4":
            found.append(_float32(rows.params["global_scale"]))
        return found

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        codes = unpack_bits(raw[0].reshape(rows, -1), self._found.code_bits, shape[1])
        params = {"scale": raw[1].reshape(rows, -1)}
        if self.grid == "nvfp4":
            params["global_scale"] = raw[2].view("<f4").reshape(1, 1)
        return QTensor(self._found, (rows, shape[1]), codes, params)

    def arguments(self) -> Mapping[str, Any]:
        return {
            "num_bits": self._found.code_bits,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group" if self.grid == "nvfp4" else "group",
            "group_size": self._found.block[1],
            "dynamic": False,
            "scale_dtype": "torch.float8_e4m3fn" if self.grid == "nvfp4" else "torch.uint8",
        }


# the types of the scales of integers: as the grid has them, and with "-f16"
SCALES = ("BF16", "F16")
SMALL_FLOATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8_e4m3": "mxfp8-quantized",
}


def _integer_arguments(name: IntegerGridName) -> Mapping[str, Any]:
    return {
        "num_bits": name.bits,
        "type": "int",
        "symmetric": not name.asymmetric,
        "strategy": "group" if name.group else name.reach,
        "group_size": name.group or None,
        "dynamic": False,
        "actorder": None,
    }


def _float32(values: Float32) -> Bytes:
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)


def _expect_shape(raw: Bytes, shape: tuple[int, int]) -> None:
    stored = tuple(raw.view("<i8").tolist())
    if stored != shape:
        raise BadInputError(f"a module's weight_shape says {stored}, its tensors hold {shape}")


def scale_bytes(values: Float32, half: bool) -> Bytes:
    """The bytes of scales. Raises UnsupportedError for what their type cannot hold: the grid would not mean what is
    stored."""
    stored, lost = from_float32_exactly(values, SCALES[half])
    if lost.any():
        kind = "float16" if half else "bfloat16"
        raise UnsupportedError(f"a scale of the grid is not a {kind} number; compressed-tensors cannot hold it so")
    return stored.reshape(len(values), -1)


def layout(name: str) -> Layout:
    """The layout of a grid, or of an integer grid with ":plain" behind it.

    Raises UnsupportedError for a grid that the format cannot hold.
    """
    if name in SMALL_FLOATS:
        return SmallFloatLayout(name, SMALL_FLOATS[name])
    if match := FP8.fullmatch(name):
        return Float8Layout(match[1])
    plain = name.endswith(PLAIN)
    found = parse(name.removesuffix(PLAIN), tensor=plain)
    if found is None:
        raise UnsupportedError(f"compressed-tensors has no place for grid {name!r}; it holds {HOLDS}")
    if found.asymmetric and (plain or 32 % found.bits):
        what = "as bytes, for rounded activations" if plain else f"of {found.bits} bits"
        raise UnsupportedError(
            f"compressed-tensors: {name.removesuffix(PLAIN)} {what}: engines read no zero-points there; "
            "use a symmetric grid"
        )
    return PlainIntegerLayout(found) if plain else IntegerLayout(found)
