"""One entry of the quantized state: the codes and parameters of one Linear, in one safetensors file.

It holds `codes` (rows, in // vector), each parameter under its own name, `column_groups` where columns were reordered,
and the arrays of the corrections. Its metadata name the grid, the shape, the corrections, the key and the sha256 of the
data.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.corrections import Correction, CorrectionSpec, make_correction, spec_of
from anyquant.core.dtypes import DTYPES
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.core.grid import Grid, Scope
from anyquant.core.qtensor import QTensor
from anyquant.store import limits
from anyquant.store.files import SourceFile
from anyquant.store.safetensors import read_header
from anyquant.store.safetensors_layout import NUMPY_NAMES, Entry, write_safetensors_header
from anyquant.store.system import SYSTEM, System, close_quietly, pread_fully, pwrite_fully, sync_folder, writing

SCHEMA = 1
CODES = "codes"
COLUMN_GROUPS = "column_groups"
SHARED = "_shared"  # ends the names of arrays that belong to all rows
PARTIAL = ".partial"
_FORMAT = "anyquant-state"
_KEY = re.compile(r"[0-9a-f]{64}")
_COUNTER = itertools.count()  # two Linears may be equal, and written at the same time
_SHAPE = re.compile(r"([1-9][0-9]{0,17}),([1-9][0-9]{0,17})")
_CORRECTION = re.compile(r"([a-z_]{1,32}):([0-9]{1,9})")
_NO_HASH = "0" * 64  # holds the place of the data's sha256 until the data is there
_CHUNK = 4 * limits.MIB


def canonical_json(value: Any) -> bytes:
    """The same bytes for equal values: sorted keys, no spaces; mappings, dataclasses and sequences become JSON.

    Raises AnyQuantError for what JSON cannot say, NaN included.
    """

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        if isinstance(item, Mapping):
            return dict(item)
        raise TypeError(f"{type(item).__name__} {item!r}")

    try:
        text = json.dumps(
            value, default=plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise AnyQuantError(f"cannot be written as JSON: {error}") from None
    return text.encode()


def entry_key(source: str, decision: Any, statistics: str, code_version: str) -> str:
    """sha256, hexadecimal, of all that determines an entry.

    `source` and `statistics` are hashes of the weights and of the calibration result ("" without), `decision` a
    mapping or dataclass with what steers the rounding, `code_version` changes whenever the same input may give other
    codes.
    """
    return hashlib.sha256(canonical_json([SCHEMA, source, decision, statistics, code_version])).hexdigest()


def entry_tensors(
    grid: Grid, shape: tuple[int, int], reordered: bool = False, corrections: Sequence[CorrectionSpec] = ()
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, safetensors dtype, shape) of everything an entry stores; `shape` is (out, in). Raises UnsupportedError."""
    reason = grid.refuses(shape)
    if reason is not None:
        raise UnsupportedError(f"{grid.name}: {reason}")
    rows, columns = shape
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        (CODES, _stored_name(grid.code_dtype), (rows, columns // grid.vector))
    ]
    for parameter in grid.parameters:
        tensors.append((parameter.name, _stored_name(parameter.dtype), parameter.shape(shape)))
    if reordered:
        tensors.append((COLUMN_GROUPS, "I32", (columns,)))
    for correction in corrections:
        for name, (dtype, size) in correction.arrays(shape).items():
            tensors.append((name, _stored_name(dtype), size))
    return tensors


def entry_header(
    grid: Grid, shape: tuple[int, int], corrections: Sequence[CorrectionSpec] = ()
) -> tuple[bytes, list[tuple[str, str, tuple[int, ...]]], list[int]]:
    """What planning needs of an entry before its key is known: header bytes (of final length), tensors, offsets."""
    tensors = entry_tensors(grid, shape, corrections=corrections)
    header, offsets = write_safetensors_header(tensors, _facts(_NO_HASH, grid, shape, corrections, _NO_HASH))
    return header, tensors, offsets


def _facts(
    key: str, grid: Grid, shape: tuple[int, int], corrections: Sequence[CorrectionSpec], digest: str
) -> dict[str, str]:
    return {
        "format": _FORMAT,
        "schema": str(SCHEMA),
        "key": key,
        "grid": grid.name,
        "shape": f"{shape[0]},{shape[1]}",
        "corrections": ",".join(f"{correction.kind}:{correction.rank}" for correction in corrections),
        "sha256": digest,
    }


def _stored_name(dtype: str) -> str:
    return NUMPY_NAMES[np.dtype(dtype).str.lstrip("<|")]


class EntryWriter:
    """One entry, filled by blocks of rows in any order and from any thread. Use as a context manager.

    The file has its final size from the start. Leaving the `with` block normally calls `finish`; an exception removes
    what was written.
    """

    def __init__(self, folder: Path, key: str, grid: Grid, shape: tuple[int, int], system: System) -> None:
        self.key, self.grid, self.shape = key, grid, shape
        self._folder, self._system = folder, system
        self._path = folder / f"{key}.{next(_COUNTER)}{PARTIAL}"
        self._guard = threading.Lock()
        self._written: list[tuple[int, int]] = []
        self._shared: dict[str, npt.NDArray[Any]] = {}
        self._descriptor: int | None = None
        self._offsets: dict[str, int] = {}
        self._tensors: list[tuple[str, str, tuple[int, ...]]] = []
        self._corrections: tuple[CorrectionSpec, ...] = ()

    def __enter__(self) -> "EntryWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.abort()

    def write(self, first_row: int, rows: QTensor) -> None:
        """Store a block of rows that starts at `first_row`. Tensor-wide values must be the same in every block.

        Raises OutputError, and AnyQuantError for a block that does not belong here.
        """
        count, columns = rows.shape
        if rows.grid.name != self.grid.name or columns != self.shape[1] or first_row + count > self.shape[0]:
            raise AnyQuantError(
                f"state entry {self.key[:12]}: rows {rows.shape} on {rows.grid.name} do not belong here"
            )
        with self._guard:
            descriptor = self._begin(rows)
            self._written.append((first_row, first_row + count))
        pieces = [(CODES, rows.codes, first_row)]
        pieces += [
            (parameter.name, rows.params[parameter.name], parameter.slice(first_row, count).start)
            for parameter in self.grid.parameters
            if parameter.scope is not Scope.TENSOR
        ]
        pieces += [(name, array, first_row) for name, array in _arrays(rows).items() if not name.endswith(SHARED)]
        with writing(self._path):
            for name, array, first in pieces:
                data = np.ascontiguousarray(array)
                place = self._offsets[name] + first * math.prod(data.shape[1:]) * data.itemsize
                pwrite_fully(self._system, descriptor, data, place)

    def finish(self) -> None:
        """Hash the data, make it durable and give the entry its name. Raises AnyQuantError when rows are missing."""
        expected = 0
        for start, stop in sorted(self._written):
            if start != expected:
                self.abort()
                raise AnyQuantError(f"state entry {self.key[:12]}: rows from {expected} are missing or written twice")
            expected = stop
        if expected != self.shape[0] or self._descriptor is None:
            self.abort()
            raise AnyQuantError(f"state entry {self.key[:12]}: rows from {expected} to {self.shape[0]} are missing")
        try:
            with writing(self._path):
                header, _ = write_safetensors_header(self._tensors, self._metadata(_NO_HASH))
                digest = _hash_from(self._system, self._descriptor, len(header))
                header, _ = write_safetensors_header(self._tensors, self._metadata(digest))
                pwrite_fully(self._system, self._descriptor, header, 0)
                self._system.fsync(self._descriptor)
                descriptor, self._descriptor = self._descriptor, None
                self._system.close(descriptor)
                self._system.rename(self._path, entry_path(self._folder, self.key))
                sync_folder(self._system, self._folder)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove what was written."""
        if self._descriptor is not None:
            close_quietly(self._system, self._descriptor)
            self._descriptor = None
        with contextlib.suppress(OSError):
            self._system.unlink(self._path)

    def _begin(self, rows: QTensor) -> int:
        """Create the file with the first block; compare what all blocks share with the later ones."""
        shared = {p.name: rows.params[p.name] for p in self.grid.parameters if p.scope is Scope.TENSOR}
        if rows.column_groups is not None:
            shared[COLUMN_GROUPS] = rows.column_groups
        shared |= {name: array for name, array in _arrays(rows).items() if name.endswith(SHARED)}
        corrections = tuple(spec_of(correction) for correction in rows.corrections)
        if self._descriptor is not None:
            same = shared.keys() == self._shared.keys() and corrections == self._corrections
            if not same or not all(np.array_equal(shared[name], self._shared[name]) for name in shared):
                raise AnyQuantError(f"state entry {self.key[:12]}: blocks of rows disagree about a tensor-wide value")
            return self._descriptor
        self._corrections = corrections
        self._tensors = entry_tensors(self.grid, self.shape, COLUMN_GROUPS in shared, corrections)
        header, offsets = write_safetensors_header(self._tensors, self._metadata(_NO_HASH))
        self._offsets = {name: offset for (name, _, _), offset in zip(self._tensors, offsets, strict=True)}
        payload = sum(DTYPES[dtype].size * math.prod(shape) for _, dtype, shape in self._tensors)
        with writing(self._path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._descriptor = self._system.open(self._path, flags)
            self._system.allocate(self._descriptor, len(header) + payload)
            pwrite_fully(self._system, self._descriptor, header, 0)
            for name, array in shared.items():
                pwrite_fully(self._system, self._descriptor, np.ascontiguousarray(array), self._offsets[name])
        self._shared = shared
        return self._descriptor

    def _metadata(self, digest: str) -> dict[str, str]:
        return _facts(self.key, self.grid, self.shape, self._corrections, digest)


class EntryReader:
    """A finished entry, opened by its key. Raises BadInputError when the file is not what its key and grid say."""

    def __init__(self, folder: Path, key: str, grids: Callable[[str], Grid], system: System = SYSTEM) -> None:
        self.key = key
        self.file = SourceFile.of(folder, entry_path(folder, key).name, system)
        entries, facts = read_header(self.file)
        found = (facts.get("format"), facts.get("schema"), facts.get("key"))
        shape = _SHAPE.fullmatch(facts.get("shape", ""))
        if found != (_FORMAT, str(SCHEMA), key) or shape is None:
            raise BadInputError(f"{self.file.path}: not an entry of the state with this key")
        self.shape = (int(shape[1]), int(shape[2]))
        self._entries: dict[str, Entry] = {entry.name: entry for entry in entries}
        self._digest = facts.get("sha256", "")
        try:
            self.grid = grids(facts.get("grid", ""))
            self._corrections = _corrections(facts.get("corrections", "?"), str(self.file.path))
            wanted = entry_tensors(self.grid, self.shape, COLUMN_GROUPS in self._entries, self._corrections)
        except AnyQuantError as error:  # an unknown grid, a shape that does not lie on it
            raise BadInputError(f"{self.file.path}: {error}") from None
        if {(entry.name, entry.dtype, entry.shape) for entry in entries} != set(wanted):
            raise BadInputError(f"{self.file.path}: its tensors are not those of {self.grid.name} {self.shape}")

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows [start, stop) as a QTensor; `start` begins a block of the grid. Raises BadInputError."""
        params = {}
        for parameter in self.grid.parameters:
            owners = parameter.slice(start, stop - start)
            params[parameter.name] = self._read(parameter.name, parameter.dtype, owners.start, owners.stop)
        groups = None
        if COLUMN_GROUPS in self._entries:
            groups = self._read(COLUMN_GROUPS, "int32", 0, 1).reshape(-1)
        codes = self._read(CODES, self.grid.code_dtype, start, stop)
        corrections = tuple(self._correction(spec, start, stop) for spec in self._corrections)
        return QTensor(self.grid, (stop - start, self.shape[1]), codes, params, groups, corrections)

    def _correction(self, spec: CorrectionSpec, start: int, stop: int) -> Correction:
        arrays = {
            name: self._read(name, dtype, *((0, size[0]) if name.endswith(SHARED) else (start, stop)))
            for name, (dtype, size) in spec.arrays(self.shape).items()
        }
        return make_correction(spec.kind, arrays, self.shape[1])

    def load(self) -> QTensor:
        """The whole matrix."""
        return self.rows(0, self.shape[0])

    def verify(self) -> None:
        """Compare the data with its sha256. Raises BadInputError."""
        digest = hashlib.sha256()
        position = min(entry.offset for entry in self._entries.values())
        while position < self.file.size:
            piece = self.file.read(position, min(_CHUNK, self.file.size - position), "the data")
            digest.update(piece)
            position += len(piece)
        if digest.hexdigest() != self._digest:
            raise BadInputError(f"{self.file.path}: the data do not have the sha256 that was recorded; remove the file")

    def _read(self, name: str, dtype: str, start: int, stop: int) -> npt.NDArray[Any]:
        entry = self._entries[name]
        width = entry.shape[-1]
        array = np.empty((stop - start, width), dtype=dtype)
        place = entry.offset + start * width * array.itemsize
        self.file.read_into(place, array.reshape(-1).view(np.uint8).data, f"{name} of rows {start} to {stop}")
        return array


def _arrays(rows: QTensor) -> dict[str, npt.NDArray[Any]]:
    """All arrays of all corrections. Raises AnyQuantError when there are two of one kind."""
    found = {name: array for correction in rows.corrections for name, array in correction.arrays().items()}
    if len({correction.kind for correction in rows.corrections}) != len(rows.corrections):
        raise AnyQuantError("a QTensor with two corrections of one kind cannot be stored")
    return found


def _corrections(text: str, where: str) -> tuple[CorrectionSpec, ...]:
    found = []
    for item in filter(None, text.split(",")):
        match = _CORRECTION.fullmatch(item)
        if match is None:
            raise BadInputError(f"{where}: {item[:40]!r} is not a correction")
        found.append(CorrectionSpec(match[1], int(match[2])))
    return tuple(found)


def entry_path(folder: Path, key: str) -> Path:
    """Where the entry `key` of the folder of entries lies. Raises BadInputError for what is not a key."""
    if not _KEY.fullmatch(key):
        raise BadInputError(f"{folder}: {key[:80]!r} is not the key of an entry (64 hexadecimal digits)")
    return folder / f"{key}.safetensors"


def _hash_from(system: System, descriptor: int, position: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    while count := pread_fully(system, descriptor, buffer, position):
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()
