"""The key-value part of a GGUF file: a cursor over its bytes, and arrays that are decoded when they are asked for.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.store import limits

UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
# value type id to numpy type
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    UINT32: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from


class NeedMoreError(Exception):
    """The bytes at hand end before what is being read, but the file does not."""


class Array(Sequence[Any]):
    """An array of the metadata: numbers, booleans or strings, decoded on access. Equal to a list of its values."""

    def __init__(self, values: "npt.NDArray[Any] | Strings") -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        chosen = self._values[index]
        return chosen.tolist() if isinstance(chosen, np.ndarray | np.generic) else chosen

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array | list | tuple) and len(self) == len(other) and self.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Array of {len(self)}: {self[:3]!r}..."

    def tolist(self) -> list[Any]:
        """All values, as Python objects. Raises BadInputError for text that is not UTF-8."""
        return self._values.tolist()


class Strings:
    """Strings inside `data`; string i is preceded by its 8-byte length, which starts at `marks[i]`."""

    def __init__(self, data: bytes, marks: npt.NDArray[np.int64], where: str) -> None:
        self._data, self._marks, self._where = data, marks, where

    def __len__(self) -> int:
        return len(self._marks) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._text(i) for i in range(*index.indices(len(self)))]
        return self._text(range(len(self))[index])

    def _text(self, index: int) -> str:
        return decode_text(self._data[self._marks[index] + 8 : self._marks[index + 1]], self._where)

    def tolist(self) -> list[str]:
        marks, data = self._marks.tolist(), self._data
        try:
            return [data[a + 8 : b].decode() for a, b in itertools.pairwise(marks)]
        except UnicodeDecodeError:
            raise BadInputError(f"{self._where}: holds text that is not UTF-8") from None


def decode_text(raw: bytes, where: str) -> str:
    """UTF-8, strictly. Raises BadInputError."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadInputError(f"{where}: holds text that is not UTF-8: {raw[:40]!r}") from None


class Cursor:
    """Reads forward through `data`, the first bytes of a file of `size` bytes.

    What a count or length claims is compared with `size` before anything is made from it.
    """

    def __init__(self, data: bytes, size: int, where: str) -> None:
        self.data, self.where = data, where
        self.end = min(size, limits.GGUF_METADATA_BYTES)
        self.position = 0

    def claim(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` and return where they start. Raises BadInputError, NeedMoreError."""
        start = self.position
        stop = start + nbytes
        if stop > len(self.data):
            if stop > self.end:
                raise BadInputError(
                    f"{self.where}: {what} takes {nbytes} bytes at {start}, but the file (or the allowed metadata) "
                    f"ends at {self.end}"
                )
            raise NeedMoreError
        self.position = stop
        return start

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuse `count` items of at least `least` bytes each that cannot be in the file."""
        if self.position + count * least > self.end:
            raise BadInputError(f"{self.where}: {count} {what} cannot be in a file that ends at {self.end}")

    def u32(self, what: str) -> int:
        return int(_U32(self.data, self.claim(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64(self.data, self.claim(8, what))[0])

    def text(self, most: int, what: str) -> str:
        length = self.u64(what)
        if length > most:
            raise BadInputError(f"{self.where}: {what} is {length} bytes long, at most {most} are read")
        start = self.claim(length, what)
        return decode_text(self.data[start : start + length], f"{self.where}: {what}")

    def value(self, key: str) -> tuple[int, Any]:
        """Type id and value of one pair."""
        what = f"the value of {key[:80]!r}"
        kind = self.u32(what)
        if kind == _STRING:
            return kind, self.text(limits.GGUF_STRING_BYTES, what)
        if kind == _ARRAY:
            return kind, self._array(what)
        return kind, self._numbers(kind, 1, what)[0].item()

    def _array(self, what: str) -> Array:
        kind, count = self.u32(what), self.u64(what)
        if kind == _ARRAY:
            raise UnsupportedError(f"{self.where}: {what} is an array of arrays, which no known model has")
        if count > limits.GGUF_ARRAY_ITEMS:
            raise BadInputError(f"{self.where}: {what} has {count} items, at most {limits.GGUF_ARRAY_ITEMS} are read")
        return Array(self._strings(count, what) if kind == _STRING else self._numbers(kind, count, what))

    def _numbers(self, kind: int, count: int, what: str) -> npt.NDArray[Any]:
        if kind not in _NUMBERS:
            raise BadInputError(f"{self.where}: {what} has the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        start = self.claim(count * dtype.itemsize, what)
        if kind == _BOOL:
            raw = np.frombuffer(self.data, np.uint8, count, start)
            if count and raw.max() > 1:
                raise BadInputError(f"{self.where}: {what} is neither true nor false: {raw.max()}")
        return np.frombuffer(self.data, dtype, count, start)

    def _strings(self, count: int, what: str) -> Strings:
        self.expect(count, 8, f"strings ({what})")
        data, position = self.data, self.position
        marks: list[int] = []
        mark = marks.append
        try:
            for _ in range(count):
                mark(position)
                position += 8 + _U64(data, position)[0]
        except (struct.error, OverflowError):  # the next length lies behind the data: let claim say which way
            position += 8
        self.claim(position - self.position, what)
        mark(position)
        marked = np.array(marks, dtype=np.int64)
        if count and int(np.diff(marked).max()) - 8 > limits.GGUF_STRING_BYTES:
            raise BadInputError(f"{self.where}: {what} holds a string longer than {limits.GGUF_STRING_BYTES} bytes")
        strings = Strings(data, marked, f"{self.where}: {what}")
        if not data[marks[0] : position].isascii():
            strings.tolist()  # refuses what is not UTF-8 now rather than at some later access
        return strings
