"""How the weight of one module lies in the tensors of a folder: facts, and two pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np

from anyquant.core.dtypes import DTYPES, Bytes, from_float32_exactly, to_float32
from anyquant.core.errors import UnsupportedError
from anyquant.core.plan import Place
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid

# float grids and the safetensors types that hold their values as they are
FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
FLOAT_GRIDS = {dtype: grid for grid, dtype in FLOATS.items()}


# for the type of a stored tensor: floats in the model's own type, whichever of the three that is. A layout gives and
# takes them as float32; they are stored only where that type holds them exactly
OWN = ""


class Along(StrEnum):
    """Where the rows (outputs) of a matrix lie in a stored tensor."""

    ROWS = "rows"  # one behind the other, along the first axis
    COLUMNS = "columns"  # side by side, along the last axis: the matrix is stored transposed
    ONCE = "once"  # nowhere: all rows share the tensor


@dataclass(frozen=True)
class Stored:
    """One tensor of a module: its name behind the module's (`suffix`), its safetensors type or OWN, its shape.

    `per` rows of the matrix take `steps` steps along the axis that `along` names: a row of a flattened matrix takes
    many.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    along: Along = Along.ROWS
    per: int = 1
    steps: int = 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size

    def typed(self, floats: str) -> "Stored":
        """With the type `floats` in the place of OWN."""
        return replace(self, dtype=floats) if self.dtype == OWN else self

    def place(self, part: str, first: int, rows: int) -> Place:
        """Where the rows [first, first + rows) of the module lie in the tensor; `first` is a multiple of `per`."""
        if self.along is Along.ONCE:
            return Place(part, 0, self.nbytes, shared=True)
        start, stop = first * self.steps // self.per, -(-(first + rows) * self.steps // self.per)
        if self.along is Along.ROWS:
            step = self.nbytes // max(self.shape[0], 1)
            return Place(part, start * step, (stop - start) * step)
        element = DTYPES[self.dtype].size
        pitch = self.shape[-1] * element
        return Place(part, start * element, (stop - start) * element, self.nbytes // max(pitch, 1), pitch)


class ModuleLayout(Protocol):
    """A grid as a format stores it. `rows` and `columns` are those of the whole module.

    `row_multiple`: rows that must be packed together. `quantized` is False where the weight stays one float tensor.
    """

    @property
    def grid(self) -> str: ...

    @property
    def quantized(self) -> bool: ...

    @property
    def row_multiple(self) -> int: ...

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        """The tensors of a module, in the order in which `pack` gives their bytes."""
        ...

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """The bytes of some rows in every tensor, each laid out as its `Place` says. `shape` is the module's.

        Raises UnsupportedError for what the format cannot hold.
        """
        ...

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Inverse of `pack`: flat bytes of every tensor, for `rows` rows. Raises BadInputError."""
        ...


@dataclass(frozen=True)
class FloatLayout:
    """The weight as it is, in safetensors type `dtype`."""

    dtype: str
    quantized: bool = False
    row_multiple: int = 1

    @property
    def grid(self) -> str:
        return FLOAT_GRIDS[self.dtype]

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        return [Stored("weight", self.dtype, (rows, columns))]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        return [np.ascontiguousarray(rows.codes, dtype=_pattern(self.dtype)).view(np.uint8)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        grid = find_grid(self.grid)
        codes = raw[0].view(_pattern(self.dtype)).reshape(rows, shape[1]).astype(grid.code_dtype)
        return QTensor(grid, (rows, shape[1]), codes, {})


def refuse_reordered(rows: QTensor, name: str) -> None:
    """Raise UnsupportedError for columns in groups that do not follow each other, which `name` does not have."""
    if rows.column_groups is not None:
        raise UnsupportedError(f"{name} has no place for reordered columns (act-order); quantize without")


def narrowed(raw: Bytes, dtype: str, name: str) -> Bytes:
    """The bytes of float32 values as those of `dtype`. Raises UnsupportedError for a value that it does not hold."""
    values = np.ascontiguousarray(raw).reshape(-1).view(np.float32)
    stored, lost = from_float32_exactly(values, dtype)
    if lost.any():
        raise UnsupportedError(
            f"{name}: {values[lost][0]!s} is not a number of {dtype}, the model's type, in which it would be stored; "
            "choose another grid for it"
        )
    return stored


def widened(raw: Bytes, dtype: str) -> Bytes:
    """Inverse of `narrowed`."""
    return np.ascontiguousarray(to_float32(raw, dtype)).view(np.uint8)


def own_type(stated: object, stored: str) -> str:
    """The type that OWN means for a matrix of safetensors type `stored` in a model whose config states a `dtype`.

    A float32 matrix is of the 16-bit type that the config states, if it does: transforms have rewritten it.
    """
    known = {"float16": "F16", "bfloat16": "BF16"}
    return known.get(str(stated).removeprefix("torch."), stored) if stored not in ("F16", "BF16") else stored


def _pattern(dtype: str) -> str:
    """The numpy type of the codes of a float grid: bit patterns."""
    return f"<u{DTYPES[dtype].size}"
