"""How AWQ's GEMM version lays out 4-bit integers: packed along the outputs, eight to a word in an order of its own.

    qweight   int32 (in, out / 8)        nibble i of a word, from the lowest, holds output 8 * word + ORDER[i]
    qzeros    int32 (groups, out / 8)    zero-points, in the same order, as they are
    scales    float16 (groups, out)

weight[o, i] = scales[i // group, o] * (code[o, i] - zero[i // group, o]). A symmetric grid has the zero-point 8.

Source: GPTQModel 7.6, quantization/awq/utils/packing_utils.py and nn_modules/qlinear/gemm_awq.py (the loops of
AutoAWQ); auto-round 0.16, export/export_to_awq/utils.py. What these write is the oracle of the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Bytes, to_float32
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
from anyquant.formats.folder.modules import Along, Stored, refuse_reordered
from anyquant.formats.folder.packing import pack_bits, unpack_bits

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = tuple(int(place) for place in np.argsort(ORDER))  # where each output lies
EACH = len(ORDER)


@dataclass(frozen=True)
class PackedOutputs:
    """`scales`: their safetensors type."""

    name: IntegerGridName
    scales: str = "F16"
    quantized: bool = True
    row_multiple: int = LONG_RUNS

    @property
    def grid(self) -> str:
        return self.name.grid

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        groups = self.name.groups(columns)
        return [
            Stored("qweight", "I32", (columns, rows // EACH), Along.COLUMNS, EACH),
            Stored("qzeros", "I32", (groups, rows // EACH), Along.COLUMNS, EACH),
            Stored("scales", self.scales, (groups, rows), Along.COLUMNS),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for scales that float16 cannot hold, and for reordered columns."""
        refuse_reordered(rows, "AWQ")
        return [
            _interleaved(transposed(unsigned(rows.codes, BITS))),
            _interleaved(transposed(zero_points(rows, self.name))),
            exact_scales(transposed(rows.params["scale"]), self.scales),
        ]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Raises BadInputError for zero-points that a symmetric grid does not have."""
        groups = self.name.groups(shape[1])
        codes = transposed(_in_order(raw[0].reshape(shape[1], -1), rows))
        zero = transposed(_in_order(raw[1].reshape(groups, -1), rows))
        scale = transposed(to_float32(raw[2], self.scales).reshape(groups, rows))
        return from_unsigned(self.name, codes, scale, zero)


def _interleaved(codes: Bytes) -> Bytes:
    """(n, outputs) codes as (n, outputs / 2) bytes."""
    words = codes.reshape(len(codes), -1, EACH)[:, :, ORDER]
    return pack_bits(words.reshape(len(codes), -1), BITS)


def _in_order(packed: Bytes, outputs: int) -> Bytes:
    """Inverse of `_interleaved`."""
    words = unpack_bits(packed, BITS, outputs).reshape(len(packed), -1, EACH)[:, :, PLACES]
    return words.reshape(len(packed), outputs)


def layout(variant: str) -> PackedOutputs | None:
    """The layout of a grid's name, perhaps with ":bf16" behind it; None where AWQ has no place for the grid."""
    grid, *flags = variant.split(":")
    name = parse(grid)
    if name is None or name.bits != BITS:
        return None
    return PackedOutputs(name, "BF16" if "bf16" in flags else "F16")
