"""Checkpoints in safetensors: one file, or a folder with an index of shards. Headers are read, data only when asked."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from anyquant.core.checkpoint import TensorSpec
from anyquant.core.dtypes import Bytes
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.store import limits
from anyquant.store.files import SourceFile, read_small, row_range
from anyquant.store.safetensors_layout import BITS, Entry, parse_safetensors_header
from anyquant.store.strict_json import parse_json
from anyquant.store.system import SYSTEM, System

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_header(file: SourceFile) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Tensors, in the order of their data, and metadata of one safetensors file. Raises BadInputError."""
    where = str(file.path)
    if file.size < 8:
        raise BadInputError(f"{where}: {file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8, "the length of the header"), "little")
    if length > limits.SAFETENSORS_HEADER_BYTES:
        raise BadInputError(f"{where}: a header of {length} bytes exceeds {limits.SAFETENSORS_HEADER_BYTES}")
    if 8 + length > file.size:
        raise BadInputError(f"{where}: a header of {length} bytes, but the file has {file.size}; is it complete?")
    return parse_safetensors_header(file.read(8, length, "the header"), file.size, where)


class SafetensorsCheckpoint:
    """A Checkpoint over `folder`, or over the one `file` of it.

    Tensors come shard by shard (shards by name), in the order of their data, so that reading them in order reads the
    disk in order. Raises BadInputError when a header lies, a shard is missing, or index and shards disagree.
    """

    def __init__(self, folder: Path, file: str | None = None, system: System = SYSTEM) -> None:
        self.folder = folder
        self.location = str(folder if file is None else folder / file)
        self._system = system
        self._places: dict[str, tuple[SourceFile, Entry]] = {}
        self._metadata: dict[str, str] = {}
        weight_map = None if file is not None else self._index()
        shards = sorted(set(weight_map.values())) if weight_map is not None else [file or self._only_file()]
        for shard in shards:
            self._add(shard)
        if weight_map is not None:
            self._compare(weight_map)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`config.json` of the folder; empty when there is none. Raises BadInputError when it is damaged."""
        data = self.text_file("config.json")
        return {} if data is None else parse_json(data, str(self.folder / "config.json"))

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of all shards, merged."""
        return self._metadata

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The weight files, by name."""
        return tuple(dict.fromkeys(file for file, _ in self._places.values()))

    def names(self) -> Sequence[str]:
        return list(self._places)

    def spec(self, name: str) -> TensorSpec:
        entry = self._place(name)[1]
        return TensorSpec(entry.name, entry.dtype, entry.shape, entry.nbytes)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        """Rows [start, stop) as stored; see core.checkpoint.Checkpoint."""
        file, entry = self._place(name)
        spec = self.spec(name)
        row_bits = spec.row_length * BITS[entry.dtype]
        if row_bits % 8:
            raise UnsupportedError(f"{file.path}: rows of {name!r} ({entry.dtype}) do not start at whole bytes")
        view = row_range(spec, start, stop, row_bits // 8, buffer)
        file.read_into(entry.offset + start * (row_bits // 8), view, f"tensor {name!r}")

    def text_file(self, name: str) -> bytes | None:
        """A small companion file (tokenizer.json, chat_template.jinja ...), or None. Raises BadInputError."""
        return read_small(self.folder, name, limits.SMALL_FILE_BYTES, self._system)

    def _place(self, name: str) -> tuple[SourceFile, Entry]:
        try:
            return self._places[name]
        except KeyError:
            raise BadInputError(f"{self.location}: has no tensor {name!r}") from None

    def _index(self) -> dict[str, str] | None:
        """The weight map, or None for a folder with a single file (which then wins, as in transformers)."""
        if (self.folder / SINGLE).exists():
            return None
        data = self.text_file(INDEX)
        if data is None:
            return None
        where = str(self.folder / INDEX)
        weight_map = parse_json(data, where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInputError(f"{where}: weight_map must map tensor names to shard files")
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
                raise BadInputError(f"{where}: tensor {tensor!r}: {shard!r} is not the plain name of a shard")
        if len(set(weight_map.values())) > limits.SHARDS:
            raise BadInputError(f"{where}: more than {limits.SHARDS} shards")
        return weight_map

    def _only_file(self) -> str:
        found = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if len(found) != 1:
            problem = f"has {len(found)} safetensors files and no {INDEX}" if found else "has no safetensors file"
            raise BadInputError(f"{self.folder}: {problem}; expected {SINGLE}, or shards with their index")
        return found[0]

    def _add(self, shard: str) -> None:
        file = SourceFile.of(self.folder, shard, self._system)
        entries, metadata = read_header(file)
        self._metadata.update(metadata)
        for entry in entries:
            if entry.name in self._places:
                other = self._places[entry.name][0].name
                raise BadInputError(f"{self.folder}: tensor {entry.name!r} is stored in {other} and in {shard}")
            self._places[entry.name] = (file, entry)
        if len(self._places) > limits.TENSORS:
            raise BadInputError(f"{self.folder}: more than {limits.TENSORS} tensors")

    def _compare(self, weight_map: Mapping[str, str]) -> None:
        for tensor, shard in weight_map.items():
            place = self._places.get(tensor)
            if place is None or place[0].name != shard:
                found = "no shard has it" if place is None else f"it is in {place[0].name}"
                raise BadInputError(f"{self.folder / INDEX}: tensor {tensor!r} should be in {shard}, but {found}")
