"""How integers lie packed along the input axis: what AutoGPTQ, GPTQModel and AutoRound write.

    qweight   int32 (in * bits / 32, out)        codes of a column of the transposed matrix, the lowest bits first
    qzeros    int32 (groups, out * bits / 32)    zero-points, packed along the outputs
    scales    float16 (groups, out)
    g_idx     int32 (in,)                        the group of each input

weight[o, i] = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o]). Codes are unsigned; a symmetric grid has the
zero-point 2^(bits - 1) everywhere. Widths that do not divide 32 straddle words.

Version 1 ("gptq") stores zero - 1 and so has no place for 0: one packer lets it wrap to the largest code, another lets
it borrow from its neighbour, readers disagree just the same. Version 2 ("gptq_v2") stores the zero-point itself.

Source: GPTQModel 7.6, nn_modules/qlinear (pack_original) and utils/model.py (convert_gptq_v1_to_v2_format_module);
auto-round 0.16, auto_round_extension/torch. What these write is the oracle of the tests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Bytes, to_float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.integers import (
    LONG_RUNS,
    IntegerGridName,
    exact_scales,
    from_unsigned,
    parse,
    transposed,
    unsigned,
    zero_points,
)
from anyquant.formats.folder.modules import Along, Stored
from anyquant.formats.folder.packing import pack_bits, unpack_bits


@dataclass(frozen=True)
class PackedInputs:
    """`version` of the zero-points: 1, 2, or 1 with `borrowing`: what version 1 lets a zero-point of 0 take from its
    neighbour is given back. `indexed`: there is a g_idx; `ordered`: it may put any inputs into one group. `scales`:
    their safetensors type.
    """

    name: IntegerGridName
    version: int
    borrowing: bool = False
    indexed: bool = True
    ordered: bool = False
    scales: str = "F16"
    quantized: bool = True
    row_multiple: int = LONG_RUNS

    @property
    def grid(self) -> str:
        return self.name.grid

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        bits, groups = self.name.bits, self.name.groups(columns)
        steps = bits // math.gcd(bits, 32)
        found = [
            Stored("qweight", "I32", (columns * bits // 32, rows), Along.COLUMNS),
            Stored("qzeros", "I32", (groups, rows * bits // 32), Along.COLUMNS, steps * 32 // bits, steps),
            Stored("scales", self.scales, (groups, rows), Along.COLUMNS),
        ]
        return [*found, Stored("g_idx", "I32", (columns,), Along.ONCE)] if self.indexed else found

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for scales that float16 cannot hold, a zero-point of 0 in version 1, and reordered
        columns that the layout has no place for."""
        if rows.column_groups is not None and not self.ordered:
            raise UnsupportedError(f"reordered columns (act-order) need a layout with g_idx, not {self.grid}")
        words = pack_bits(unsigned(rows.codes, self.name.bits), self.name.bits).view("<u4")
        zero = zero_points(rows, self.name)
        if self.version == 1:
            if not zero.all():
                raise UnsupportedError(
                    "a zero-point is 0, for which version 1 of GPTQ (zero-points less 1) has no place; "
                    "use version 2, or AWQ"
                )
            zero = zero - np.uint8(1)
        found = [
            transposed(words).view(np.uint8),
            pack_bits(transposed(zero), self.name.bits),
            exact_scales(transposed(rows.params["scale"]), self.scales),
        ]
        if self.indexed:
            found.append(np.ascontiguousarray(self._index(rows), dtype="<i4").view(np.uint8))
        return found

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Raises BadInputError for zero-points that contradict the settings, and for a g_idx that is none."""
        groups = self.name.groups(shape[1])
        words = transposed(raw[0].view("<u4").reshape(-1, rows)).view(np.uint8)
        codes = unpack_bits(words, self.name.bits, shape[1])
        scale = transposed(to_float32(raw[2], self.scales).reshape(groups, rows))
        zero = transposed(self._stored_zeros(raw[1].reshape(groups, -1), rows))
        order = self._order(raw[3].view("<i4"), groups) if self.indexed else None
        return from_unsigned(self.name, codes, scale, zero, order)

    def _stored_zeros(self, packed: Bytes, rows: int) -> Bytes:
        """Zero-points (groups, rows) from their words."""
        bits = self.name.bits
        if self.borrowing and 32 % bits == 0:
            ones = sum(1 << place for place in range(0, 32, bits))
            packed = (np.ascontiguousarray(packed).view("<u4") + np.uint32(ones)).view(np.uint8)
            return unpack_bits(packed, bits, rows)
        found = unpack_bits(packed, bits, rows)
        if self.borrowing:  # widths that straddle words wrap instead
            return (found + np.uint8(1)) & np.uint8(self.name.highest)
        if self.version == 2:
            return found
        if (found == self.name.highest).any():
            raise BadInputError(
                f"a stored zero-point is {self.name.highest} in version 1 of GPTQ, which readers take for 0 or for "
                f"{self.name.highest + 1}; write the folder anew as gptq_v2 with the tool that made it"
            )
        return found + np.uint8(1)

    def _index(self, rows: QTensor) -> npt.NDArray[np.int32]:
        if rows.column_groups is None:
            return natural(rows.shape[1], self.name.groups(rows.shape[1]))
        return rows.column_groups

    def _order(self, index: npt.NDArray[np.int32], groups: int) -> npt.NDArray[np.int32] | None:
        """The groups of the columns, or None where they follow each other."""
        if np.array_equal(index, natural(len(index), groups)):
            return None
        if index.min() < 0 or index.max() >= groups:
            wrong = int(index[(index < 0) | (index >= groups)][0])
            raise BadInputError(f"g_idx names group {wrong}, there are {groups}")
        counts = np.bincount(index, minlength=groups)
        if (counts != len(index) // groups).any():
            odd = int(np.flatnonzero(counts != len(index) // groups)[0])
            raise BadInputError(f"g_idx puts {counts[odd]} inputs into group {odd}, its size is {len(index) // groups}")
        return index.astype(np.int32)


def natural(columns: int, groups: int) -> npt.NDArray[np.int32]:
    """The group of each column where groups follow each other."""
    return (np.arange(columns) // (columns // groups)).astype(np.int32)


def layout(variant: str) -> PackedInputs | None:
    """The layout of a grid's name with flags behind it: ":2" or ":1", ":borrowing", ":order" or ":bare", ":bf16".

    Without a version it is the one that holds all of the grid. None where the grid is no integer grid with scales by
    group or row.
    """
    grid, *flags = variant.split(":")
    name = parse(grid)
    if name is None:
        return None
    return PackedInputs(
        name,
        version=2 if "2" in flags or (name.asymmetric and "1" not in flags) else 1,
        borrowing="borrowing" in flags,
        indexed="bare" not in flags,
        ordered="order" in flags,
        scales="BF16" if "bf16" in flags else "F16",
    )
