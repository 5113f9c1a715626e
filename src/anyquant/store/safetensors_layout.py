"""The header of a safetensors file: what may stand in it, written and read.

Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors without holes, in the order of their
offsets (https://github.com/huggingface/safetensors, README).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.dtypes import DTYPES
from anyquant.core.errors import AnyQuantError, BadInputError
from anyquant.store import limits
from anyquant.store.strict_json import natural, parse_json

METADATA = "__metadata__"
# bits of one element; those beyond core.dtypes are stored and carried, never computed with
BITS = {name: 8 * dtype.size for name, dtype in DTYPES.items()} | {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "C64": 64,
}
# numpy type of an array in memory to its safetensors name
NUMPY_NAMES = {
    np.dtype(storage).str.lstrip("<|"): name
    for name, storage in {
        **{name: dtype.numpy for name, dtype in DTYPES.items() if not name.startswith(("F8", "BF"))},
        "BOOL": "?",
    }.items()
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def write_safetensors_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Header of a file that will hold `tensors`, each (name, safetensors dtype, shape).

    Returns the header bytes (with the leading length, a multiple of 8) and the offset of each tensor from the start of
    the file, in the given order. Tensors lie by falling element size, otherwise as given, so that each is aligned to
    its element, which torch's reader needs. The file ends with the last tensor. Raises AnyQuantError.
    """
    names = [name for name, _, _ in tensors]
    if len(set(names)) != len(names) or METADATA in names:
        raise AnyQuantError(f"safetensors header: tensor names must be unique and not {METADATA}")
    sizes = [_tensor_bytes(name, dtype, shape) for name, dtype, shape in tensors]
    order = sorted(range(len(tensors)), key=lambda index: -BITS[tensors[index][1]])
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    begins, position = [0] * len(tensors), 0
    for index in order:
        name, dtype, shape = tensors[index]
        begins[index] = position
        position += sizes[index]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begins[index], position]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > limits.SAFETENSORS_HEADER_BYTES:
        raise AnyQuantError(f"safetensors header: {len(text)} bytes exceed the format's limit; write more shards")
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + begin for begin in begins]


def _tensor_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    bits = math.prod(shape) * BITS.get(dtype, 0)
    if dtype not in BITS or bits % 8:
        raise AnyQuantError(f"safetensors header: {name} of type {dtype} and shape {shape} cannot be stored")
    return bits // 8


def parse_safetensors_header(text: bytes, file_size: int, where: str) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Entries in the order of their data, and the metadata, of the JSON `text` of a file of `file_size` bytes.

    Raises BadInputError unless the entries cover the data exactly: no hole, no overlap, nothing behind the last.
    """
    if not text.startswith(b"{"):
        raise BadInputError(f"{where}: the header does not start with '{{'; this is not a safetensors file")
    header = parse_json(text, where, parse_int=natural)
    metadata = _metadata(header.pop(METADATA, {}), where)
    if len(header) > limits.TENSORS:
        raise BadInputError(f"{where}: {len(header)} tensors, at most {limits.TENSORS} are read")
    start = 8 + len(text)
    entries = sorted((_entry(name, facts, start, where) for name, facts in header.items()), key=_place)
    position = start
    for entry in entries:
        if entry.offset != position:
            problem = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            raise BadInputError(f"{where}: tensor {entry.name!r} {problem}")
        position += entry.nbytes
    if position != file_size:
        raise BadInputError(f"{where}: the header describes {position} bytes, the file has {file_size}")
    return tuple(entries), metadata


def _place(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.nbytes


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise BadInputError(f"{where}: {METADATA} must map strings to strings")
    return value


def _entry(name: str, facts: Any, start: int, where: str) -> Entry:
    def refuse(problem: str) -> BadInputError:
        return BadInputError(f"{where}: tensor {name[:80]!r}: {problem}")

    if len(name.encode()) > limits.NAME_BYTES:
        raise refuse(f"its name is longer than {limits.NAME_BYTES} bytes")
    if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise refuse(f"unknown element type {dtype!r}; known: {', '.join(BITS)}")
    if not _naturals(shape) or len(shape) > limits.RANK:
        raise refuse(f"shape {str(shape)[:80]} must be at most {limits.RANK} whole numbers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {str(offsets)[:80]} must be two rising whole numbers")
    if math.prod(size for size in shape if size) * 8 > limits.ELEMENTS:
        raise refuse(f"shape {shape} is too large for any file")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * BITS[dtype] != 8 * nbytes:
        raise refuse(f"{dtype} {shape} does not fill the {nbytes} bytes of its data_offsets")
    return Entry(name, dtype, tuple(shape), start + offsets[0], nbytes)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
