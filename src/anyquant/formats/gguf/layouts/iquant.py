"""IQ4_NL, IQ4_XS, IQ3_S, IQ3_XXS and IQ2_S in GGUF: uneven levels, and codebooks with signs.

Parameter arrays: d float16 (rows, in / block); scale (rows, in / 32, of IQ2_S in / 16), int8 of six bits stored with
offset 32 (IQ4_XS), else uint8 of four bits. Codes as grids/iquant.py describes them: entries in the low bits, signs
above. "Planes of bits" below: values are consecutive, the first in the lowest bits of a byte.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Bytes
from anyquant.core.grid import Codes, Params
from anyquant.formats.gguf.layouts import RowLayout
from anyquant.formats.gguf.layouts.planes import Block, Plane, as_blocks, empty, pack_codes, put, take, unpack_codes

SUPER = 256

Fields = npt.NDArray[np.uint8]
Put = Callable[[Bytes, Codes, Params], None]
Take = Callable[[Bytes], tuple[Params, Codes]]


def _layout(grid: str, block: Block, put_fields: Put, take_fields: Take) -> RowLayout:
    def pack(codes: Codes, params: Params) -> Bytes:
        rows, blocks = params["d"].shape
        out = np.empty((rows, blocks, block.size), dtype=np.uint8)
        put(out, 0, params["d"])
        put_fields(out, codes.reshape(rows, blocks, -1), params)
        return out.reshape(rows, -1)

    def unpack(raw: Bytes) -> tuple[Params, Codes]:
        blocks = as_blocks(block, raw)
        params, codes = take_fields(blocks)
        return {"d": take(blocks, 0, "float16"), **params}, codes.reshape(len(raw), -1)

    return RowLayout(grid, grid.upper(), block.weights, block.size, pack, unpack)


def _levels(grid: str, block: Block, put_params: Callable[[Bytes, Params], None], take_params: Any) -> RowLayout:
    """A layout whose codes are planes of nibbles."""

    def pack(codes: Codes, params: Params) -> Bytes:
        out = empty(block, codes)
        put(out, 0, params["d"])
        put_params(out, params)
        pack_codes(block, codes, out)
        return out.reshape(len(codes), -1)

    def unpack(raw: Bytes) -> tuple[Params, Codes]:
        blocks = as_blocks(block, raw)
        return {"d": take(blocks, 0, "float16"), **take_params(blocks)}, unpack_codes(block, blocks)

    return RowLayout(grid, grid.upper(), block.weights, block.size, pack, unpack)


def _join(values: npt.NDArray[Any], bits: int) -> Fields:
    """Planes of `bits` bits: (..., n) values below 2 ** bits as (..., n * bits / 8) bytes."""
    count = 8 // bits
    places = np.arange(0, 8, bits, dtype=np.uint8)
    joined: Fields = np.bitwise_or.reduce(values.astype(np.uint8).reshape(*values.shape[:-1], -1, count) << places, -1)
    return joined


def _split(stored: Fields, bits: int) -> Fields:
    """Inverse of `_join`."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    split: Fields = (stored[..., None] >> places) & np.uint8(2**bits - 1)
    return split.reshape(*stored.shape[:-1], -1)


def _put_nothing(out: Bytes, params: Params) -> None:
    pass


def _take_nothing(raw: Bytes) -> Params:
    return {}


def _put_xs(out: Bytes, params: Params) -> None:
    stored = (params["scale"].astype(np.int16) + 32).astype(np.uint8).reshape(*out.shape[:2], -1)
    out[..., 2:4] = _join(stored >> np.uint8(4), 2)
    out[..., 4:8] = _join(stored & np.uint8(15), 4)


def _take_xs(raw: Bytes) -> Params:
    stored = _split(raw[..., 4:8], 4) | (_split(raw[..., 2:4], 2) << np.uint8(4))
    return {"scale": (stored.astype(np.int16) - 32).astype(np.int8).reshape(len(raw), -1)}


