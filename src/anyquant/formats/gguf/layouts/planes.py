"""Bit planes: the way ggml's blocks hold codes of fewer than eight bits.

In each unit of 8 // width * run codes, byte j holds the codes j, j + run, j + 2 run ..., the first in its lowest
`width` bits. A code of five or six bits is split over two planes. `pack` is compiled, `unpack` says the same in NumPy.
"""

from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Bytes
from anyquant.core.grid import Codes


@dataclass(frozen=True)
class Plane:
    """Bits [shift, shift + width) of the codes of a block, from byte `offset` of the block on."""

    offset: int
    run: int
    width: int
    shift: int = 0


@dataclass(frozen=True)
class Block:
    """`weights` codes in `size` bytes, made of `planes`; what else a block holds its family's file knows."""

    weights: int
    size: int
    planes: tuple[Plane, ...]


def empty(block: Block, codes: Codes) -> Bytes:
    """Uninitialised bytes for `codes` (rows, in): (rows, blocks per row, block.size)."""
    rows, columns = codes.shape
    return np.empty((rows, columns // block.weights, block.size), dtype=np.uint8)


def pack_codes(block: Block, codes: Codes, out: Bytes) -> None:
    """Write the planes of uint8 `codes` (rows, in) into `out` (rows, blocks, size)."""
    from anyquant.grids.kernels.packing import PLANES

    flat, target = np.ascontiguousarray(codes).reshape(-1), out.reshape(-1)
    for plane in block.planes:
        pack = PLANES[plane.width, plane.run, plane.shift]
        pack(flat, target, block.weights, block.size, plane.offset)


def unpack_codes(block: Block, raw: Bytes) -> Codes:
    """uint8 codes (rows, in) of `raw` (rows, blocks, size)."""
    rows, blocks, _ = raw.shape
    codes = np.zeros((rows, blocks, block.weights), dtype=np.uint8)
    for plane in block.planes:
        count = 8 // plane.width
        stored = raw[..., plane.offset : plane.offset + block.weights // count]
        units = stored.reshape(rows, blocks, -1, 1, plane.run)
        places = np.arange(0, 8, plane.width, dtype=np.uint8).reshape(count, 1)
        bits = (units >> places) & np.uint8((1 << plane.width) - 1)
        codes |= (bits << np.uint8(plane.shift)).reshape(codes.shape)
    return codes.reshape(rows, -1)


def as_blocks(block: Block, raw: Bytes) -> Bytes:
    """uint8 (rows, row_bytes) as (rows, blocks, size)."""
    stored = np.ascontiguousarray(raw)
    return stored.reshape(stored.shape[0], -1, block.size)


def put(out: Bytes, offset: int, values: Codes) -> None:
    """Store `values` (rows, blocks * n), of any element type, little-endian, from byte `offset` of every block."""
    rows, blocks, _ = out.shape
    stored = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).view(np.uint8).reshape(rows, blocks, -1)
    out[..., offset : offset + stored.shape[2]] = stored


def take(raw: Bytes, offset: int, dtype: str, count: int = 1) -> Codes:
    """Inverse of `put`: `count` values of `dtype` per block, shape (rows, blocks * count)."""
    kind = np.dtype(dtype).newbyteorder("<")
    stored = np.ascontiguousarray(raw[..., offset : offset + kind.itemsize * count])
    return stored.reshape(raw.shape[0], -1).view(kind).astype(dtype)
