"""The journal of a long run: small records and large files in a folder, each there as a whole or not at all."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from anyquant.store.files import read_small
from anyquant.store.state_entry import PARTIAL
from anyquant.store.system import SYSTEM, System, close_quietly, pwrite_fully, sync_folder, writing

_RECORD_BYTES = 1 << 30


class Journal:
    """Files in `folder`, which exists. A name is written once more by replacing it. Raises OutputError."""

    def __init__(self, folder: Path, system: System = SYSTEM) -> None:
        self.folder = folder
        self._system = system

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> str:
        """Write a file durably, then give it its name. Returns the sha256 of its bytes, hexadecimal."""
        partial, digest, place = self.folder / (name + PARTIAL), hashlib.sha256(), 0
        with writing(self.folder / name):
            if partial.exists():
                self._system.unlink(partial)
            descriptor = self._system.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            try:
                for piece in pieces:
                    data = memoryview(piece).cast("B")
                    pwrite_fully(self._system, descriptor, data, place)
                    digest.update(data)
                    place += len(data)
                self._system.fsync(descriptor)
            except BaseException:
                close_quietly(self._system, descriptor)
                raise
            self._system.close(descriptor)
            self._system.rename(partial, self.folder / name)
            sync_folder(self._system, self.folder)
        return digest.hexdigest()

    def read(self, name: str) -> bytes | None:
        """The bytes of a record, None when there is none. Raises BadInputError when it cannot be read."""
        return read_small(self.folder, name, _RECORD_BYTES, self._system)

    def remove(self, name: str) -> None:
        """Nothing when it is not there."""
        with writing(self.folder / name, "remove"):
            if os.path.lexists(self.folder / name):
                self._system.unlink(self.folder / name)
