"""The hidden states of all documents, one contiguous buffer that lies in memory or in a file."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError
from anyquant.core.extras import require
from anyquant.store.system import SYSTEM, reading, sync_folder, writing

PIECE = 1 << 24  # bytes read and hashed at once


class States:
    """float32 states (documents, length, hidden) of each batch, as torch tensors in `views` that may be written to.

    `shapes` are those of the batches. With a `folder` they are pages of a nameless file there, which goes away with
    this object. Raises OutputError when the file cannot be made.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], folder: Path | None = None) -> None:
        sizes = [int(np.prod(shape)) for shape in shapes]
        self.array: Float32 = _in_file(folder, sum(sizes)) if folder else np.empty(sum(sizes), dtype=np.float32)
        torch, edges = require("torch"), np.cumsum([0, *sizes])
        flat = torch.from_numpy(self.array)
        self.views: list[Any] = [
            flat[start:stop].view(shape) for start, stop, shape in zip(edges, edges[1:], shapes, strict=False)
        ]


def _in_file(folder: Path, elements: int) -> Float32:
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        SYSTEM.allocate(file.fileno(), 4 * elements)
        return np.memmap(file, dtype=np.float32, mode="r+", shape=(elements,))


def save(path: Path, chains: Sequence[States]) -> str:
    """Write raw little-endian float32 states, chain by chain, durably, in place of what was at `path`; its sha256.

    Raises OutputError.
    """
    temporary, total = path.with_name(f".{path.name}.part"), hashlib.sha256()
    with writing(path):
        try:
            with temporary.open("wb") as file:
                for piece in _pieces(chains):
                    total.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(SYSTEM, path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    return total.hexdigest()


def restore(path: Path, chains: Sequence[States]) -> str:
    """Fill the states from a file that `save` wrote; its sha256. Raises BadInputError when its size is another."""
    total, wanted = hashlib.sha256(), sum(chain.array.nbytes for chain in chains)
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != wanted:
            raise BadInputError(f"{path}: holds {size} bytes of states, these documents have {wanted}; start again")
        for piece in _pieces(chains):
            if file.readinto(piece) != len(piece):
                raise BadInputError(f"{path}: the file ends early; start again")
            total.update(piece)
    return total.hexdigest()


def _pieces(chains: Sequence[States]) -> Iterator[memoryview]:
    for chain in chains:
        data = chain.array.view(np.uint8).data
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]
