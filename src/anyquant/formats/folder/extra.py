"""Tensors that belong to a module without being part of its weight, such as the scale of its input."""

from dataclasses import dataclass

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import DTYPES, Bytes, from_float32
from anyquant.core.errors import UnsupportedError
from anyquant.formats.folder.modules import Along, Stored

Shape = tuple[str | int, ...]  # with names for sizes that a module decides


@dataclass(frozen=True)
class Extra:
    """Nothing is read of it; what is written is `value` throughout. `shape` may name "rows" and "columns"."""

    suffix: str
    dtype: str
    shape: Shape = ()
    value: float | None = None

    def stored(self, rows: int, columns: int) -> Stored:
        """As a tensor that all rows share."""
        return Stored(self.suffix, self.dtype, sized(self.shape, rows=rows, columns=columns), Along.ONCE)

    def bytes(self, shape: tuple[int, int]) -> Bytes:
        """Raises UnsupportedError for one whose values come from calibration."""
        if self.value is None:
            raise UnsupportedError(f"{self.suffix} comes from calibration and is not written yet")
        count = self.stored(*shape).nbytes // DTYPES[self.dtype].size
        values = np.full(count, self.value, dtype=np.float32)
        if DTYPES[self.dtype].floating:
            return from_float32(values, self.dtype)
        return values.astype(DTYPES[self.dtype].numpy).view(np.uint8)


def found_extras(stored: Checkpoint, path: str, suffixes: tuple[str, ...], names: frozenset[str]) -> tuple[Extra, ...]:
    """Those of a module that a folder has, as they are there."""
    specs = [(suffix, stored.spec(f"{path}.{suffix}")) for suffix in suffixes if f"{path}.{suffix}" in names]
    return tuple(Extra(suffix, spec.dtype, spec.shape) for suffix, spec in specs)


def sized(shape: Shape, **sizes: int) -> tuple[int, ...]:
    """A shape with its names replaced."""
    return tuple(sizes[one] if isinstance(one, str) else one for one in shape)
