"""How the weight of a module on a grid lies in tensors: plain for a float grid, `pack-quantized` for an integer one.

Source: compressed-tensors 0.19, compressors/pack_quantized; the library itself is the oracle of the tests.
"""

import re
from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Bytes, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.errors import AnyQuantError, UnsupportedError
from anyquant.core.grid import Codes, Params

FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
# numpy types of the codes of the float grids: bit patterns
PATTERNS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
INTEGER = re.compile(r"int([48])-g(\d+)")


@dataclass(frozen=True)
class Stored:
    """One tensor of a module: its name behind the module's, its safetensors type, its shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FloatLayout:
    """The weight as it is, in safetensors type `dtype`."""

    dtype: str
    quantized = False

    def tensors(self, rows: int, columns: int) -> list[Stored]:
        return [Stored("weight", self.dtype, (rows, columns))]

    def row_bytes(self, columns: int) -> list[int]:
        """Bytes of a row in each tensor that has rows."""
        return [columns * np.dtype(PATTERNS[self.dtype]).itemsize]

    def pack(self, codes: Codes, params: Params) -> list[Bytes]:
        """One array of bytes (rows, row bytes) for each tensor that has rows."""
        return [np.ascontiguousarray(codes, dtype=PATTERNS[self.dtype]).view(np.uint8)]

    def unpack(self, raw: list[Bytes]) -> tuple[Params, Codes]:
        return {}, np.ascontiguousarray(raw[0]).view(PATTERNS[self.dtype])


@dataclass(frozen=True)
class IntegerLayout:
    """Symmetric integers of `bits` in groups of `group` columns of a row: weight = code * scale.

    Codes lie biased by 2^(bits - 1) in little-endian words, the first column lowest; with 4 or 8 bits that is: byte by
    byte. Scales are bfloat16, which the grid's stored scales fit exactly. A third tensor holds the shape.
    """

    bits: int
    group: int
    quantized = True

    @property
    def grid(self) -> str:
        return f"int{self.bits}-g{self.group}"

    def tensors(self, rows: int, columns: int) -> list[Stored]:
        return [
            Stored("weight_packed", "I32", (rows, columns * self.bits // 32)),
            Stored("weight_scale", "BF16", (rows, columns // self.group)),
            Stored("weight_shape", "I64", (2,)),
        ]

    def row_bytes(self, columns: int) -> list[int]:
        return [columns * self.bits // 8, columns // self.group * 2]

    def pack(self, codes: Codes, params: Params) -> list[Bytes]:
        """Raises AnyQuantError for scales that bfloat16 cannot hold: the grid would not mean what is stored."""
        biased = (codes.astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)
        packed = biased if self.bits == 8 else biased[:, 0::2] | (biased[:, 1::2] << 4)
        scale = np.ascontiguousarray(params["scale"], dtype=np.float32)
        stored = float32_to_bfloat16(scale)
        if not np.array_equal(bfloat16_to_float32(stored), scale):
            raise AnyQuantError("a scale of the grid is not a bfloat16 number; compressed-tensors cannot hold it")
        return [np.ascontiguousarray(packed), stored.astype("<u2").view(np.uint8)]

    def unpack(self, raw: list[Bytes]) -> tuple[Params, Codes]:
        packed, scales = raw
        biased = packed if self.bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        codes = (biased.astype(np.int16) - (1 << (self.bits - 1))).astype(np.int8)
        return {"scale": bfloat16_to_float32(np.ascontiguousarray(scales).view("<u2"))}, codes

    def arguments(self) -> dict[str, object]:
        """The `weights` entry of a config group (compressed_tensors.quantization.QuantizationArgs)."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
            "actorder": None,
        }


def layout(grid_name: str) -> FloatLayout | IntegerLayout:
    """The layout of a grid. Raises UnsupportedError for a grid that the pack-quantized format cannot hold."""
    if grid_name in FLOATS:
        return FloatLayout(FLOATS[grid_name])
    match = INTEGER.fullmatch(grid_name)
    if match is None:
        raise UnsupportedError(
            f"compressed-tensors (pack-quantized) has no place for grid {grid_name!r}; it holds: "
            f"{', '.join(FLOATS)}, int4-gN and int8-gN"
        )
    return IntegerLayout(int(match[1]), int(match[2]))
