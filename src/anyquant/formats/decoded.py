"""An artifact as a Checkpoint: the source's own tensor names, every value decoded from the bytes that were written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from anyquant.core.checkpoint import TensorSpec
from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.core.linear import Carried, Linear
from anyquant.core.plan import EMPTY, Place, Unit
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture

BLOCK_WEIGHTS = 1 << 22  # decoded at a time


class Decoder(Protocol):
    """The part of a format that reads."""

    def slices(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int) -> list[Place]: ...

    def unpack(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int, parts: Mapping[str, Bytes]
    ) -> QTensor: ...


@dataclass(eq=False)
class DecodedArtifact:
    """`units` fill the artifact; `read(place)` gives bytes of a part, `carried(unit)` decoded values."""

    location: str
    architecture: Architecture
    units: tuple[Unit, ...]
    decoder: Decoder
    read: Callable[[Place], Bytes]
    carried: Callable[[Unit], Float32]
    config: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    metadata: Mapping[str, Any] = field(default_factory=lambda: EMPTY)

    @cached_property
    def _linears(self) -> dict[str, list[Linear]]:
        found: dict[str, list[Linear]] = {}
        for linear in self.architecture.linears:
            if linear.view.transposed:
                raise UnsupportedError(f"{linear.name}: a transposed matrix cannot be read back by rows yet")
            found.setdefault(linear.view.tensor, []).append(linear)
        return found

    @cached_property
    def _carried(self) -> dict[str, list[Carried]]:
        found: dict[str, list[Carried]] = {}
        for carried in self.architecture.carried:
            found.setdefault(carried.tensor, []).append(carried)
        return found

    @cached_property
    def _units(self) -> dict[str, Unit]:
        return {name: unit for unit in self.units for name in (*unit.linears, *unit.carried)}

    def names(self) -> Sequence[str]:
        return [*self._linears, *self._carried]

    def spec(self, name: str) -> TensorSpec:
        """Always "F32". A matrix of stacked experts is described as (all rows, columns)."""
        if name in self._linears:
            views = [linear.view for linear in self._linears[name]]
            shape: tuple[int, ...] = (max(view.start + view.rows for view in views), views[0].columns)
        elif name in self._carried:
            shape = (max(piece.start + piece.length for piece in self._carried[name]),)
        else:
            raise BadInputError(f"{self.location}: has no tensor {name!r}")
        return TensorSpec(name, "F32", shape, 4 * int(np.prod(shape)))

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        """Decoded rows [start, stop) as float32; see core.checkpoint.Checkpoint."""
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.rows or buffer.nbytes != (stop - start) * spec.row_length * 4:
            raise AnyQuantError(f"{name}: rows [{start}, {stop}) do not fit the tensor or the buffer")
        values = buffer.reshape(-1).view(np.float32).reshape(stop - start, spec.row_length)
        for piece in self._carried.get(name, []):
            if stop > start:
                values[0, piece.start : piece.start + piece.length] = self.carried(self._units[piece.name])
        for linear in self._linears.get(name, []):
            first = max(start - linear.view.start, 0)
            last = min(stop - linear.view.start, linear.view.rows)
            if first < last:
                place = linear.view.start + first - start
                self._decode(linear, first, last, values[place : place + last - first])

    def grid_of(self, tensor: str) -> str | None:
        """The grid of a tensor all of whose Linears lie on one, other than a float grid; None for any other."""
        grids = {self._units[linear.name].grid for linear in self._linears.get(tensor, [])}
        grid = grids.pop() if len(grids) == 1 else None
        return None if grid is None or find_grid(grid).family == "floating" else grid

    def quantized_rows(self, tensor: str, start: int, stop: int) -> QTensor:
        """Rows [start, stop) of a tensor, all of one Linear."""
        linear = next(
            one for one in self._linears[tensor] if one.view.start <= start and stop <= one.view.start + one.view.rows
        )
        first, last = start - linear.view.start, stop - linear.view.start
        multiple = self._units[linear.name].row_multiple
        low, high = first // multiple * multiple, min(-(-last // multiple) * multiple, linear.view.rows)
        return self._unpacked(linear, low, high).rows(first - low, last - low)

    def text_file(self, name: str) -> bytes | None:
        """None: the small files belong to the source."""
        return None

    def _decode(self, linear: Linear, first: int, last: int, out: Float32) -> None:
        """Rows [first, last) of a Linear, in blocks that the format can unpack on their own."""
        unit = self._units[linear.name]
        multiple = unit.row_multiple
        step = max(BLOCK_WEIGHTS // linear.view.columns // multiple, 1) * multiple
        for begin in range(first // multiple * multiple, last, step):
            end = min(begin + step, linear.view.rows)
            rows = self._unpacked(linear, begin, end).decode()
            low, high = max(begin, first), min(end, last)
            out[low - first : high - first] = rows[low - begin : high - begin]

    def _unpacked(self, linear: Linear, begin: int, end: int) -> QTensor:
        """Rows [begin, end) of a Linear, multiples of what the format permutes or packs together."""
        unit = self._units[linear.name]
        places = self.decoder.slices(unit, self.architecture, linear.name, begin, end - begin)
        raw = {place.part: self.read(place) for place in places}
        return self.decoder.unpack(unit, self.architecture, linear.name, begin, end - begin, raw)
