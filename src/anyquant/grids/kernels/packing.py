"""Bit packing, fast twin of `formats.gguf.layouts.planes`: some bits of each code, several codes to a byte.

A plane is compiled to full vectors only when run, width and shift are constants and the unit is a slice of its own
(else Numba guards every index), hence one small function per plane.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.grids.kernels import CACHE

Bytes = npt.NDArray[np.uint8]


@njit(nogil=True, cache=CACHE)
def nibbles_16(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Low four bits, byte j = code j and code j + 16."""
    for index in range(codes.size // block):
        for unit in range(block // 32):
            source = codes[index * block + unit * 32 : index * block + unit * 32 + 32]
            target = out[index * size + offset + unit * 16 : index * size + offset + unit * 16 + 16]
            for j in range(16):
                target[j] = (source[j] & 15) | ((source[j + 16] & 15) << 4)


@njit(nogil=True, cache=CACHE)
def nibbles_32(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Low four bits, byte j = code j and code j + 32."""
    for index in range(codes.size // block):
        for unit in range(block // 64):
            source = codes[index * block + unit * 64 : index * block + unit * 64 + 64]
            target = out[index * size + offset + unit * 32 : index * size + offset + unit * 32 + 32]
            for j in range(32):
                target[j] = (source[j] & 15) | ((source[j + 32] & 15) << 4)


@njit(nogil=True, cache=CACHE)
def nibbles_64(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Low four bits, byte j = code j and code j + 64."""
    for index in range(codes.size // block):
        for unit in range(block // 128):
            source = codes[index * block + unit * 128 : index * block + unit * 128 + 128]
            target = out[index * size + offset + unit * 64 : index * size + offset + unit * 64 + 64]
            for j in range(64):
                target[j] = (source[j] & 15) | ((source[j + 64] & 15) << 4)


@njit(nogil=True, cache=CACHE)
def pairs_low(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Bits 0 and 1, byte j = codes j, j + 32, j + 64, j + 96."""
    for index in range(codes.size // block):
        for unit in range(block // 128):
            source = codes[index * block + unit * 128 : index * block + unit * 128 + 128]
            target = out[index * size + offset + unit * 32 : index * size + offset + unit * 32 + 32]
            for j in range(32):
                low = (source[j] & 3) | ((source[j + 32] & 3) << 2)
                target[j] = low | ((source[j + 64] & 3) << 4) | ((source[j + 96] & 3) << 6)


@njit(nogil=True, cache=CACHE)
def pairs_high(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Bits 4 and 5, byte j = codes j, j + 32, j + 64, j + 96."""
    for index in range(codes.size // block):
        for unit in range(block // 128):
            source = codes[index * block + unit * 128 : index * block + unit * 128 + 128]
            target = out[index * size + offset + unit * 32 : index * size + offset + unit * 32 + 32]
            for j in range(32):
                low = ((source[j] >> 4) & 3) | (((source[j + 32] >> 4) & 3) << 2)
                target[j] = low | (((source[j + 64] >> 4) & 3) << 4) | (((source[j + 96] >> 4) & 3) << 6)


@njit(nogil=True, cache=CACHE)
def singles_2(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Bit 2 of 256 codes, bit k of byte j = code j + 32 k."""
    for index in range(codes.size // block):
        source = codes[index * block : index * block + 256]
        target = out[index * size + offset : index * size + offset + 32]
        for j in range(32):
            low = ((source[j] >> 2) & 1) | (((source[j + 32] >> 2) & 1) << 1)
            low = low | (((source[j + 64] >> 2) & 1) << 2) | (((source[j + 96] >> 2) & 1) << 3)
            high = ((source[j + 128] >> 2) & 1) | (((source[j + 160] >> 2) & 1) << 1)
            high = high | (((source[j + 192] >> 2) & 1) << 2) | (((source[j + 224] >> 2) & 1) << 3)
            target[j] = low | (high << 4)


@njit(nogil=True, cache=CACHE)
def singles_4(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Bit 4 of 256 codes, bit k of byte j = code j + 32 k."""
    for index in range(codes.size // block):
        source = codes[index * block : index * block + 256]
        target = out[index * size + offset : index * size + offset + 32]
        for j in range(32):
            low = ((source[j] >> 4) & 1) | (((source[j + 32] >> 4) & 1) << 1)
            low = low | (((source[j + 64] >> 4) & 1) << 2) | (((source[j + 96] >> 4) & 1) << 3)
            high = ((source[j + 128] >> 4) & 1) | (((source[j + 160] >> 4) & 1) << 1)
            high = high | (((source[j + 192] >> 4) & 1) << 2) | (((source[j + 224] >> 4) & 1) << 3)
            target[j] = low | (high << 4)


@njit(nogil=True, cache=CACHE)
def word_of_fifth_bits(codes: Bytes, out: Bytes, block: int, size: int, offset: int) -> None:
    """Bit 4 of 32 codes in order, as four bytes."""
    words = codes.view(np.uint64)
    for index in range(words.size // 4):
        for j in range(4):
            # the product moves the lowest bit of byte k to bit 56 + k
            bits = (words[index * 4 + j] >> np.uint64(4)) & np.uint64(0x0101010101010101)
            out[index * size + offset + j] = np.uint8((bits * np.uint64(0x0102040810204080)) >> np.uint64(56))


# (width, run, shift) of a plane -> its function
PLANES: dict[tuple[int, int, int], Callable[[Bytes, Bytes, int, int, int], None]] = {
    (4, 16, 0): nibbles_16,
    (4, 32, 0): nibbles_32,
    (4, 64, 0): nibbles_64,
    (2, 32, 0): pairs_low,
    (2, 32, 4): pairs_high,
    (1, 32, 2): singles_2,
    (1, 32, 4): singles_4,
    (1, 1, 4): word_of_fifth_bits,
}


@njit(nogil=True, cache=CACHE)
def pack_six_bit(scale: Bytes, minimum: Bytes, out: Bytes, size: int, offset: int) -> None:
    """The 12 bytes of eight 6-bit scales and eight 6-bit minima per block (Q4_K, Q5_K), both flat uint8."""
    for index in range(scale.size // 8):
        source = index * 8
        target = index * size + offset
        for j in range(4):
            low, high = scale[source + j], scale[source + 4 + j]
            low_minimum, high_minimum = minimum[source + j], minimum[source + 4 + j]
            out[target + j] = low | ((high >> 4) << 6)
            out[target + 4 + j] = low_minimum | ((high_minimum >> 4) << 6)
            out[target + 8 + j] = (high & 15) | ((high_minimum & 15) << 4)
