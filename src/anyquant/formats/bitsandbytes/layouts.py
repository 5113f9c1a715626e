"""How bitsandbytes stores a matrix: four-bit tables over the flattened tensor, or eight-bit integers with row maxima.

Source: bitsandbytes 0.50, functional.py (QuantState.as_dict, from_dict), utils.py (pack_dict_to_tensor) and
nn/modules.py (Linear8bitLt._save_to_state_dict); the library itself is the oracle of the tests.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import DTYPES, Bytes, Float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.modules import FLOATS, Along, ModuleLayout, Stored, refuse_reordered
from anyquant.grids import grid as find_grid
from anyquant.grids.fourbit import TABLES

FOUR_BIT = re.compile(r"(nf4|fp4)-g(\d+)(-double)?")
INTEGER = "int8-channel"
STATE = "quant_state.bitsandbytes__"
GROUPS = (256, 128, 64, 32)  # of our grids; bitsandbytes' blocks may be longer, or not fit the rows
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ROW_ORDER = 0  # the only weight_format since bitsandbytes 0.45
HIGHEST = np.float32(127)
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Nested:
    """Maxima that are quantized themselves: maximum = map[code] * nested + offset, in blocks of `block` maxima."""

    block: int
    offset: float


@dataclass(frozen=True)
class TableLayout:
    """Sixteen levels times a maximum per `block` weights of the flattened matrix, "nf4-g64".

    weight: two codes in a byte, the first in the high half, as a column of bytes, or of elements of type `storage`.
    weight.absmax: the maxima; weight.quant_map: the levels; weight.quant_state...: JSON that says the rest.
    `state` are the bytes of that JSON where a folder has other ones than we write; `nested` maxima are only read.
    """

    kind: str
    block: int
    group: int
    storage: str = "U8"
    state: bytes = b""
    nested: Nested | None = None
    columns: int = 0
    quantized: bool = True

    @property
    def grid(self) -> str:
        return f"{self.kind}-g{self.group}"

    @property
    def row_multiple(self) -> int:
        """Rows that fill whole blocks, of weights and of maxima."""
        largest = self.block * (self.nested.block if self.nested else 1)
        return 1 if self.block == self.group and not self.nested else _fraction(self.columns, largest)[1]

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        weights, size = rows * columns, DTYPES[self.storage].size
        bytes_of_row, maxima = _fraction(columns, 2 * size), _fraction(columns, self.block)
        codes = Stored(
            "weight", self.storage, (-(-weights // (2 * size)), 1), Along.ROWS, bytes_of_row[1], bytes_of_row[0]
        )
        count = -(-weights // self.block)
        kind = "U8" if self.nested else "F32"
        found = [
            codes,
            Stored("weight.absmax", kind, (count,), Along.ROWS, maxima[1], maxima[0]),
            Stored("weight.quant_map", "F32", (16,), Along.ONCE),
            Stored(f"weight.{STATE}{self.kind}", "U8", (len(self._state((rows, columns))),), Along.ONCE),
        ]
        if self.nested:
            wide = _fraction(columns, self.block * self.nested.block)
            found += [
                Stored("weight.nested_absmax", "F32", (-(-count // self.nested.block),), Along.ROWS, wide[1], wide[0]),
                Stored("weight.nested_quant_map", "F32", (256,), Along.ONCE),
            ]
        return found

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, "bitsandbytes")
        packed = rows.codes[:, 0::2] << np.uint8(4) | rows.codes[:, 1::2]
        maxima = np.ascontiguousarray(rows.params["absmax"], dtype="<f4").view(np.uint8)
        levels = np.array(TABLES[self.kind], dtype="<f4") + np.float32(0)  # its map has no negative zero
        return [packed, maxima, levels.view(np.uint8), np.frombuffer(self._state(shape), dtype=np.uint8)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        packed = raw[0].reshape(rows, shape[1] // 2)
        codes = np.empty((rows, shape[1]), dtype=np.uint8)
        np.right_shift(packed, np.uint8(4), out=codes[:, 0::2])
        np.bitwise_and(packed, np.uint8(15), out=codes[:, 1::2])
        if not np.array_equal(raw[2].view("<f4"), np.array(TABLES[self.kind], dtype="<f4")):
            raise BadInputError(f"weight.quant_map holds other levels than those of {self.kind}")
        maxima = self._maxima(raw)
        if self.block != self.group:
            maxima = maxima[np.arange(rows * shape[1] // self.group) * self.group // self.block]
        params = {"absmax": np.ascontiguousarray(maxima.reshape(rows, -1), dtype=np.float32)}
        return QTensor(find_grid(self.grid), (rows, shape[1]), codes, params)

    def _maxima(self, raw: Sequence[Bytes]) -> Float32:
        """As bitsandbytes computes them: a product and a sum in float32, with the map that the folder brings."""
        if self.nested is None:
            return raw[1].view("<f4")
        levels, wide = raw[5].view("<f4"), raw[4].view("<f4")
        found: Float32 = levels[raw[1]] * np.repeat(wide, self.nested.block)[: raw[1].size]
        found += np.float32(self.nested.offset)
        return found

    def _state(self, shape: tuple[int, int]) -> bytes:
        """The JSON of our own folders. The type is that in which the weights are computed: float32, which rounds none
        of them; bitsandbytes goes on to the type of the activations."""
        if self.state:
            return self.state
        facts = {"quant_type": self.kind, "blocksize": self.block, "dtype": "float32", "shape": list(shape)}
        return json.dumps(facts).encode()


@dataclass(frozen=True)
class IntegerLayout:
    """Integers with a maximum per row, weight = code * SCB / 127, the grid "int8-channel".

    SCB = 127 * scale is exact, as scales have eight bits, and so is what bitsandbytes makes of it: code * SCB has at
    most 23 bits, and float32's 1/127 is nearer than half a rounding. Of other folders the scale is SCB / 127, rounded
    once, and a weight the same as bitsandbytes' to the last bit or two.
    `marked`: there is a weight_format.
    """

    marked: bool = True
    quantized: bool = True
    row_multiple: int = 1
    grid: str = INTEGER

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        found = [Stored("weight", "I8", (rows, columns)), Stored("SCB", "F32", (rows,))]
        return [*found, Stored("weight_format", "U8", (), Along.ONCE)] if self.marked else found

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for scales that do not come back from what is stored."""
        refuse_reordered(rows, "bitsandbytes")
        scale = rows.params["scale"]
        with np.errstate(over="ignore"):
            maxima = scale * HIGHEST
        largest = maxima.astype(np.float64)
        if not np.array_equal(largest, scale.astype(np.float64) * 127) or largest.max(initial=0) * 128 > LARGEST:
            raise UnsupportedError("a scale of the grid times 127 is not a float32 number; bitsandbytes cannot hold it")
        codes = np.ascontiguousarray(rows.codes).view(np.uint8)
        return [codes, np.ascontiguousarray(maxima, dtype="<f4").view(np.uint8), np.array([ROW_ORDER], dtype=np.uint8)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        if self.marked and raw[2][0] != ROW_ORDER:
            raise UnsupportedError(
                f"weight_format is {raw[2][0]}, an order for one kind of GPU; only {ROW_ORDER}, by rows, is read"
            )
        scale = (raw[1].view("<f4").astype(np.float64) / 127).astype(np.float32).reshape(rows, 1)
        return QTensor(find_grid(self.grid), (rows, shape[1]), raw[0].view(np.int8).reshape(rows, -1), {"scale": scale})


def layout(grid_name: str) -> ModuleLayout:
    """The layout of a grid. Raises UnsupportedError for a grid that the format cannot hold."""
    match = FOUR_BIT.fullmatch(grid_name)
    if match is not None and match[3]:
        raise UnsupportedError(
            f"bitsandbytes shares blocks of 256 maxima and their offset among rows, {grid_name} does not; write "
            f"{grid_name.removesuffix('-double')}, whose maxima are float32"
        )
    if match is not None and int(match[2]) in GROUPS:
        return TableLayout(match[1], int(match[2]), int(match[2]))
    if grid_name == INTEGER:
        return IntegerLayout()
    raise UnsupportedError(
        f"bitsandbytes has no place for grid {grid_name!r}; it holds: {', '.join(FLOATS)}, nf4-gN and fp4-gN (N "
        f"{', '.join(map(str, GROUPS))}) and {INTEGER}"
    )


def widest_group(columns: int, block: int) -> int:
    """Columns of the widest group of our grids that no end of a row or of a block divides; 0 if there is none."""
    common = math.gcd(columns, block)
    return next((group for group in GROUPS if common % group == 0), 0)


def _fraction(columns: int, unit: int) -> tuple[int, int]:
    """(steps, per): `per` rows of so many columns are `steps` units."""
    common = math.gcd(columns, unit)
    return columns // common, unit // common
