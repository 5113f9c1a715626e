"""A quantized folder as a Checkpoint: the tensor names of the model it was made from, values decoded when read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from anyquant.core.checkpoint import TensorSpec
from anyquant.core.dtypes import Bytes
from anyquant.core.errors import AnyQuantError, BadInputError
from anyquant.core.plan import Place
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.modules import FLOAT_GRIDS, OWN, ModuleLayout, Stored, widened
from anyquant.formats.folder.scheme import Scheme
from anyquant.formats.folder.stored import StoredFolder

BLOCK_WEIGHTS = 1 << 22  # decoded at a time


@dataclass(frozen=True)
class StoredModule:
    """A quantized module of the folder: its layout, its shape (out, in) and its tensors.

    `floating`: of each tensor, whether its layout leaves the type to the model.
    """

    path: str
    layout: ModuleLayout
    shape: tuple[int, int]
    tensors: tuple[Stored, ...]
    floating: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class QuantizedFolder(StoredFolder):
    """Weights of quantized modules are float32, all else as stored."""

    scheme: Scheme

    @cached_property
    def modules(self) -> Mapping[str, StoredModule]:
        """By the name of the weight they stand for. Raises BadInputError for tensors that are missing or misshapen."""
        found = {}
        for path, (how, shape) in self.scheme.find(self.stored).items():
            layout = self.scheme.layout(how) if isinstance(how, str) else how
            wanted = layout.tensors(*shape)
            tensors = tuple(self._expect(path, one) for one in wanted)
            floating = tuple(one.dtype == OWN for one in wanted)
            found[f"{path}.weight"] = StoredModule(path, layout, shape, tensors, floating)
        return found

    def _expect(self, path: str, wanted: Stored) -> Stored:
        """The tensor with the type in which it is stored, where that is the model's own."""
        name = f"{path}.{wanted.suffix}"
        if name not in self._names:
            raise BadInputError(f"{self.location}: {path} has no {wanted.suffix}, which its settings call for")
        spec = self.stored.spec(name)
        right = spec.dtype in FLOAT_GRIDS if wanted.dtype == OWN else spec.dtype == wanted.dtype
        if not right or spec.shape != wanted.shape:
            dtype = wanted.dtype or ", ".join(FLOAT_GRIDS)
            raise BadInputError(
                f"{self.location}: {name} is {spec.dtype} {list(spec.shape)}, its settings call for {dtype} "
                f"{list(wanted.shape)}"
            )
        return wanted.typed(spec.dtype)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.stored.names())

    @cached_property
    def _owned(self) -> frozenset[str]:
        """Stored tensors that belong to quantized modules."""
        modules, inputs = self.modules.values(), self.scheme.input_suffixes
        own = {f"{module.path}.{one.suffix}" for module in modules for one in module.tensors}
        return frozenset(own | {f"{module.path}.{suffix}" for module in modules for suffix in inputs})

    def names(self) -> Sequence[str]:
        return [*self.modules, *(name for name in self.stored.names() if name not in self._owned)]

    def spec(self, name: str) -> TensorSpec:
        module = self.modules.get(name)
        if module is None:
            return self.stored.spec(name)
        return TensorSpec(name, "F32", module.shape, 4 * module.shape[0] * module.shape[1])

    def grid_of(self, name: str) -> str | None:
        """The grid on which a tensor lies; None for one that is stored in float."""
        module = self.modules.get(name)
        return None if module is None else module.layout.grid

    def quantized_rows(self, tensor: str, start: int, stop: int) -> QTensor:
        """Codes and parameters of rows [start, stop) of a quantized weight. Raises BadInputError."""
        module = self.modules[tensor]
        multiple = module.layout.row_multiple
        first, last = start // multiple * multiple, min(-(-stop // multiple) * multiple, module.shape[0])
        raw = []
        for one, floating in zip(module.tensors, module.floating, strict=True):
            data = self._read(one.place(f"{module.path}.{one.suffix}", first, last - first))
            raw.append(widened(data, one.dtype) if floating else data)
        found = module.layout.unpack(raw, last - first, module.shape)
        return found if (first, last) == (start, stop) else found.rows(start - first, stop - first)

    def _read(self, place: Place) -> Bytes:
        spec = self.stored.spec(place.part)
        line = spec.nbytes // max(spec.rows, 1)
        if place.runs == 1:
            low, high = place.offset // max(line, 1), -(-(place.offset + place.nbytes) // max(line, 1))
            buffer = np.empty((high - low) * line, dtype=np.uint8)
            self.stored.read_into(place.part, low, high, buffer)
            return buffer[place.offset - low * line :][: place.nbytes]
        # whole lines, piece by piece: a read for each run would be a call for every few bytes
        found = np.empty((place.runs, place.nbytes), dtype=np.uint8)
        step = max(1, BLOCK_WEIGHTS // max(line, 1))
        for low in range(0, place.runs, step):
            high = min(low + step, place.runs)
            buffer = np.empty((high - low) * line, dtype=np.uint8)
            self.stored.read_into(place.part, low, high, buffer)
            found[low:high] = buffer.reshape(high - low, line)[:, place.offset : place.offset + place.nbytes]
        return found.reshape(-1)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        """See core.checkpoint.Checkpoint."""
        module = self.modules.get(name)
        if module is None:
            self.stored.read_into(name, start, stop, buffer)
            return
        rows, columns = module.shape
        if not 0 <= start <= stop <= rows or buffer.nbytes != (stop - start) * columns * 4:
            raise AnyQuantError(f"{name}: rows [{start}, {stop}) do not fit the tensor or the buffer")
        values = buffer.reshape(-1).view(np.float32).reshape(stop - start, columns)
        multiple = module.layout.row_multiple
        step = max(BLOCK_WEIGHTS // columns // multiple, 1) * multiple
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            values[begin - start : end - start] = self.quantized_rows(name, begin, end).decode()
