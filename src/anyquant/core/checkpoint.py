"""Checkpoint: named tensors that tell their shape before any byte is read.

A folder of safetensors, a GGUF file, a quantized folder: each is a Checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anyquant.core.dtypes import DTYPES, Bytes, Float32, to_float32
from anyquant.core.linear import View


@dataclass(frozen=True)
class TensorSpec:
    """One stored tensor; `dtype` is a name of `core.dtypes.DTYPES`, or a GGUF type name for a quantized one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        """Elements of one row: the last axis (1 for a scalar)."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Number of rows: the product of all axes but the last."""
        return math.prod(self.shape[:-1])


class Checkpoint(Protocol):
    """Lazy, bounded access to stored tensors. `location` is what error messages call it."""

    @property
    def location(self) -> str: ...

    def __hash__(self) -> int:
        """By identity: what was read of one checkpoint may be remembered for it."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json` (empty where the file format has none)."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key-value metadata of the files themselves."""
        ...

    def text_file(self, name: str) -> bytes | None:
        """A small companion file such as "tokenizer.json", or None. Raises BadInputError when it is too large."""
        ...

    def names(self) -> Sequence[str]: ...

    def spec(self, name: str) -> TensorSpec:
        """Shape, type and size of a tensor; no data is read. Raises BadInputError when absent."""
        ...

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        """Read rows [start, stop) of the tensor, as stored, into `buffer` (uint8, exactly their size).

        A row is one vector of the last axis, so a tensor of shape (experts, out, in) has experts * out rows.
        Raises BadInputError when the file ends early or changed since it was opened.
        """
        ...


def read_rows(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float32:
    """Rows [start, stop) of a floating-point tensor as float32, shape (stop - start, row_length)."""
    spec = checkpoint.spec(name)
    width = DTYPES[spec.dtype].size if spec.dtype in DTYPES else 1
    buffer = np.empty((stop - start) * spec.row_length * width, dtype=np.uint8)
    checkpoint.read_into(name, start, stop, buffer)
    return to_float32(buffer, spec.dtype).reshape(stop - start, spec.row_length)


def read_tensor(checkpoint: Checkpoint, name: str) -> Float32:
    """A whole floating-point tensor as float32 in its own shape."""
    spec = checkpoint.spec(name)
    return read_rows(checkpoint, name, 0, spec.rows).reshape(spec.shape)


def read_view(checkpoint: Checkpoint, view: View, start: int, stop: int) -> Float32:
    """Rows [start, stop) of the logical matrix behind `view`, float32, shape (stop - start, view.columns).

    A transposed view reads its whole stored block, since its rows are columns of the file.
    """
    if not view.transposed:
        return read_rows(checkpoint, view.tensor, view.start + start, view.start + stop)
    stored = read_rows(checkpoint, view.tensor, view.start, view.start + view.columns)
    return np.ascontiguousarray(stored[:, start:stop].T)
