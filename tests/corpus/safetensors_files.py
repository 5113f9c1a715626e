"""Damaged safetensors files, made here: each a (name, bytes, error) that the reader must refuse with that error."""

import json
import struct
from typing import Any

from anyquant.core.errors import BadInputError

Case = tuple[str, bytes, type[Exception]]


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of `header` (bytes, or an object to write as JSON) that claims to be `length` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def two(first: Any, second: Any) -> dict[str, Any]:
    return {"a": tensor(offsets=first), "b": tensor(offsets=second)}


def fields(**changes: Any) -> dict[str, Any]:
    return {"a": {**tensor(), **changes}}


DATA = bytes(8)
SOUND = file({"a": tensor()}, DATA)


def _sizes() -> dict[str, bytes]:
    return {
        "empty file": b"",
        "seven bytes": bytes(7),
        "length only": struct.pack("<Q", 0),
        "length zero with data": struct.pack("<Q", 0) + DATA,
        "length one more than the file": file({"a": tensor()}, b"", 67),
        "length of 100 MB in a small file": file({"a": tensor()}, DATA, 100_000_000),
        "length over the limit": file({"a": tensor()}, DATA, 100_000_001),
        "length 2^63": file({"a": tensor()}, DATA, 1 << 63),
        "length 2^64 - 1": file({"a": tensor()}, DATA, (1 << 64) - 1),
        "length 2^64 - 8": file({"a": tensor()}, DATA, (1 << 64) - 8),
        "length cuts the header": file({"a": tensor()}, DATA, 20),
        "length reaches into the data": file({"a": tensor()}, DATA, len(json.dumps({"a": tensor()})) + 4),
        "truncated in the data": SOUND[:-1],
        "truncated before the data": SOUND[:-8],
        "truncated in the header": SOUND[:30],
        "one byte behind the data": SOUND + b"x",
        "a zip behind the data": SOUND + b"PK\x03\x04" + bytes(100),
        "data without tensors": file({}, DATA),
        "zip file": b"PK\x03\x04" + bytes(100),
        "pickle": b"\x80\x02}q\x00." + bytes(100),
        "gguf file": b"GGUF\x03\x00\x00\x00" + bytes(100),
    }


def _json() -> dict[str, bytes]:
    good = json.dumps({"a": tensor()}).encode()
    text = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]'
    return {
        "not JSON": file(b"{hello}", DATA),
        "leading space": file(b" " + good, DATA),
        "leading newline": file(b"\n" + good, DATA),
        "byte order mark": file(b"\xef\xbb\xbf" + good, DATA),
        "utf-16": file(good.decode().encode("utf-16-le"), DATA),
        "latin-1 name": file(b'{"\xe9":' + good[5:], DATA),
        "overlong utf-8": file(b'{"\xc0\xaf":' + good[5:], DATA),
        "lone surrogate name": file(b'{"\\ud800":' + good[5:], DATA),
        "array": file([tensor()], DATA),
        "string": file('"a"', DATA),
        "null": file(b"null", DATA),
        "two objects": file(good + b"{}", DATA),
        "garbage behind the object": file(good + b"  x", DATA),
        "nul behind the object": file(good + b"\x00", DATA),
        "trailing comma": file(good[:-1] + b",}", DATA),
        "comment": file(good[:-1] + b"/* */}", DATA),
        "single quotes": file(good.replace(b'"', b"'"), DATA),
        "tensor twice": file(f'{{"a":{text}}},"a":{text}}}}}'.encode(), DATA),
        "tensor twice, once escaped": file(f'{{"a":{text}}},"\\u0061":{text}}}}}'.encode(), DATA),
        "shape twice": file(f'{{"a":{text},"shape":[2]}}}}'.encode(), DATA),
        "metadata twice": file(b'{"__metadata__":{},"__metadata__":{},' + good[1:], DATA),
        "metadata key twice": file(b'{"__metadata__":{"x":"1","x":"2"},' + good[1:], DATA),
        "NaN in the shape": file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA),
        "Infinity in the offsets": file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', DATA),
        "number that overflows": file(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', DATA),
        "number of 10,000 digits": file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}'),
        "nested 100,000 deep": file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", DATA),
        "nested 100,000 deep, open": file(b'{"a":' * 100_000, DATA),
        "nested 20 deep": file(b'{"a":' + b"[" * 20 + b"]" * 20 + b"}", DATA),
        "metadata of numbers": file({"__metadata__": {"x": 1}, "a": tensor()}, DATA),
        "metadata nested": file({"__metadata__": {"x": {}}, "a": tensor()}, DATA),
        "metadata a list": file({"__metadata__": [], "a": tensor()}, DATA),
        "metadata null": file({"__metadata__": None, "a": tensor()}, DATA),
        "control character in a name": file(b'{"\x01":' + good[5:], DATA),
        "name of 513 bytes": file({"x" * 513: tensor()}, DATA),
        "name of 257 two-byte letters": file(json.dumps({"é" * 257: tensor()}, ensure_ascii=False).encode(), DATA),
    }


