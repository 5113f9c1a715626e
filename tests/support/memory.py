"""A checkpoint in memory, so that a test can change one tensor or one setting of a sound one."""

from pathlib import Path
from typing import Any

import numpy as np

from anyquant.core.checkpoint import TensorSpec, read_tensor
from anyquant.core.dtypes import Bytes, Float32
from anyquant.store.open import open_checkpoint


class MemoryCheckpoint:
    """Float32 `arrays` by name and a `config`, both open to change."""

    location = "memory"

    def __init__(self, arrays: dict[str, Float32], config: dict[str, Any] | None = None) -> None:
        self.arrays = arrays
        self.config = config or {}
        self.metadata: dict[str, Any] = {}

    @classmethod
    def of(cls, folder: Path) -> "MemoryCheckpoint":
        """A copy of the checkpoint in `folder`."""
        stored = open_checkpoint(folder)
        return cls({name: read_tensor(stored, name) for name in stored.names()}, dict(stored.config))

    def text_file(self, name: str) -> bytes | None:
        return None

    def names(self) -> list[str]:
        return list(self.arrays)

    def spec(self, name: str) -> TensorSpec:
        array = self.arrays[name]
        return TensorSpec(name, "F32", array.shape, array.nbytes)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        array = self.arrays[name]
        rows = array.reshape(-1, array.shape[-1])[start:stop]
        buffer[:] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
