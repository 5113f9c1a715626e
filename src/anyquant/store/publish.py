"""From a hidden staging folder to the final name in one step: an output is complete, or it is not there.

Order (after ALICE, OSDI 2014): write and fsync every file, write the manifest last, fsync the folders, rename, fsync
the parent. A crash at any moment leaves the old state or the new one; what is left over is hidden, and removed by the
next run on the same name.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from anyquant.core.errors import AnyQuantError, BadInputError, OutputError
from anyquant.store import limits
from anyquant.store.manifest import INCOMPLETE, MANIFEST, Manifest, ManifestFile, listed_files, sha256_of
from anyquant.store.paths import refuse_name
from anyquant.store.system import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    SYSTEM,
    System,
    acquire_lock,
    close_quietly,
    pwrite_fully,
    reason,
    release_lock,
    remove_tree,
    sync_folder,
    writing,
)

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_OUTPUT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_LONGEST_SUFFIX = len(".") + len(".partial-") + 20


class Stage:
    """`with Stage(out) as stage:` fill `stage.folder`, then `stage.publish()`.

    Left without `publish`, or by an exception, it removes what it made. `needed` bytes are asked of the disk at the
    start. `overwrite` allows replacing an output that AnyQuant made (it carries our manifest), never anything else.
    Raises OutputError: the parent is missing or read-only, the output exists, another run holds it, the disk is full.
    """

    def __init__(self, out: Path, overwrite: bool = False, needed: int = 0, system: System = SYSTEM) -> None:
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve would follow a link at the final name
        self.folder = self._hidden(f"partial-{os.getpid()}")
        self._overwrite = overwrite
        self._needed = needed
        self._system = system
        self._lock: int | None = None
        self._open: dict[int, Path] = {}

    def __enter__(self) -> "Stage":
        self._check_target()
        with writing(self.out, "lock"):
            self._lock = acquire_lock(self._system, self._lock_path)
        if self._lock is None:
            raise OutputError(f"{self.out}: another run is writing it; wait for it or choose another -o")
        try:
            self._check_target()
            self._clean_up_after_the_dead()
            self._check_space()
            with writing(self.folder, "create"):
                self._system.mkdir(self.folder)
            self.write_file(MANIFEST, INCOMPLETE)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        if isinstance(error, OSError) and error.errno in _OUTPUT_ERRNOS:
            raise OutputError(f"cannot write {self.out}: {reason(error)}") from error

    def create_sized(self, relative: str, nbytes: int) -> int:
        """A new file of exactly `nbytes`, its blocks reserved. The descriptor stays ours: use `write_at`, `finish`."""
        path = self._inside(relative)
        with writing(path, "create"):
            for parent in reversed(path.relative_to(self.folder).parents[:-1]):
                if not (self.folder / parent).is_dir():
                    self._system.mkdir(self.folder / parent)
            descriptor = self._system.open(path, _CREATE)
            self._open[descriptor] = path
            self._system.allocate(descriptor, nbytes)
        return descriptor

    def write_at(self, descriptor: int, offset: int, data: Any) -> None:
        """Write all of `data` (bytes or a contiguous array) at `offset` of a file of `create_sized`. Thread-safe."""
        with writing(self._open[descriptor]):
            pwrite_fully(self._system, descriptor, data, offset)

    def finish(self, descriptor: int) -> None:
        """Make a file of `create_sized` durable and close it. `publish` does so for those that are still open."""
        with writing(self._open[descriptor]):
            self._system.fsync(descriptor)
            del self._open[descriptor]
            self._system.close(descriptor)

    def discard(self, relative: str) -> None:
        """Remove a file of this stage, open or finished, so that it can be made again; nothing when there is none."""
        path = self._inside(relative)
        for descriptor in [known for known, file in self._open.items() if file == path]:
            del self._open[descriptor]
            close_quietly(self._system, descriptor)
        with writing(path, "remove"):
            if os.path.lexists(path):
                self._system.unlink(path)

    def write_file(self, relative: str, data: bytes) -> None:
        """A small file, whole and durable."""
        descriptor = self.create_sized(relative, len(data))
        self.write_at(descriptor, 0, data)
        self.finish(descriptor)

    def replace_start(self, relative: str, data: bytes) -> None:
        """Other first bytes in a finished file of this stage, durable; its length stays."""
        path = self._inside(relative)
        with writing(path):
            descriptor = self._system.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                pwrite_fully(self._system, descriptor, data, 0)
                self._system.fsync(descriptor)
            finally:
                close_quietly(self._system, descriptor)

    def publish(self, hashes: Mapping[str, str] | None = None) -> Manifest:
        """Give the folder its final name, with a manifest of all files in it. Raises OutputError.

        `hashes` are sha256 (hexadecimal) of files, by relative path, that the caller has computed; the others are read.
        """
        for descriptor in list(self._open):
            self.finish(descriptor)
        manifest = self._manifest(hashes or {})
        with writing(self.folder / MANIFEST):
            self._system.unlink(self.folder / MANIFEST)
        self.write_file(MANIFEST, manifest.encode())
        with writing(self.out, "publish"):
            for folder in [path for path in self.folder.rglob("*") if path.is_dir()]:
                sync_folder(self._system, folder)
            sync_folder(self._system, self.folder)
            self._swap_in()
        return manifest

    @property
    def _lock_path(self) -> Path:
        return self._hidden("lock")

    @property
    def _aside(self) -> Path:
        """Where the old output stands for a moment on systems without an atomic exchange."""
        return self._hidden("replaced")

    def _hidden(self, ending: str) -> Path:
        """A sibling of the output, so that a rename stays on one file system."""
        return self.out.parent / f".{self.out.name}.{ending}"

    def _inside(self, relative: str) -> Path:
        why = refuse_name(relative)
        if why is not None:
            raise AnyQuantError(f"cannot write {relative!r} into an output: {why}")
        return self.folder / relative

    def _check_target(self) -> None:
        if not self.out.name or len(os.fsencode(self.out.name)) + _LONGEST_SUFFIX > limits.PATH_PART_BYTES:
            raise OutputError(f"{self.out}: cannot be the name of an output folder; choose a shorter one with -o")
        if not self.out.parent.is_dir():
            raise OutputError(f"the folder {self.out.parent} does not exist; create it: mkdir -p {self.out.parent}")
        if not os.path.lexists(self.out):
            return
        if self.out.is_symlink() or not (self.out / MANIFEST).is_file():
            raise OutputError(f"{self.out} exists and was not written by AnyQuant; choose another -o")
        if not self._overwrite:
            raise OutputError(f"{self.out} exists; choose another -o, or replace it with --force")
        self._refuse_strangers()

    def _refuse_strangers(self) -> None:
        """Replacing an output must not remove files that somebody else put there."""
        known = {MANIFEST, *listed_files(self.out, self._system)}
        for path in sorted(self.out.rglob("*")):
            name = path.relative_to(self.out).as_posix()
            if (path.is_symlink() or not path.is_dir()) and name not in known:
                raise OutputError(f"{self.out} also holds {name}, which AnyQuant did not write; move it away first")

    def _check_space(self) -> None:
        wanted = int(self._needed * limits.DISK_MARGIN)
        with writing(self.out.parent):
            free = self._system.free_bytes(self.out.parent)
        if free < wanted:
            raise OutputError(f"{self.out.parent}: {wanted} bytes are needed, {free} are free; free some or move -o")

    def _clean_up_after_the_dead(self) -> None:
        """Remove what killed runs left for this name. Safe under the lock: no living run works on it."""
        with writing(self.out.parent, "clean up in"):
            if self._aside.is_dir() and not os.path.lexists(self.out):
                self._system.rename(self._aside, self.out)
                self._check_target()
            for path in sorted(self.out.parent.iterdir()):
                if path == self._aside or path.name.startswith(f".{self.out.name}.partial-"):
                    remove_tree(self._system, path)

    def _manifest(self, hashes: Mapping[str, str]) -> Manifest:
        files = []
        for path in sorted(self.folder.rglob("*")):
            relative, facts = path.relative_to(self.folder).as_posix(), path.lstat()
            if stat.S_ISDIR(facts.st_mode) or relative == MANIFEST:
                continue
            if not stat.S_ISREG(facts.st_mode):
                raise AnyQuantError(f"{relative} in the output is not a regular file")
            self._sync_file(path)
            try:
                sha256 = hashes.get(relative) or sha256_of(self.folder, relative, self._system)
            except BadInputError as error:
                raise OutputError(f"what was written cannot be read again: {error}") from error
            files.append(ManifestFile(relative, facts.st_size, sha256))
        return Manifest(tuple(files))

    def _sync_file(self, path: Path) -> None:
        """Again for files of `finish`, which costs nothing; the first time for files that others put here."""
        with writing(path):
            descriptor = self._system.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                self._system.fsync(descriptor)
            finally:
                close_quietly(self._system, descriptor)

    def _swap_in(self) -> None:
        """Rename, fsync the parent; when that fails, take it back. Then remove what was replaced."""
        undo = self._replace() if os.path.lexists(self.out) else self._place()
        try:
            sync_folder(self._system, self.out.parent)
        except BaseException:
            for source, target, flag in undo:
                if not flag:
                    self._system.rename(source, target)
                else:
                    self._system.rename_special(source, target, flag)
            raise
        for old in (self.folder, self._aside):
            if os.path.lexists(old):
                _remove_quietly(self._system, old)

    def _place(self) -> list[tuple[Path, Path, int]]:
        try:
            if not self._system.rename_special(self.folder, self.out, RENAME_NOREPLACE):
                self._system.rename(self.folder, self.out)
        except FileExistsError:
            raise OutputError(f"{self.out} appeared while this run was working; choose another -o") from None
        return [(self.out, self.folder, 0)]

    def _replace(self) -> list[tuple[Path, Path, int]]:
        if not self._overwrite:
            raise OutputError(f"{self.out} appeared while this run was working; choose another -o")
        if self._system.rename_special(self.folder, self.out, RENAME_EXCHANGE):
            return [(self.folder, self.out, RENAME_EXCHANGE)]
        self._system.rename(self.out, self._aside)
        try:
            self._system.rename(self.folder, self.out)
        except BaseException:
            self._system.rename(self._aside, self.out)
            raise
        return [(self.out, self.folder, 0), (self._aside, self.out, 0)]

    def _leave(self) -> None:
        """Remove everything but a published output; errors here would hide the one that matters."""
        for descriptor in self._open:
            close_quietly(self._system, descriptor)
        self._open.clear()
        if os.path.lexists(self.folder):
            _remove_quietly(self._system, self.folder)
        if self._lock is not None:
            release_lock(self._system, self._lock_path, self._lock)
            self._lock = None


def _remove_quietly(system: System, path: Path) -> None:
    with contextlib.suppress(OSError):
        remove_tree(system, path)
