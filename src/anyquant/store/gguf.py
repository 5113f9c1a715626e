"""GGUF files as Checkpoints: a bounded reader of versions 2 and 3, without the gguf library.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As ggml's own reader, this one wants the tensors in
the order of their offsets, each starting where the padding of the one before ends.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from anyquant.core.checkpoint import TensorSpec
from anyquant.core.dtypes import Bytes
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.store import limits
from anyquant.store.files import SourceFile, row_range
from anyquant.store.ggml_types import GGML_TYPES_BY_ID, GGML_TYPES_BY_NAME, GGMLType
from anyquant.store.gguf_metadata import UINT32, Cursor, NeedMoreError
from anyquant.store.system import SYSTEM, System

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_FIRST_READ = 8 * limits.MIB  # holds the metadata of most models
_LEAST_PAIR = 8 + 1 + 4 + 1  # length and text of a key, type, value
_LEAST_TENSOR = 8 + 1 + 4 + 4 + 8  # length and text of a name, rank, type, offset


@dataclass(frozen=True)
class GGUFTensor:
    """`shape` in numpy order, (out, in) for a matrix; `offset` in bytes from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """All but the data; `data_start` is where the first tensor lies."""

    version: int
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]
    alignment: int
    data_start: int


def read_gguf_header(file: SourceFile) -> GGUFHeader:
    """Read and check everything in front of the data. Raises BadInputError, UnsupportedError."""
    size = min(_FIRST_READ, file.size, limits.GGUF_METADATA_BYTES)
    while True:
        try:
            return _parse(Cursor(file.read(0, size, "the header"), file.size, str(file.path)), file.size)
        except NeedMoreError:
            size = min(4 * size, file.size, limits.GGUF_METADATA_BYTES)


def _parse(cursor: Cursor, file_size: int) -> GGUFHeader:
    version = _version(cursor)
    tensors, pairs = cursor.u64("the number of tensors"), cursor.u64("the number of metadata pairs")
    if tensors > limits.TENSORS:
        raise BadInputError(f"{cursor.where}: {tensors} tensors, at most {limits.TENSORS} are read")
    cursor.expect(pairs, _LEAST_PAIR, "metadata pairs")
    cursor.expect(tensors, _LEAST_TENSOR, "tensors")
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for _ in range(pairs):
        key = cursor.text(limits.GGUF_KEY_BYTES, "a metadata key")
        if not key or key in metadata:
            raise BadInputError(f"{cursor.where}: the metadata key {key!r} {'occurs twice' if key else 'is empty'}")
        kind, metadata[key] = cursor.value(key)
        if key == "general.alignment":
            alignment = _alignment(kind, metadata[key], cursor.where)
    infos = [_tensor_info(cursor) for _ in range(tensors)]
    data_start = _padded(cursor.position, alignment)
    placed = _place(infos, data_start, alignment, file_size, cursor.where)
    return GGUFHeader(version, metadata, placed, alignment, data_start)


def _version(cursor: Cursor) -> int:
    start = cursor.claim(4, "the magic number")
    if cursor.data[start : start + 4] != MAGIC:
        raise BadInputError(f"{cursor.where}: does not start with 'GGUF'; this is not a GGUF file")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise UnsupportedError(f"{cursor.where}: a big-endian GGUF file; convert it to little-endian first")
    if version not in (2, 3):
        raise UnsupportedError(f"{cursor.where}: GGUF version {version}; versions 2 and 3 are read")
    return version


