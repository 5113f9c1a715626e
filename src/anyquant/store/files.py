"""A file of an input: opened afresh for each read, refused when it is no longer the file that was planned with."""

import os
from dataclasses import dataclass
from pathlib import Path

from anyquant.core.checkpoint import TensorSpec
from anyquant.core.dtypes import Bytes
from anyquant.core.errors import AnyQuantError, BadInputError
from anyquant.store.paths import find_inside, open_inside, open_named
from anyquant.store.system import SYSTEM, System, close_quietly, pread_fully, reading


@dataclass(frozen=True)
class SourceFile:
    """`name` inside `root`; an empty name means that `root` itself is the file, named by the user.

    No descriptor is kept: opening costs microseconds, ten thousand shards need no ten thousand descriptors, and reads
    from many threads share nothing.
    """

    root: Path
    name: str
    size: int
    modified: int  # nanoseconds
    inode: int
    system: System = SYSTEM

    @classmethod
    def of(cls, root: Path, name: str, system: System = SYSTEM) -> "SourceFile":
        """Remember size, modification time and inode. Raises BadInputError."""
        descriptor = open_inside(root, name, system) if name else open_named(root, system)
        facts = os.fstat(descriptor)
        close_quietly(system, descriptor)
        return cls(root, name, facts.st_size, facts.st_mtime_ns, facts.st_ino, system)

    @property
    def path(self) -> Path:
        return self.root / self.name if self.name else self.root

    def read(self, offset: int, nbytes: int, what: str) -> bytes:
        """Exactly `nbytes` bytes; `what` says in messages whose they are. Raises BadInputError."""
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer), what)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview, what: str) -> None:
        """Fill `buffer` from `offset`. Raises BadInputError when the file ends early or changed since it was opened."""
        descriptor = open_inside(self.root, self.name, self.system) if self.name else open_named(self.root, self.system)
        try:
            self._expect_unchanged(descriptor)
            with reading(self.path):
                count = pread_fully(self.system, descriptor, buffer, offset)
            self._expect_unchanged(descriptor)
        finally:
            close_quietly(self.system, descriptor)
        if count < len(buffer):
            raise BadInputError(f"{self.path}: {what}: the file ends after {count} of {len(buffer)} bytes")

    def _expect_unchanged(self, descriptor: int) -> None:
        facts = os.fstat(descriptor)
        for field, now, then in (
            ("size", facts.st_size, self.size),
            ("modification time", facts.st_mtime_ns, self.modified),
            ("inode", facts.st_ino, self.inode),
        ):
            if now != then:
                raise BadInputError(f"{self.path}: the file changed since it was opened ({field}); start again")


def read_small(root: Path, name: str, limit: int, system: System = SYSTEM) -> bytes | None:
    """The whole of a companion file, or None when there is none. Raises BadInputError when it exceeds `limit` bytes."""
    descriptor = find_inside(root, name, system)
    if descriptor is None:
        return None
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise BadInputError(f"{root / name}: {size} bytes, at most {limit} are read")
        buffer = bytearray(size)
        with reading(root / name):
            count = pread_fully(system, descriptor, memoryview(buffer), 0)
    finally:
        close_quietly(system, descriptor)
    if count < size:
        raise BadInputError(f"{root / name}: the file ends after {count} of {size} bytes")
    return bytes(buffer)


def row_range(spec: TensorSpec, start: int, stop: int, row_bytes: int, buffer: Bytes) -> memoryview:
    """The caller's buffer as a byte view, after checking that it fits rows [start, stop). Raises AnyQuantError."""
    if not 0 <= start <= stop <= spec.rows:
        raise AnyQuantError(f"{spec.name}: rows [{start}, {stop}) asked for, it has {spec.rows}")
    wanted = (stop - start) * row_bytes
    if buffer.dtype != "uint8" or buffer.nbytes != wanted or not buffer.flags.c_contiguous:
        raise AnyQuantError(f"{spec.name}: the buffer must be {wanted} contiguous bytes, got {buffer.nbytes}")
    return buffer.reshape(-1).data
