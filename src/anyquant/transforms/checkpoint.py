"""A checkpoint whose tensors are rewritten while they are read: nothing of the rewritten model is stored anywhere."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint, TensorSpec, read_rows
from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.progress import Progress
from anyquant.transforms.operations import Awaited, Rotate
from anyquant.transforms.rewrites import Rewrite, Rewrites

STEP = 256  # rows read at once where rows do not depend on each other
KEPT = 2  # pieces kept in memory: a tensor whose rows are mixed is one piece

Piece = tuple[int, int]


class RewrittenCheckpoint:
    """`base` with `rewrites`. Rewritten tensors are F32, the others as they are stored. Safe to read from threads.

    Tensors are cut into pieces at fixed places, so the bytes of a row do not depend on what is read with it. A row
    rotation makes one piece of all rows that it mixes.
    Raises AnyQuantError when the rewrites name a tensor that `base` does not have, or do not fit its shape.
    """

    def __init__(self, base: Checkpoint, rewrites: Rewrites) -> None:
        self.base = base
        self.rewrites = rewrites
        self.location = base.location
        stored = set(base.names())
        self._sources = {name: name for name in stored} | dict(rewrites.copies)
        self._names = [*base.names(), *(name for name in rewrites.copies if name not in stored)]
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, Piece], Float32] = OrderedDict()
        missing = ({*rewrites.tensors} - self._sources.keys()) | ({*rewrites.copies.values()} - stored)
        if missing:
            raise AnyQuantError(f"{self.location}: there is no tensor {sorted(missing)[0]} to rewrite")
        self._pieces = {name: self._cut(name, changes) for name, changes in rewrites.tensors.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        return {**self.base.config, **self.rewrites.config_patch}

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.base.metadata

    def text_file(self, name: str) -> bytes | None:
        """A companion file of the source, such as its tokenizer."""
        return self.base.text_file(name)

    def names(self) -> Sequence[str]:
        return self._names

    def spec(self, name: str) -> TensorSpec:
        stored = self.base.spec(self._sources.get(name, name))
        if not self.rewrites.tensors.get(name):
            return TensorSpec(name, stored.dtype, stored.shape, stored.nbytes)
        return TensorSpec(name, "F32", stored.shape, 4 * stored.elements)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        source = self._sources.get(name, name)
        if not self.rewrites.tensors.get(name):
            self.base.read_into(source, start, stop, buffer)
            return
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.rows or buffer.size != 4 * (stop - start) * spec.row_length:
            raise AnyQuantError(
                f"{self.location}: {name} rows {start} to {stop} do not fit a {buffer.size} byte buffer"
            )
        rows, width = _as_matrix(spec)
        first, last = (0, rows) if len(spec.shape) == 1 else (start, stop)
        target = buffer.view(np.float32).reshape(-1, width)
        for piece in self._pieces[name] if start < stop else ():
            begin, end = max(first, piece[0]), min(last, piece[1])
            if begin < end:
                target[begin - first : end - first] = self._piece(name, piece)[begin - piece[0] : end - piece[0]]

    def _cut(self, name: str, changes: tuple[Rewrite, ...]) -> list[Piece]:
        """Pieces of a tensor, in order: rows that are mixed stay together, others come in steps."""
        rows, width = _as_matrix(self.spec(name))
        for change in changes:
            size = change.stop - change.start if change.axis == "rows" else width
            if not 0 <= change.start < change.stop <= rows or change.operation.size != size:
                raise AnyQuantError(
                    f"{self.location}: {change.operation.kind} of {change.operation.size} channels does not fit rows "
                    f"{change.start} to {change.stop} of {name}"
                )
        pieces: list[Piece] = []
        done = 0
        for start, stop in _merged([(c.start, c.stop) for c in changes if c.mixes_rows]):
            pieces += _steps(done, start)
            pieces.append((start, stop))
            done = stop
        return pieces + _steps(done, rows)

    def _piece(self, name: str, piece: Piece) -> Float32:
        with self._lock:
            if (name, piece) not in self._kept:
                while len(self._kept) >= KEPT:
                    self._kept.popitem(last=False)
                self._kept[name, piece] = self._compute(name, piece)
            self._kept.move_to_end((name, piece))
            return self._kept[name, piece]

    def _compute(self, name: str, piece: Piece) -> Float32:
        source, spec = self._sources[name], self.spec(name)
        if len(spec.shape) == 1:
            values = read_rows(self.base, source, 0, 1).reshape(-1, 1)[slice(*piece)].copy()
        else:
            values = read_rows(self.base, source, *piece)
        for change in self.rewrites.tensors[name]:
            change.change(values, piece[0])
        return values


def layers(checkpoint: Checkpoint) -> list[Rewrites]:
    """The rewrites of a checkpoint that was rewritten step by step, in order."""
    found: list[Rewrites] = []
    while isinstance(checkpoint, RewrittenCheckpoint):
        found.insert(0, checkpoint.rewrites)
        checkpoint = checkpoint.base
    return found


def settle(checkpoint: Checkpoint, progress: Progress) -> None:
    """Learn the rotations of a rewritten checkpoint now; otherwise it happens unseen when a tensor is first read."""
    rewrites = [one for layer in layers(checkpoint) for found in layer.tensors.values() for one in found]
    rotations = [one.operation for one in rewrites if isinstance(one.operation, Rotate)]
    awaited = {id(one.source): one.source for one in rotations if isinstance(one.source, Awaited)}
    if awaited:
        progress.start("rotate", sum(source.work for source in awaited.values()), "w")
        for source in awaited.values():
            source.get(progress)
        progress.finish()


def _as_matrix(spec: TensorSpec) -> tuple[int, int]:
    """(rows, columns) in which rewrites count: a 1-D tensor is one column."""
    return (spec.elements, 1) if len(spec.shape) == 1 else (spec.rows, spec.row_length)


def _merged(ranges: list[Piece]) -> list[Piece]:
    """Ranges joined where they overlap, in order."""
    merged: list[Piece] = []
    for start, stop in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _steps(start: int, stop: int) -> list[Piece]:
    return [(first, min(first + STEP, stop)) for first in range(start, stop, STEP)]
