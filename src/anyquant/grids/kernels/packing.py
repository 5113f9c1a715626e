"""Bit packing, fast twin of `formats.gguf.layouts.planes`: some bits of each code, several codes to a byte."""

import numpy as np
import numpy.typing as npt
from numba import njit

Bytes = npt.NDArray[np.uint8]


@njit(inline="always")
def _two(codes, out, source, target, run, shift):  # type: ignore[no-untyped-def]
    for j in range(run):
        low = (codes[source + j] >> shift) & np.uint8(15)
        high = (codes[source + run + j] >> shift) & np.uint8(15)
        out[target + j] = low | (high << np.uint8(4))


@njit(inline="always")
def _four(codes, out, source, target, run, shift):  # type: ignore[no-untyped-def]
    for j in range(run):
        byte = (codes[source + j] >> shift) & np.uint8(3)
        byte |= ((codes[source + run + j] >> shift) & np.uint8(3)) << np.uint8(2)
        byte |= ((codes[source + 2 * run + j] >> shift) & np.uint8(3)) << np.uint8(4)
        byte |= ((codes[source + 3 * run + j] >> shift) & np.uint8(3)) << np.uint8(6)
        out[target + j] = byte


@njit(inline="always")
def _eight(codes, out, source, target, run, shift):  # type: ignore[no-untyped-def]
    for j in range(run):
        byte = (codes[source + j] >> shift) & np.uint8(1)
        byte |= ((codes[source + run + j] >> shift) & np.uint8(1)) << np.uint8(1)
        byte |= ((codes[source + 2 * run + j] >> shift) & np.uint8(1)) << np.uint8(2)
        byte |= ((codes[source + 3 * run + j] >> shift) & np.uint8(1)) << np.uint8(3)
        byte |= ((codes[source + 4 * run + j] >> shift) & np.uint8(1)) << np.uint8(4)
        byte |= ((codes[source + 5 * run + j] >> shift) & np.uint8(1)) << np.uint8(5)
        byte |= ((codes[source + 6 * run + j] >> shift) & np.uint8(1)) << np.uint8(6)
        byte |= ((codes[source + 7 * run + j] >> shift) & np.uint8(1)) << np.uint8(7)
        out[target + j] = byte


@njit(nogil=True, cache=True)
def pack_plane(codes: Bytes, out: Bytes, block: int, size: int, offset: int, run: int, width: int, shift: int) -> None:
    """Fill one bit plane of every block of `out`.

    `codes` flat uint8, a multiple of `block` of them; `out` flat uint8, `size` bytes per block. In each unit of
    8 // width * run codes, byte j (from `offset` in the block) holds the codes j, j + run, j + 2 run ..., the first in
    its lowest `width` bits, each as (code >> shift) of `width` bits. Runs are written out as constants, since only
    then are the loops compiled to full vectors.
    """
    moved = np.uint8(shift)
    unit = 8 // width * run
    for index in range(codes.size // block):
        target = index * size + offset
        for source in range(index * block, (index + 1) * block, unit):
            if width == 4 and run == 16:
                _two(codes, out, source, target, 16, moved)
            elif width == 4 and run == 32:
                _two(codes, out, source, target, 32, moved)
            elif width == 4 and run == 64:
                _two(codes, out, source, target, 64, moved)
            elif width == 4:
                _two(codes, out, source, target, run, moved)
            elif width == 2 and run == 32:
                _four(codes, out, source, target, 32, moved)
            elif width == 2:
                _four(codes, out, source, target, run, moved)
            elif width == 1 and run == 32:
                _eight(codes, out, source, target, 32, moved)
            else:
                _eight(codes, out, source, target, run, moved)
            target += run


@njit(nogil=True, cache=True)
def pack_six_bit(scale: Bytes, minimum: Bytes, out: Bytes, size: int, offset: int) -> None:
    """The 12 bytes of eight 6-bit scales and eight 6-bit minima per block (Q4_K, Q5_K), both flat uint8."""
    for index in range(scale.size // 8):
        source = index * 8
        target = index * size + offset
        for j in range(4):
            low, high = scale[source + j], scale[source + 4 + j]
            low_minimum, high_minimum = minimum[source + j], minimum[source + 4 + j]
            out[target + j] = low | ((high >> np.uint8(4)) << np.uint8(6))
            out[target + 4 + j] = low_minimum | ((high_minimum >> np.uint8(4)) << np.uint8(6))
            out[target + 8 + j] = (high & np.uint8(15)) | ((high_minimum & np.uint8(15)) << np.uint8(4))
