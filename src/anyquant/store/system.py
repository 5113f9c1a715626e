"""Every storage call of AnyQuant, in one small layer, so that tests can fail the N-th one.

`System` maps straight to the operating system. Errors stay OSError here; `reading` and `writing` turn them into the
one-line errors of the project.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anyquant.core.errors import BadInputError, OutputError

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_WORKING_FOLDER = -100  # AT_FDCWD of Linux
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY}
_WHY = {
    errno.ENOSPC: "the disk is full; free some space or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; choose another place or change its permissions",
    errno.EPERM: "not permitted there; choose another place",
    errno.EIO: "the disk reported an error; check the device",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """Linux's renameat2 from the C library (Python does not offer it), or None."""
    try:
        function: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return None
    return function


class System:
    """The calls, one to one. A subclass may count, refuse or shorten them."""

    def open(self, path: str | Path, flags: int, folder: int | None = None) -> int:
        """File descriptor of `path`, relative to the descriptor `folder` where given; new files get mode 0644."""
        return os.open(path, flags | os.O_CLOEXEC, 0o644, dir_fd=folder)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def pread(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """Bytes read into `buffer`: fewer than its size at the end of the file."""
        return os.preadv(descriptor, [buffer], offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Bytes written, possibly fewer than given."""
        return os.pwrite(descriptor, data, offset)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Reserve the blocks of a new file, so that a full disk shows before the work; sparse where not offered."""
        if nbytes == 0:
            return
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        os.ftruncate(descriptor, nbytes)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def rename_special(self, source: Path, target: Path, flag: int) -> bool:
        """renameat2 with RENAME_NOREPLACE or RENAME_EXCHANGE; False when this system does not offer it."""
        function = _renameat2()
        if function is None:
            return False
        if function(_WORKING_FOLDER, os.fsencode(source), _WORKING_FOLDER, os.fsencode(target), flag) == 0:
            return True
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code), str(target))

    def lock(self, descriptor: int) -> bool:
        """Take the exclusive lock of an open file; False when another process (or descriptor) holds it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free_bytes(self, folder: Path) -> int:
        facts = os.statvfs(folder)
        return facts.f_bavail * facts.f_frsize


SYSTEM = System()


def reason(error: OSError) -> str:
    """What an operating system error means and what to do, without the path."""
    known = _WHY.get(error.errno or 0)
    return known or (os.strerror(error.errno).lower() if error.errno else str(error))


@contextlib.contextmanager
def writing(path: str | Path, action: str = "write") -> Iterator[None]:
    """Turn an OSError of the body into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot {action} {path}: {reason(error)}") from error


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the body into a BadInputError about `path`."""
    try:
        yield
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {reason(error)}") from error


def pread_fully(system: System, descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = system.pread(descriptor, buffer[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def pwrite_fully(system: System, descriptor: int, data: Any, offset: int) -> None:
    """Write all of `data` (anything with a contiguous buffer) at `offset`, continuing after short writes."""
    view = memoryview(data)
    if view.nbytes == 0:
        return
    view = view.cast("B")
    done = 0
    while done < len(view):
        count = system.pwrite(descriptor, view[done:], offset + done)
        if count <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += count


def close_quietly(system: System, descriptor: int) -> None:
    """Close a descriptor that was only read from, or whose work is lost anyway."""
    with contextlib.suppress(OSError):
        system.close(descriptor)


def sync_folder(system: System, folder: Path) -> None:
    """Make the names inside `folder` durable."""
    descriptor = system.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.fsync(descriptor)
    finally:
        system.close(descriptor)


def remove_tree(system: System, path: Path) -> None:
    """Delete a file or folder that is ours. Links are unlinked, never followed."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        system.unlink(path)
        return
    for child in path.iterdir():
        remove_tree(system, child)
    system.rmdir(path)


def acquire_lock(system: System, path: Path) -> int | None:
    """Descriptor of the locked file at `path`, or None when another run holds it.

    The holder unlinks the file before it lets go, so a lock on a file that has lost its name is tried again.
    """
    while True:
        descriptor = system.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            if not system.lock(descriptor):
                close_quietly(system, descriptor)
                return None
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except BaseException:
            close_quietly(system, descriptor)
            raise
        close_quietly(system, descriptor)


def release_lock(system: System, path: Path, descriptor: int) -> None:
    """Remove the lock file while it is still held, then let go."""
    with contextlib.suppress(OSError):
        system.unlink(path)
    close_quietly(system, descriptor)
