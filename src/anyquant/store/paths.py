"""The one way from a name written inside a model to an open file.

Names in an index, a manifest or a plan are data from a stranger: they may not leave the folder that carries them.
"""

import errno
import os
import re
import stat
from pathlib import Path

from anyquant.core.errors import BadInputError
from anyquant.store import limits
from anyquant.store.system import SYSTEM, System, close_quietly, reading

# names that mean a device on Windows, with any extension
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}
_BLOB = re.compile(r"[0-9a-zA-Z]{1,128}")
# without O_NONBLOCK, opening a named pipe would wait for its writer
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY


def refuse_name(name: str) -> str | None:
    """Why `name` is not a plain relative path ("a" or "a/b"), or None."""
    if not name or name.startswith("/"):
        return "it is empty" if not name else "it is absolute"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "it contains a control character"
    if "\\" in name or ":" in name:
        return "it contains a backslash or a colon"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"it contains the part {part!r}"
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            return "it is not valid Unicode"
        if length > limits.PATH_PART_BYTES:
            return f"a part of it is longer than {limits.PATH_PART_BYTES} bytes"
        if part.split(".")[0].rstrip(" ").lower() in _RESERVED:
            return f"{part!r} is a device name on some systems"
    return None


def open_inside(root: Path, name: str, system: System = SYSTEM) -> int:
    """Descriptor of the regular file `name` inside the folder `root`, opened for reading.

    Symbolic links are refused, except those of the Hugging Face cache: a file of `<repo>/snapshots/<revision>` that
    points into `<repo>/blobs`. Hard links are refused. Raises BadInputError, also when there is no such file.
    """
    descriptor = find_inside(root, name, system)
    if descriptor is None:
        raise BadInputError(f"{root}: the file {name!r} is missing")
    return descriptor


def find_inside(root: Path, name: str, system: System = SYSTEM) -> int | None:
    """As `open_inside`, but None when there is no such file."""
    why = refuse_name(name)
    if why is not None:
        raise BadInputError(f"{root}: refused the file name {name!r}: {why}")
    with reading(root / name):
        real = Path(os.path.realpath(root))
        try:
            folder = system.open(real, _FOLDER)
        except FileNotFoundError:
            return None
        try:
            parts = name.split("/")
            for part in parts[:-1]:
                folder = _step(folder, part, system)
            descriptor = _open_last(folder, real, parts, system)
        except FileNotFoundError:
            return None
        finally:
            close_quietly(system, folder)
    return _checked(descriptor, root / name, system)


def open_named(path: Path, system: System = SYSTEM) -> int:
    """Descriptor of a regular file that the user named on purpose: links are followed. Raises BadInputError."""
    with reading(path):
        descriptor = system.open(Path(os.path.realpath(path)), _READ)
    return _checked(descriptor, path, system, most_links=None)


def _step(folder: int, part: str, system: System) -> int:
    inner = system.open(part, _FOLDER, folder)
    close_quietly(system, folder)
    return inner


def _open_last(folder: int, root: Path, parts: list[str], system: System) -> int:
    try:
        return system.open(parts[-1], _READ, folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):
            raise
    target = os.readlink(parts[-1], dir_fd=folder)
    blob = _cache_blob(root, parts, target)
    if blob is None:
        raise BadInputError(f"{root}: refused {'/'.join(parts)!r}: it is a link to {target!r}, outside the folder")
    blobs = system.open(root.parent.parent / "blobs", _FOLDER)
    try:
        return system.open(blob, _READ, blobs)
    finally:
        close_quietly(system, blobs)


def _cache_blob(root: Path, parts: list[str], target: str) -> str | None:
    """Name of the blob that a cache link means, judged by its text alone: the blob is then opened by its folder."""
    if root.parent.name != "snapshots":
        return None
    resolved = Path(os.path.normpath(root.joinpath(*parts[:-1], target)))
    if resolved.parent != root.parent.parent / "blobs" or not _BLOB.fullmatch(resolved.name):
        return None
    return resolved.name


def _checked(descriptor: int, path: Path, system: System, most_links: int | None = 1) -> int:
    facts = os.fstat(descriptor)
    why = None
    if not stat.S_ISREG(facts.st_mode):
        why = "it is not a regular file"
    elif most_links is not None and facts.st_nlink > most_links:
        why = f"it has {facts.st_nlink} hard links; use a copy"
    if why is not None:
        close_quietly(system, descriptor)
        raise BadInputError(f"refused {path}: {why}")
    return descriptor