def _alignment(kind: int, value: Any, where: str) -> int:
    least, most = limits.GGUF_ALIGNMENT_LEAST, limits.GGUF_ALIGNMENT_MOST
    if kind != UINT32 or not least <= value <= most or value & (value - 1):
        raise BadInputError(
            f"{where}: general.alignment is {str(value)[:40]} (type {kind}), expected a 32-bit power of two from "
            f"{least} to {most}"
        )
    return int(value)


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _tensor_info(cursor: Cursor) -> GGUFTensor:
    """One tensor; its `offset` is still relative to the data."""
    name = cursor.text(limits.GGUF_NAME_BYTES, "a tensor name")
    where = f"{cursor.where}: tensor {name!r}"
    rank = cursor.u32("a number of dimensions")
    if not name or rank > limits.GGUF_RANK:
        raise BadInputError(f"{where}: has {rank} dimensions, at most {limits.GGUF_RANK}; its name may not be empty")
    shape = tuple(cursor.u64("a dimension") for _ in range(rank))[::-1]
    kind = _kind(cursor.u32("a tensor type"), where)
    if math.prod(size for size in shape if size) * 8 > limits.ELEMENTS:
        raise BadInputError(f"{where}: shape {shape} is too large for any file")
    if (shape[-1] if shape else 1) % kind.block:
        raise BadInputError(f"{where}: rows of {shape[-1:]} weights are not whole blocks of {kind.name} ({kind.block})")
    nbytes = math.prod(shape) // kind.block * kind.nbytes
    return GGUFTensor(name, kind.name, shape, cursor.u64("a tensor offset"), nbytes)


def _kind(number: int, where: str) -> GGMLType:
    try:
        return GGML_TYPES_BY_ID[number]
    except KeyError:
        raise UnsupportedError(f"{where}: element type {number} is not one that GGUF files have today") from None


def _place(
    infos: list[GGUFTensor], data_start: int, alignment: int, file_size: int, where: str
) -> tuple[GGUFTensor, ...]:
    """The tensors with offsets from the start of the file, after checking that they cover the data in order."""
    placed, names = [], set()
    position = end = data_start
    for info in infos:
        if info.name in names:
            raise BadInputError(f"{where}: the tensor {info.name!r} occurs twice")
        names.add(info.name)
        if data_start + info.offset != position:
            raise BadInputError(
                f"{where}: tensor {info.name!r} lies at {info.offset} of the data, expected {position - data_start}"
            )
        end = position + info.nbytes
        if end > file_size:
            raise BadInputError(
                f"{where}: tensor {info.name!r} ends at {end}, the file at {file_size}; is it complete?"
            )
        placed.append(GGUFTensor(info.name, info.type, info.shape, position, info.nbytes))
        position = _padded(end, alignment)
    if file_size > max(position, _padded(data_start, alignment)):
        raise BadInputError(f"{where}: {file_size - position} bytes stand behind the last tensor")
    return tuple(placed)


class GGUFFile:
    """A Checkpoint over one GGUF file. `spec(name).dtype` is the GGML type name ("Q4_K"), `nbytes` is exact.

    Rows are rows of blocks: `columns / block * block bytes` each.
    """

    def __init__(self, path: Path, system: System = SYSTEM) -> None:
        self.file = SourceFile.of(path, "", system)
        self.location = str(path)
        self.header = read_gguf_header(self.file)
        self.tensors: Mapping[str, GGUFTensor] = {tensor.name: tensor for tensor in self.header.tensors}

    @property
    def config(self) -> Mapping[str, Any]:
        """Empty: a GGUF file keeps its configuration in `metadata`."""
        return MappingProxyType({})

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Keys to Python values; arrays are `gguf_metadata.Array`, which behaves as a list and decodes when read."""
        return self.header.metadata

    def text_file(self, name: str) -> bytes | None:
        """Always None: the file stands alone, and what lies beside it is not part of it."""
        return None

    @property
    def alignment(self) -> int:
        return self.header.alignment

    @property
    def data_start(self) -> int:
        return self.header.data_start

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        tensor = self._tensor(name)
        return TensorSpec(tensor.name, tensor.type, tensor.shape, tensor.nbytes)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        """Rows [start, stop) as stored; see core.checkpoint.Checkpoint."""
        tensor, spec = self._tensor(name), self.spec(name)
        kind = GGML_TYPES_BY_NAME[tensor.type]
        row_bytes = spec.row_length // kind.block * kind.nbytes
        view = row_range(spec, start, stop, row_bytes, buffer)
        self.file.read_into(tensor.offset + start * row_bytes, view, f"tensor {name!r}")

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise BadInputError(f"{self.location}: has no tensor {name!r}") from None
