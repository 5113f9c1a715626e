"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 in GGUF: blocks of 32 weights, float16 d (and m) first.

Nibbles: byte j holds code j low and code j + 16 high. Fifth bits: bit j of a little-endian 32-bit word is code j's.
"""

from anyquant.core.dtypes import Bytes
from anyquant.core.grid import Codes, Params
from anyquant.formats.gguf.layouts import RowLayout
from anyquant.formats.gguf.layouts.planes import Block, Plane, as_blocks, empty, pack_codes, put, take, unpack_codes

WEIGHTS = 32


def _bytewise() -> RowLayout:
    block = Block(WEIGHTS, 34, ())

    def pack(codes: Codes, params: Params) -> Bytes:
        out = empty(block, codes)
        put(out, 0, params["d"])
        put(out, 2, codes)
        return out.reshape(len(codes), -1)

    def unpack(raw: Bytes) -> tuple[Params, Codes]:
        blocks = as_blocks(block, raw)
        return {"d": take(blocks, 0, "float16")}, take(blocks, 2, "int8", WEIGHTS)

    return RowLayout("q8_0", "Q8_0", WEIGHTS, block.size, pack, unpack)


def _nibbles(grid: str, fifth_bit: bool, minimum: bool) -> RowLayout:
    start = 4 if minimum else 2
    planes = [Plane(start, run=16, width=4)]
    if fifth_bit:
        planes = [Plane(start, run=1, width=1, shift=4), Plane(start + 4, run=16, width=4)]
    block = Block(WEIGHTS, planes[-1].offset + 16, tuple(planes))

    def pack(codes: Codes, params: Params) -> Bytes:
        out = empty(block, codes)
        put(out, 0, params["d"])
        if minimum:
            put(out, 2, params["m"])
        pack_codes(block, codes, out)
        return out.reshape(len(codes), -1)

    def unpack(raw: Bytes) -> tuple[Params, Codes]:
        blocks = as_blocks(block, raw)
        params: dict[str, Codes] = {"d": take(blocks, 0, "float16")}
        if minimum:
            params["m"] = take(blocks, 2, "float16")
        return params, unpack_codes(block, blocks)

    return RowLayout(grid, grid.upper(), WEIGHTS, block.size, pack, unpack)


LAYOUTS = {
    "q8_0": _bytewise(),
    "q4_0": _nibbles("q4_0", fifth_bit=False, minimum=False),
    "q4_1": _nibbles("q4_1", fifth_bit=False, minimum=True),
    "q5_0": _nibbles("q5_0", fifth_bit=True, minimum=False),
    "q5_1": _nibbles("q5_1", fifth_bit=True, minimum=True),
}
