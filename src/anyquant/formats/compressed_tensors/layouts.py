"""How the weight of a module on a grid lies in tensors: `pack-quantized` for integers.

Source: compressed-tensors 0.19, compressors/pack_quantized; the library itself is the oracle of the tests.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.dtypes import Bytes, Float32, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.errors import UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.modules import FLOATS, Along, Stored
from anyquant.formats.folder.packing import pack_bits, packed_words, to_words, unpack_bits
from anyquant.grids import grid as find_grid

INTEGER = re.compile(r"int([48])-g(\d+)")


@dataclass(frozen=True)
class IntegerLayout:
    """Symmetric integers of `bits` in groups of `group` columns of a row: weight = code * scale.

    Codes lie biased by 2^(bits - 1) in little-endian words, the first column lowest. Scales are bfloat16, which the
    grid's stored scales fit exactly. A third tensor holds the shape.
    """

    bits: int
    group: int
    quantized: bool = True
    row_multiple: int = 1
    format: str = "pack-quantized"

    @property
    def grid(self) -> str:
        return f"int{self.bits}-g{self.group}"

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        return [
            Stored("weight_packed", "I32", (rows, packed_words(columns, self.bits))),
            Stored("weight_scale", "BF16", (rows, columns // self.group)),
            Stored("weight_shape", "I64", (2,), Along.ONCE),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for scales that bfloat16 cannot hold: the grid would not mean what is stored."""
        refuse_reordered(rows)
        biased = (rows.codes.astype(np.int16) + (1 << (self.bits - 1))).astype(np.uint8)
        words = to_words(pack_bits(biased, self.bits), packed_words(shape[1], self.bits))
        return [words, exact_bfloat16(rows.params["scale"]), np.array(shape, dtype="<i8").view(np.uint8)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        biased = unpack_bits(raw[0].reshape(rows, -1), self.bits, shape[1])
        codes = (biased.astype(np.int16) - (1 << (self.bits - 1))).astype(np.int8)
        scale = bfloat16_to_float32(raw[1].view("<u2")).reshape(rows, -1)
        return QTensor(find_grid(self.grid), (rows, shape[1]), codes, {"scale": scale})

    def arguments(self) -> Mapping[str, Any]:
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


def exact_bfloat16(values: Float32) -> Bytes:
    """The bytes of `values` as bfloat16. Raises UnsupportedError for what that cannot hold."""
    stored = float32_to_bfloat16(np.ascontiguousarray(values, dtype=np.float32))
    if not np.array_equal(bfloat16_to_float32(stored), values):
        raise UnsupportedError("a scale of the grid is not a bfloat16 number; compressed-tensors cannot hold it")
    return stored.astype("<u2").view(np.uint8)


def refuse_reordered(rows: QTensor) -> None:
    """Raise UnsupportedError for columns in groups that do not follow each other."""
    if rows.column_groups is not None:
        raise UnsupportedError("reordered columns are not written to compressed-tensors yet")


def layout(grid_name: str) -> IntegerLayout:
    """The layout of a grid. Raises UnsupportedError for a grid that the format cannot hold."""
    match = INTEGER.fullmatch(grid_name)
    if match is None:
        raise UnsupportedError(
            f"compressed-tensors (pack-quantized) has no place for grid {grid_name!r}; it holds: "
            f"{', '.join(FLOATS)}, int4-gN and int8-gN"
        )
    return IntegerLayout(int(match[1]), int(match[2]))
