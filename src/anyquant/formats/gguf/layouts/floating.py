"""F32, F16, BF16 in GGUF: the little-endian bit patterns, one after the other."""

import sys

import numpy as np

from anyquant.core.dtypes import Bytes
from anyquant.core.grid import Codes, Params
from anyquant.formats.gguf.layouts import RowLayout


def _layout(grid: str, ggml_type: str, size: int) -> RowLayout:
    stored = f"<u{size}"

    def pack(codes: Codes, params: Params) -> Bytes:
        return np.ascontiguousarray(codes, dtype=stored).view(np.uint8)

    def unpack(raw: Bytes) -> tuple[Params, Codes]:
        codes = np.ascontiguousarray(raw).view(stored)
        return {}, codes if sys.byteorder == "little" else codes.astype(f"=u{size}")

    return RowLayout(grid=grid, ggml_type=ggml_type, block=1, block_bytes=size, pack=pack, unpack=unpack)


LAYOUTS = {
    "f32": _layout("f32", "F32", 4),
    "f16": _layout("f16", "F16", 2),
    "bf16": _layout("bf16", "BF16", 2),
}
