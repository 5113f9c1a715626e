"""What a long run has done so far: a hidden folder beside the output, kept until the output is published.

A run that was killed finds it again when it is started with the same model, recipe, text and versions, and goes on
after the last finished block; the result is the same to the byte. Anything else starts anew.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import AnyQuantError
from anyquant.formats.folder.stored import StoredFolder
from anyquant.grids import grid as find_grid
from anyquant.pipeline.decoded import DecodedSource
from anyquant.store.journal import Journal
from anyquant.store.state import EntryReader, StateWriter, canonical_json
from anyquant.store.system import SYSTEM, remove_tree
from anyquant.transforms.merge import Merged

IDENTITY = "identity.json"
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Record:
    """What one finished stage of a run left: entry keys by Linear, further arrays, and what is to be said of it.

    `states` is the sha256 of the live activations after it, "" when there are none.
    """

    entries: Mapping[str, str]
    arrays: Arrays = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    states: str = ""


class Work:
    """Holds the folder until `close`. `identity` is plain JSON that tells runs apart."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        data = canonical_json(identity)
        if folder.exists() and self._identity() != data:
            remove_tree(SYSTEM, folder)
        self.entries = StateWriter(folder)
        self._journal = Journal(folder)
        self._journal.write(IDENTITY, [data])

    def finished(self) -> list[Record]:
        """The records of the stages that are done, from the first on; they end where one is missing or damaged."""
        found: list[Record] = []
        while (record := self._read(len(found))) is not None:
            found.append(record)
        return found

    def record(self, index: int, record: Record) -> None:
        """Stage `index` is done. The states of the stage before it are removed."""
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **dict(record.arrays))
        self._journal.write(f"stage-{index}.npz", [packed.getvalue()])
        facts = {"entries": dict(record.entries), "notes": list(record.notes), "states": record.states}
        self._journal.write(f"stage-{index}.json", [canonical_json(facts)])
        if index:
            self._journal.remove(self.states(index - 1).name)

    def states(self, index: int) -> Path:
        """Where the live activations after stage `index` belong."""
        return self.folder / f"states-{index}.bin"

    def entry(self, key: str) -> EntryReader:
        """A finished entry."""
        return self.entries.read(key, find_grid)

    def close(self) -> None:
        """Let go of the folder, which stays."""
        self.entries.close()

    def _identity(self) -> bytes | None:
        try:
            return Journal(self.folder).read(IDENTITY)
        except (AnyQuantError, OSError):
            return None

    def _read(self, index: int) -> Record | None:
        try:
            facts, packed = (self._journal.read(f"stage-{index}.{kind}") for kind in ("json", "npz"))
            if facts is None or packed is None:
                return None
            table = json.loads(facts)
            with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
                kept = {name: arrays[name] for name in arrays.files}
            sound = all(self.entries.has(key, find_grid) for key in table["entries"].values())
            return Record(table["entries"], kept, tuple(table["notes"]), table["states"]) if sound else None
        except (AnyQuantError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, BadZipFile):
            return None


def source_paths(source: Checkpoint) -> list[Path]:
    """Where a model is read from: its folder or file, and that of an adapter."""
    return [Path(source.location), *([source.folder] if isinstance(source, Merged) else [])]


def stored_bytes(source: Checkpoint) -> int:
    """Bytes of a model's tensors on disk: packed, where they are quantized. Of a GGUF, those of the file."""
    if isinstance(source, DecodedSource):
        return Path(source.decoded.location).stat().st_size
    stored = source.stored if isinstance(source, StoredFolder) else source
    return sum(stored.spec(name).nbytes for name in stored.names())


def source_identity(source: Checkpoint) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of the files of a model: changed files begin a new run."""
    files = [file for path in source_paths(source) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