def _tensors() -> dict[str, bytes]:
    huge = {
        "product wraps to 8 bytes": ((1 << 62) + 2,),
        "product wraps to zero": (1 << 32, 1 << 32),
        "product of 2^63": (1 << 21, 1 << 21, 1 << 21),
        "dimension 2^64": (1 << 64,),
        "zero hides an overflow": (1 << 63, 4, 0),
        "dimensions far beyond the file": (1 << 40,),
    }
    return {
        "tensor is a list": file({"a": []}, DATA),
        "tensor is null": file({"a": None}, DATA),
        "no dtype": file({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA),
        "no shape": file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
        "no offsets": file({"a": {"dtype": "F32", "shape": [2]}}, DATA),
        "extra field": file(fields(code="import os"), DATA),
        "dtype unknown": file(fields(dtype="F33"), DATA),
        "dtype lower case": file(fields(dtype="f32"), DATA),
        "dtype a number": file(fields(dtype=32), DATA),
        "dtype a list": file(fields(dtype=["F32"]), DATA),
        "shape a number": file(fields(shape=2), DATA),
        "shape of text": file(fields(shape=["2"]), DATA),
        "shape negative": file(fields(shape=[-2]), DATA),
        "shape minus zero": file(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "shape of floats": file(fields(shape=[2.0]), DATA),
        "shape of truth values": file(fields(shape=[True, 2]), DATA),
        "shape nested": file(fields(shape=[[2]]), DATA),
        "shape of null": file(fields(shape=[None]), DATA),
        "rank nine": file(fields(shape=[1] * 8 + [2]), DATA),
        "rank 20,000": file(fields(shape=[1] * 20_000), DATA),
        "shape larger than the data": file(fields(shape=[3]), DATA),
        "shape smaller than the data": file(fields(shape=[1]), DATA),
        "shape empty": file(fields(shape=[]), DATA),
        "half a byte": file({"a": tensor("F4", [3], (0, 1))}, b"x"),
        "offsets one": file(fields(data_offsets=[0]), DATA),
        "offsets three": file(fields(data_offsets=[0, 8, 8]), DATA),
        "offsets swapped": file(fields(data_offsets=[8, 0]), DATA),
        "offsets negative": file(fields(data_offsets=[-8, 0]), DATA),
        "offsets text": file(fields(data_offsets=["0", "8"]), DATA),
        "offsets floats": file(fields(data_offsets=[0.0, 8.0]), DATA),
        "offsets null": file(fields(data_offsets=None), DATA),
        "offsets beyond the file": file(fields(data_offsets=[8, 16]), DATA),
        "offsets at 2^63": file(fields(data_offsets=[1 << 63, (1 << 63) + 8]), DATA),
        "offsets at 2^64": file(fields(data_offsets=[(1 << 64) - 8, 1 << 64]), DATA),
        "end at 2^64": file(fields(data_offsets=[0, 1 << 64]), DATA),
        "hole at the start": file({"a": tensor(offsets=(4, 12))}, bytes(12)),
        "hole between": file(two((0, 8), (12, 20)), bytes(20)),
        "hole at the end": file({"a": tensor()}, bytes(12)),
        "overlap": file(two((0, 8), (4, 12)), bytes(12)),
        "the same place twice": file(two((0, 8), (0, 8)), bytes(8)),
        "one inside the other": file(
            {"a": tensor(shape=[4], offsets=(0, 16)), "b": tensor(offsets=(4, 12))}, bytes(16)
        ),
        "empty tensor inside another": file({"a": tensor(), "b": tensor(shape=[0], offsets=(4, 4))}, DATA),
        "empty tensor behind the end": file({"a": tensor(), "b": tensor(shape=[0], offsets=(9, 9))}, DATA),
        "2,000 tensors at one place": file({str(number): tensor() for number in range(2_000)}, DATA),
    } | {name: file(fields(shape=list(shape)), DATA) for name, shape in huge.items()}


CASES: list[Case] = [
    (name, content, BadInputError) for group in (_sizes(), _json(), _tensors()) for name, content in group.items()
]
