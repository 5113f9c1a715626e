"""Codes of a few bits as a stream of bits, the lowest first: what most engines call packing into 32-bit words.

Little-endian words make the order of codes in a word the order in its bytes, so widths that do not divide 8 or 32
simply straddle both, as compressed-tensors, GPTQ and MLX have it.
"""

import numpy as np

from anyquant.core.dtypes import Bytes


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """(rows, n) codes below 2^bits as uint8 (rows, n * bits / 8, rounded up); code k begins at bit k * bits."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    if 8 % bits == 0:
        each = 8 // bits
        short = -codes.shape[1] % each
        padded = np.pad(codes, ((0, 0), (0, short))) if short else codes
        packed = padded[:, 0::each].copy()
        for place in range(1, each):
            packed |= padded[:, place::each] << np.uint8(place * bits)
        return packed
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little", count=bits)
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little")


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes of each row of `packed`, uint8 (rows, count)."""
    if bits == 8:
        return np.ascontiguousarray(packed[:, :count])
    if 8 % bits == 0:
        each, mask = 8 // bits, np.uint8((1 << bits) - 1)
        codes = np.empty((len(packed), packed.shape[1] * each), dtype=np.uint8)
        for place in range(each):
            np.bitwise_and(packed >> np.uint8(place * bits), mask, out=codes[:, place::each])
        return np.ascontiguousarray(codes[:, :count])
    stream = np.unpackbits(packed, axis=1, bitorder="little", count=count * bits)
    return np.packbits(stream.reshape(len(packed), count, bits), axis=2, bitorder="little")[:, :, 0]


def packed_words(count: int, bits: int) -> int:
    """32-bit words of `count` codes."""
    return -(-count * bits // 32)


def to_words(packed: Bytes, words: int) -> Bytes:
    """Rows of bytes filled up with zeros to whole 32-bit words."""
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, 4 * words - packed.shape[1]))))
