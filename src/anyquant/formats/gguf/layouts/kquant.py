"""Q2_K to Q6_K in GGUF: super-blocks of 256 weights with quantized scales of 16 or 32 weights.

Parameter arrays: d, dmin float16 (rows, in / 256); scale and minimum (rows, in / 16 or in / 32), uint8, or int8 where
there is no minimum (Q3_K: six bits, stored with offset 32).
"""

from collections.abc import Callable

import numpy as np

from anyquant.core.dtypes import Bytes
from anyquant.core.grid import Codes, Params
from anyquant.formats.gguf.layouts import RowLayout
from anyquant.formats.gguf.layouts.planes import Block, Plane, as_blocks, empty, pack_codes, put, take, unpack_codes

WEIGHTS = 256

Put = Callable[[Bytes, Params], None]
Take = Callable[[Bytes], Params]


def _layout(grid: str, block: Block, put_params: Put, take_params: Take) -> RowLayout:
    def pack(codes: Codes, params: Params) -> Bytes:
        out = empty(block, codes)
        put_params(out, params)
        pack_codes(block, codes, out)
        return out.reshape(len(codes), -1)

    def unpack(raw: Bytes) -> tuple[Params, Codes]:
        blocks = as_blocks(block, raw)
        return take_params(blocks), unpack_codes(block, blocks)

    return RowLayout(grid, grid.upper(), WEIGHTS, block.size, pack, unpack)


def _put_q2(out: Bytes, params: Params) -> None:
    put(out, 0, params["scale"] | (params["minimum"] << np.uint8(4)))
    put(out, 80, params["d"])
    put(out, 82, params["dmin"])


def _take_q2(raw: Bytes) -> Params:
    both = take(raw, 0, "uint8", 16)
    return {
        "d": take(raw, 80, "float16"),
        "dmin": take(raw, 82, "float16"),
        "scale": both & np.uint8(15),
        "minimum": both >> np.uint8(4),
    }


def _put_q3(out: Bytes, params: Params) -> None:
    """Scale k + 32: low four bits in nibble k // 8 of byte k % 8, high two in bits 2 (k // 4) of byte 8 + k % 4."""
    rows, blocks, _ = out.shape
    stored = (params["scale"].astype(np.int16) + 32).astype(np.uint8).reshape(rows, blocks, 2, 8)
    low = stored & np.uint8(15)
    out[..., 96:104] = low[..., 0, :] | (low[..., 1, :] << np.uint8(4))
    high = (stored >> np.uint8(4)).reshape(rows, blocks, 4, 4)
    places = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    out[..., 104:108] = np.bitwise_or.reduce(high << places, axis=2)
    put(out, 108, params["d"])


def _take_q3(raw: Bytes) -> Params:
    rows = len(raw)
    low = (raw[..., None, 96:104] >> np.array([0, 4], dtype=np.uint8).reshape(2, 1)) & np.uint8(15)
    high = (raw[..., None, 104:108] >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)) & np.uint8(3)
    stored = low.reshape(rows, -1) | (high.reshape(rows, -1) << np.uint8(4))
    return {"d": take(raw, 108, "float16"), "scale": (stored.astype(np.int16) - 32).astype(np.int8)}


def _put_six_bit(out: Bytes, params: Params) -> None:
    """Q4_K and Q5_K: the last four scales and minima lend their two high bits to the first four."""
    from anyquant.grids.kernels.packing import pack_six_bit

    put(out, 0, params["d"])
    put(out, 2, params["dmin"])
    scale, minimum = (np.ascontiguousarray(params[name]).reshape(-1) for name in ("scale", "minimum"))
    pack_six_bit(scale, minimum, out.reshape(-1), out.shape[2], 4)


def _take_six_bit(raw: Bytes) -> Params:
    rows = len(raw)
    scale, minimum, rest = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    first, last = np.uint8(63), np.uint8(48)
    last_scale = (rest & np.uint8(15)) | ((scale >> np.uint8(2)) & last)
    last_minimum = (rest >> np.uint8(4)) | ((minimum >> np.uint8(2)) & last)
    return {
        "d": take(raw, 0, "float16"),
        "dmin": take(raw, 2, "float16"),
        "scale": np.concatenate([scale & first, last_scale], axis=2).reshape(rows, -1),
        "minimum": np.concatenate([minimum & first, last_minimum], axis=2).reshape(rows, -1),
    }


def _put_q6(out: Bytes, params: Params) -> None:
    put(out, 192, params["scale"])
    put(out, 208, params["d"])


def _take_q6(raw: Bytes) -> Params:
    return {"d": take(raw, 208, "float16"), "scale": take(raw, 192, "int8", 16)}


Q2 = Block(WEIGHTS, 84, (Plane(16, run=32, width=2),))
Q3 = Block(WEIGHTS, 110, (Plane(0, run=32, width=1, shift=2), Plane(32, run=32, width=2)))
Q4 = Block(WEIGHTS, 144, (Plane(16, run=32, width=4),))
Q5 = Block(WEIGHTS, 176, (Plane(16, run=32, width=1, shift=4), Plane(48, run=32, width=4)))
Q6 = Block(WEIGHTS, 210, (Plane(0, run=64, width=4), Plane(128, run=32, width=2, shift=4)))

LAYOUTS = {
    "q2_k": _layout("q2_k", Q2, _put_q2, _take_q2),
    "q3_k": _layout("q3_k", Q3, _put_q3, _take_q3),
    "q4_k": _layout("q4_k", Q4, _put_six_bit, _take_six_bit),
    "q5_k": _layout("q5_k", Q5, _put_six_bit, _take_six_bit),
    "q6_k": _layout("q6_k", Q6, _put_q6, _take_q6),
}
