"""The manifest of a published folder: every file with its size and sha256, and nothing that differs between runs.

A folder is complete when its manifest says so and all files have their sizes. A folder that carries the file without
that is incomplete: a run that was cut off.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyquant.core.errors import BadInputError
from anyquant.store import limits
from anyquant.store.files import read_small
from anyquant.store.paths import find_inside, open_inside, refuse_name
from anyquant.store.strict_json import parse_json
from anyquant.store.system import SYSTEM, System, close_quietly, pread_fully, reading

MANIFEST = "anyquant-manifest.json"
SCHEMA = 1
INCOMPLETE = json.dumps({"schema": SCHEMA, "complete": False}).encode() + b"\n"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 4 * limits.MIB


@dataclass(frozen=True)
class ManifestFile:
    """`path` relative to the folder, `sha256` in lower-case hexadecimal."""

    path: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    files: tuple[ManifestFile, ...]

    def encode(self) -> bytes:
        """The manifest file's bytes, the same for the same files."""
        files = [
            {"path": file.path, "bytes": file.nbytes, "sha256": file.sha256}
            for file in sorted(self.files, key=lambda file: file.path)
        ]
        document = {"schema": SCHEMA, "complete": True, "files": files}
        return json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n"


def read_manifest(folder: Path, system: System = SYSTEM) -> Manifest | None:
    """The manifest of a complete folder; None where there is no manifest at all.

    Raises BadInputError when it is damaged or unfinished, or when a file is missing or has another size.
    """
    data = read_small(folder, MANIFEST, limits.SMALL_FILE_BYTES, system)
    if data is None:
        return None
    where = str(folder / MANIFEST)
    document = parse_json(data, where)
    if document.get("schema") != SCHEMA or document.get("complete") is not True:
        raise BadInputError(f"{folder}: incomplete, the run that wrote it did not finish; remove it and run again")
    manifest = Manifest(_files(document.get("files"), where))
    for file in manifest.files:
        descriptor = find_inside(folder, file.path, system)
        if descriptor is None:
            raise BadInputError(f"{folder}: incomplete, {file.path} is missing")
        size = os.fstat(descriptor).st_size
        close_quietly(system, descriptor)
        if size != file.nbytes:
            raise BadInputError(
                f"{folder}: {file.path} has {size} bytes, its manifest says {file.nbytes}; it is incomplete or was "
                f"edited (to use it as it is, delete {MANIFEST})"
            )
    return manifest


def listed_files(folder: Path, system: System = SYSTEM) -> frozenset[str]:
    """The files that the manifest of a folder names, whatever their state; none when it cannot be read."""
    try:
        data = read_small(folder, MANIFEST, limits.SMALL_FILE_BYTES, system)
        document = parse_json(data or b"", str(folder / MANIFEST))
        return frozenset(file.path for file in _files(document.get("files"), str(folder / MANIFEST)))
    except BadInputError:
        return frozenset()


def verify_manifest(folder: Path, system: System = SYSTEM) -> Manifest:
    """Compare every file with its sha256. Raises BadInputError, also when there is no manifest."""
    manifest = read_manifest(folder, system)
    if manifest is None:
        raise BadInputError(f"{folder}: has no {MANIFEST}, so there is nothing to compare with")
    for file in manifest.files:
        found = sha256_of(folder, file.path, system)
        if found != file.sha256:
            raise BadInputError(f"{folder}: {file.path} has sha256 {found}, its manifest says {file.sha256}")
    return manifest


def sha256_of(folder: Path, name: str, system: System = SYSTEM) -> str:
    """Of a file inside `folder`, in hexadecimal, read in pieces. Raises BadInputError."""
    descriptor = open_inside(folder, name, system)
    digest, buffer, position = hashlib.sha256(), memoryview(bytearray(_CHUNK)), 0
    try:
        with reading(folder / name):
            while count := pread_fully(system, descriptor, buffer, position):
                digest.update(buffer[:count])
                position += count
    finally:
        close_quietly(system, descriptor)
    return digest.hexdigest()


def _files(value: Any, where: str) -> tuple[ManifestFile, ...]:
    if not isinstance(value, list):
        raise BadInputError(f"{where}: files must be a list")
    files = tuple(_file(item, where) for item in value)
    _refuse_twice([file.path for file in files], where)
    return files


def _file(item: Any, where: str) -> ManifestFile:
    fields = (item.get("path"), item.get("bytes"), item.get("sha256")) if isinstance(item, dict) else (None,) * 3
    path, nbytes, sha256 = fields
    if not isinstance(path, str) or type(nbytes) is not int or nbytes < 0 or not isinstance(sha256, str):
        raise BadInputError(f"{where}: each file needs path, bytes and sha256, found {str(item)[:80]}")
    why = refuse_name(path)
    if why is not None or not _SHA256.fullmatch(sha256):
        raise BadInputError(f"{where}: file {path!r}: {why or 'its sha256 is not 64 hexadecimal digits'}")
    return ManifestFile(path, nbytes, sha256)


def _refuse_twice(paths: Sequence[str], where: str) -> None:
    if len(set(paths)) != len(paths):
        raise BadInputError(f"{where}: a file is listed twice")
