"""The neutral quantized state: what every format, the cache and a resumed run read.

`plan.json` and one file per distinct Linear in `entries/`, named by its key: a hash of everything that determines its
content (source, decision, statistics, code). An entry appears under its name only when it is complete and durable, so
a killed run resumes with the entries that it finds.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from anyquant.core.errors import BadInputError, OutputError
from anyquant.core.grid import Grid
from anyquant.store import limits
from anyquant.store.files import read_small
from anyquant.store.state_entry import (
    PARTIAL,
    SCHEMA,
    EntryReader,
    EntryWriter,
    canonical_json,
    entry_key,
    entry_path,
)
from anyquant.store.strict_json import parse_json
from anyquant.store.system import (
    SYSTEM,
    System,
    acquire_lock,
    close_quietly,
    pwrite_fully,
    release_lock,
    sync_folder,
    writing,
)

__all__ = ["EntryReader", "EntryWriter", "StateReader", "StateWriter", "canonical_json", "entry_key"]

PLAN = "plan.json"
ENTRIES = "entries"
_LOCK = ".lock"


class StateWriter:
    """`with StateWriter(folder) as state:`; makes the folder, holds its lock, keeps the entries that are there.

    Raises OutputError when another run holds the folder or it cannot be written.
    """

    def __init__(self, folder: Path, system: System = SYSTEM) -> None:
        self.folder = folder
        self._entries = folder / ENTRIES
        self._system = system
        self._lock: int | None = None
        with writing(folder, "create"):
            for path in (*reversed(self._entries.parents), self._entries):
                if not path.is_dir():
                    system.mkdir(path)
            self._lock = self._acquire()
            try:
                for leftover in self._entries.glob(f"*{PARTIAL}"):
                    system.unlink(leftover)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            release_lock(self._system, self.folder / _LOCK, self._lock)
            self._lock = None

    def has(self, key: str, grids: Callable[[str], Grid]) -> bool:
        """Whether a sound entry of this key is there (its sha256 is compared). A damaged one is written again."""
        try:
            EntryReader(self._entries, key, grids, self._system).verify()
        except BadInputError:
            return False
        return True

    def begin(self, key: str, grid: Grid, shape: tuple[int, int]) -> EntryWriter:
        """A new entry for a Linear of `shape` (out, in) on `grid`; the file is made with its first rows."""
        entry_path(self._entries, key)
        return EntryWriter(self._entries, key, grid, shape, self._system)

    def adopt(self, folder: Path, key: str) -> None:
        """Copy a finished entry of another state's `folder`; nothing when it is here."""
        target = entry_path(self._entries, key)
        if target.exists():
            return
        source = entry_path(folder / ENTRIES, key)
        partial = target.with_name(f"{key}{PARTIAL}")
        with writing(target):
            shutil.copyfile(source, partial)
            descriptor = self._system.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                self._system.fsync(descriptor)
            finally:
                close_quietly(self._system, descriptor)
            self._system.rename(partial, target)
            sync_folder(self._system, self._entries)

    def read(self, key: str, grids: Callable[[str], Grid]) -> EntryReader:
        """An entry that is finished."""
        return EntryReader(self._entries, key, grids, self._system)

    def write_plan(self, plan: Mapping[str, Any], entries: Mapping[str, str]) -> None:
        """`plan` is plain JSON, kept as it is; `entries` maps Linear names to keys. Replaces an earlier one at once."""
        data = canonical_json({"schema": SCHEMA, "plan": plan, "entries": entries})
        partial = self.folder / (PLAN + PARTIAL)
        with writing(self.folder / PLAN):
            if partial.exists():
                self._system.unlink(partial)
            descriptor = self._system.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
            try:
                pwrite_fully(self._system, descriptor, data, 0)
                self._system.fsync(descriptor)
            except BaseException:
                close_quietly(self._system, descriptor)
                raise
            self._system.close(descriptor)
            self._system.rename(partial, self.folder / PLAN)
            sync_folder(self._system, self.folder)

    def _acquire(self) -> int:
        descriptor = acquire_lock(self._system, self.folder / _LOCK)
        if descriptor is None:
            raise OutputError(f"{self.folder}: another run is writing it; wait for it or choose another place")
        return descriptor


class StateReader:
    """A finished state. `grids` finds a Grid by its name. Raises BadInputError when there is no sound plan."""

    def __init__(self, folder: Path, grids: Callable[[str], Grid], system: System = SYSTEM) -> None:
        self.folder = folder
        self._grids, self._system = grids, system
        where = str(folder / PLAN)
        data = read_small(folder, PLAN, limits.SMALL_FILE_BYTES, system)
        if data is None:
            raise BadInputError(f"{where}: missing, so this is not a finished state; run again to finish it")
        document = parse_json(data, where)
        plan, entries = document.get("plan"), document.get("entries")
        if document.get("schema") != SCHEMA or not isinstance(plan, dict) or not isinstance(entries, dict):
            raise BadInputError(f"{where}: expected schema {SCHEMA} with plan and entries")
        if not all(isinstance(key, str) for key in entries.values()):
            raise BadInputError(f"{where}: entries must map names of Linears to keys")
        self.plan: Mapping[str, Any] = plan
        self.entries: Mapping[str, str] = entries

    def names(self) -> Sequence[str]:
        """The Linears."""
        return list(self.entries)

    def entry(self, linear: str) -> EntryReader:
        """The codes and parameters of a Linear: `rows(start, stop)`, `load()`, `verify()`. Raises BadInputError."""
        if linear not in self.entries:
            raise BadInputError(f"{self.folder}: the state has no Linear {linear!r}")
        return EntryReader(self.folder / ENTRIES, self.entries[linear], self._grids, self._system)