def _put_s3(out: Bytes, codes: Codes, params: Params) -> None:
    """64 bytes of low entry bits, 8 of ninth bits, 32 of signs, 4 of scales."""
    out[..., 2:66] = codes.astype(np.uint8)
    out[..., 66:74] = _join((codes >> 8) & 1, 1)
    out[..., 74:106] = _join(codes >> 9, 4)
    out[..., 106:110] = _join(params["scale"].reshape(*out.shape[:2], -1), 4)


def _take_s3(raw: Bytes) -> tuple[Params, Codes]:
    low, ninth, signs = raw[..., 2:66], _split(raw[..., 66:74], 1), _split(raw[..., 74:106], 4)
    codes = low | (ninth.astype(np.uint16) << 8) | (signs.astype(np.uint16) << 9)
    return {"scale": _split(raw[..., 106:110], 4).reshape(len(raw), -1)}, codes


def _put_xxs(out: Bytes, codes: Codes, params: Params) -> None:
    """64 bytes of entries, then per sub-block 32 bits: seven signs for each of four codes, and the scale."""
    rows, blocks, _ = out.shape
    out[..., 2:66] = np.stack([codes, codes >> 8], axis=-1).astype(np.uint8).reshape(rows, blocks, -1)
    signs = (codes >> 16).reshape(rows, blocks, -1, 4) << np.array([0, 7, 14, 21], dtype=np.uint32)
    words = np.bitwise_or.reduce(signs, -1)
    words |= params["scale"].astype(np.uint32).reshape(words.shape) << np.uint32(28)
    put(out, 66, words.reshape(rows, -1))


def _take_xxs(raw: Bytes) -> tuple[Params, Codes]:
    rows, blocks, _ = raw.shape
    words = take(raw, 66, "uint32", 8).reshape(rows, blocks, -1)
    signs = (words[..., None] >> np.array([0, 7, 14, 21], dtype=np.uint32)) & np.uint32(127)
    entries = raw[..., 2:66].astype(np.uint32).reshape(rows, blocks, -1, 2)
    codes = entries[..., 0] | (entries[..., 1] << 8) | (signs.reshape(rows, blocks, -1) << 16)
    return {"scale": (words >> 28).astype(np.uint8).reshape(rows, -1)}, codes


def _put_s2(out: Bytes, codes: Codes, params: Params) -> None:
    """32 bytes of low entry bits, 32 of signs, 8 of high entry bits in pairs, 8 of scales."""
    out[..., 2:34] = codes.astype(np.uint8)
    out[..., 34:66] = (codes >> 10).astype(np.uint8)
    out[..., 66:74] = _join((codes >> 8) & 3, 2)
    out[..., 74:82] = _join(params["scale"].reshape(*out.shape[:2], -1), 4)


def _take_s2(raw: Bytes) -> tuple[Params, Codes]:
    low, signs, high = raw[..., 2:34], raw[..., 34:66].astype(np.uint32), _split(raw[..., 66:74], 2).astype(np.uint32)
    return {"scale": _split(raw[..., 74:82], 4).reshape(len(raw), -1)}, low | (high << 8) | (signs << 10)


LAYOUTS = {
    "iq4_nl": _levels("iq4_nl", Block(32, 18, (Plane(2, run=16, width=4),)), _put_nothing, _take_nothing),
    "iq4_xs": _levels("iq4_xs", Block(SUPER, 136, (Plane(8, run=16, width=4),)), _put_xs, _take_xs),
    "iq3_s": _layout("iq3_s", Block(SUPER, 110, ()), _put_s3, _take_s3),
    "iq3_xxs": _layout("iq3_xxs", Block(SUPER, 98, ()), _put_xxs, _take_xxs),
    "iq2_s": _layout("iq2_s", Block(SUPER, 82, ()), _put_s2, _take_s2),
}
