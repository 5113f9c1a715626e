"""Damaged GGUF files, made here: each a (name, bytes, error) that the reader must refuse with that error."""

import struct
from collections.abc import Sequence

from anyquant.core.errors import BadInputError, UnsupportedError

Case = tuple[str, bytes, type[Exception]]
UINT8, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 5, 6, 7, 8, 9, 10
F32, Q4_0, Q4_K = 0, 2, 12


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes | str, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def pair(key: bytes | str, kind: int, raw: bytes) -> bytes:
    return text(key) + u32(kind) + raw


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + raw


def info(name: bytes | str = "a", dims: Sequence[int] = (2,), kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def file(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
    start: bytes = b"GGUF" + u32(3),
    alignment: int = 32,
) -> bytes:
    """A file that claims `counts` (tensors, pairs); `data` starts at a multiple of `alignment`."""
    tensors, values = counts or (len(infos), len(pairs))
    head = start + u64(tensors) + u64(values) + b"".join(pairs) + b"".join(infos)
    return head + (bytes(-len(head) % alignment) if infos else b"") + data


WORD = pair("general.name", STRING, text("x"))
SOUND = file([WORD], [info()], bytes(32))


def _heads() -> dict[str, bytes]:
    return {
        "empty file": b"",
        "three bytes": b"GGU",
        "magic only": b"GGUF",
        "magic and version": b"GGUF" + u32(3),
        "no pair count": b"GGUF" + u32(3) + u64(0),
        "magic wrong": b"GGUG" + SOUND[4:],
        "magic of ggml": b"lmgg" + SOUND[4:],
        "magic reversed": b"FUGG" + SOUND[4:],
        "safetensors": u64(2) + b"{}" + bytes(20),
        "tensor count 2^64 - 1": file([WORD], [info()], bytes(32), counts=((1 << 64) - 1, 1)),
        "tensor count 2^63": file([WORD], [info()], bytes(32), counts=(1 << 63, 1)),
        "tensor count one more": file([WORD], [info()], b"", counts=(2, 1)),
        "tensor count beyond the limit": file([], [], bytes(1000), counts=(1_000_001, 0)),
        "pair count 2^64 - 1": file([WORD], [info()], bytes(32), counts=(1, (1 << 64) - 1)),
        "pair count 2^60": file([WORD], [info()], bytes(32), counts=(1, 1 << 60)),
        "pair count one more": file([WORD], [info()], bytes(32), counts=(1, 2)),
        "pair count one less": file([WORD], [info()], bytes(32), counts=(1, 0)),
        "both counts 2^63": file([WORD], [info()], bytes(32), counts=(1 << 63, 1 << 63)),
    } | {
        f"truncated to {length} bytes": SOUND[:length]
        for length in (23, 25, 31, 40, 44, 50, 57, 62, 70, 74, 80, 90, 95)
        if length < len(file([WORD], [info()])) + 1
    }


def _versions() -> dict[str, bytes]:
    return {
        f"version {version}": file([WORD], [info()], bytes(32), start=b"GGUF" + u32(version))
        for version in (0, 1, 4, 0x03000000, 0xFFFFFFFF)
    } | {
        "removed type Q4_2": file([], [info(dims=(32,), kind=4)], bytes(32)),
        "removed type Q4_0_4_4": file([], [info(dims=(32,), kind=31)], bytes(32)),
        "type of the future": file([], [info(dims=(32,), kind=1000)], bytes(32)),
        "type 2^32 - 1": file([], [info(dims=(32,), kind=(1 << 32) - 1)], bytes(32)),
        "array of arrays": file([pair("x", ARRAY, array(ARRAY, 1, array(UINT8, 1, b"x")))]),
        "array of arrays, 2^60 of them": file([pair("x", ARRAY, array(ARRAY, 1 << 60))]),
        "arrays nested 1,000 deep": file([pair("x", ARRAY, (u32(ARRAY) + u64(1)) * 1000)]),
    }


def _pairs() -> dict[str, bytes]:
    rest = bytes(64)
    return {
        "key length 2^64 - 1": file([text("k", (1 << 64) - 1) + rest]),
        "key length 2^63": file([text("k", 1 << 63) + rest]),
        "key length beyond the file": file([text("k", 1000) + rest]),
        "key of 65,536 bytes": file([pair("k" * 65_536, UINT8, b"x")]),
        "key empty": file([pair("", UINT8, b"x")]),
        "key not utf-8": file([pair(b"\xff\xfe", UINT8, b"x")]),
        "key twice": file([WORD, WORD]),
        "key twice with another type": file([pair("k", UINT8, b"x"), pair("k", UINT32, u32(1))]),
        "value type 13": file([pair("k", 13, rest)]),
        "value type 2^32 - 1": file([pair("k", (1 << 32) - 1, rest)]),
        "value cut": file([pair("k", UINT64, b"xxxx")]),
        "truth value 2": file([pair("k", BOOL, b"\x02")]),
        "truth value 255": file([pair("k", BOOL, b"\xff")]),
        "truth value 2 in an array": file([pair("k", ARRAY, array(BOOL, 3, b"\x00\x01\x02"))]),
        "string length 2^64 - 1": file([pair("k", STRING, text("x", (1 << 64) - 1))]),
        "string length 2^64 - 8": file([pair("k", STRING, text("x", (1 << 64) - 8))]),
        "string length one more": file([pair("k", STRING, text("x", 2))]),
        "string longer than 16 MiB": file([pair("k", STRING, text("x", (16 << 20) + 1))]),
        "string not utf-8": file([pair("k", STRING, text(b"\xc3\x28"))]),
        "array type 13": file([pair("k", ARRAY, array(13, 1, rest))]),
        "array count 2^64 - 1": file([pair("k", ARRAY, array(UINT8, (1 << 64) - 1, rest))]),
        "array count 2^61": file([pair("k", ARRAY, array(UINT64, 1 << 61, rest))]),
        "array count 2^62 of strings": file([pair("k", ARRAY, array(STRING, 1 << 62, rest))]),
        "array count over the limit": file([pair("k", ARRAY, array(UINT8, 16_000_001, rest))]),
        "array count one more": file([pair("k", ARRAY, array(UINT32, 17, rest))]),
        "array of strings, count one more": file([pair("k", ARRAY, array(STRING, 2, text("x")))]),
        "array of strings, count 10 million": file([pair("k", ARRAY, array(STRING, 10_000_000, rest))]),
        "array of strings, second length 2^64 - 1": file(
            [pair("k", ARRAY, array(STRING, 2, text("x") + text("y", (1 << 64) - 1)))]
        ),
        "array of strings, lengths that turn back": file(
            [pair("k", ARRAY, array(STRING, 3, text("x", (1 << 64) - 9) + rest))]
        ),
        "array of strings, one not utf-8": file([pair("k", ARRAY, array(STRING, 2, text("x") + text(b"\xff")))]),
        "array without a count": file([text("k") + u32(ARRAY) + u32(UINT8)]),
    }


def _alignments() -> dict[str, bytes]:
    def aligned(kind: int, raw: bytes) -> bytes:
        return file([pair("general.alignment", kind, raw)], [info()], bytes(32))

    values = {value: aligned(UINT32, u32(value)) for value in (0, 1, 3, 4, 12, 33, 131_072, 1 << 31, (1 << 32) - 1)}
    return {f"alignment {value}": content for value, content in values.items()} | {
        "alignment of 64 bits": aligned(UINT64, u64(32)),
        "alignment signed": aligned(INT32, u32(32)),
        "alignment a string": aligned(STRING, text("32")),
        "alignment an array": aligned(ARRAY, array(UINT32, 1, u32(32))),
        "alignment a float": aligned(FLOAT32, struct.pack("<f", 32.0)),
        "alignment true": aligned(BOOL, b"\x01"),
    }


def _tensors() -> dict[str, bytes]:
    shapes = {
        "dims that wrap to zero": (1 << 32, 1 << 32),
        "dims that wrap to 8 bytes": ((1 << 62) + 2,),
        "dims of 2^64 - 1": ((1 << 64) - 1,),
        "dims of 2^63, a negative number": (1 << 63,),
        "dims of 2^62 and 2": (1 << 62, 2),
        "dims of four times 2^16": (1 << 16,) * 4,
        "dims of 2^40": (1 << 40,),
        "zero hides an overflow": (0, 1 << 63, 4),
        "dims one larger than the data": (33,),
        "five dims": (1,) * 5,
        "a hundred dims": (1,) * 100,
    }
    return {name: file([], [info(dims=dims)], bytes(32)) for name, dims in shapes.items()} | {
        "rank 2^32 - 1": file([], [text("a") + u32((1 << 32) - 1) + bytes(64)], bytes(32)),
        "name of 64 bytes": file([], [info("x" * 64)], bytes(32)),
        "name length 2^64 - 1": file([], [text("x", (1 << 64) - 1) + bytes(64)]),
        "name empty": file([], [info("")], bytes(32)),
        "name not utf-8": file([], [info(b"\xff")], bytes(32)),
        "name twice": file([], [info("a"), info("a", offset=32)], bytes(64)),
        "rows that are not whole blocks": file([], [info(dims=(31,), kind=Q4_0)], bytes(32)),
        "rows of half a super-block": file([], [info(dims=(128, 2), kind=Q4_K)], bytes(160)),
        "whole blocks only over two rows": file([], [info(dims=(16, 2), kind=Q4_0)], bytes(32)),
        "offset not aligned": file([], [info(offset=4)], bytes(64)),
        "offset beyond the file": file([], [info(offset=3200)], bytes(32)),
        "offset 2^64 - 32": file([], [info(offset=(1 << 64) - 32)], bytes(32)),
        "offset 2^63": file([], [info(offset=1 << 63)], bytes(32)),
        "hole at the start": file([], [info(offset=32)], bytes(64)),
        "hole between": file([], [info("a"), info("b", offset=64)], bytes(96)),
        "two at one place": file([], [info("a"), info("b")], bytes(32)),
        "overlap": file([], [info("a", dims=(16,)), info("b", offset=32)], bytes(96)),
        "order turned": file([], [info("a", offset=32), info("b")], bytes(64)),
        "data cut": file([], [info(dims=(8,))], bytes(31)),
        "no data": file([], [info()]),
        "data cut in the second": file([], [info("a"), info("b", offset=32)], bytes(39)),
        "a block behind the data": file([], [info()], bytes(64)),
        "a zip behind the data": file([], [info()], bytes(32) + b"PK\x03\x04" + bytes(100)),
        "data without tensors": file([WORD], [], bytes(100)),
    }


CASES: list[Case] = [
    (name, content, BadInputError)
    for group in (_heads(), _pairs(), _alignments(), _tensors())
    for name, content in group.items()
] + [(name, content, UnsupportedError) for name, content in _versions().items()]
