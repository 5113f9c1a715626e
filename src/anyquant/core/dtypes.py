"""Element types of checkpoints, by their safetensors names, and their exact conversion to and from float32.

BF16 is handled as the upper half of a float32, without torch.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anyquant.core.errors import UnsupportedError

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DType:
    """`numpy` is the storage type; `floating` tells whether values can be weights."""

    name: str
    numpy: str
    floating: bool

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return np.dtype(self.numpy).itemsize


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("F64", "<f8", True),
        DType("F32", "<f4", True),
        DType("F16", "<f2", True),
        DType("BF16", "<u2", True),
        DType("F8_E4M3", "u1", False),
        DType("F8_E5M2", "u1", False),
        DType("F8_E8M0", "u1", False),
        DType("I64", "<i8", False),
        DType("I32", "<i4", False),
        DType("I16", "<i2", False),
        DType("I8", "i1", False),
        DType("U64", "<u8", False),
        DType("U32", "<u4", False),
        DType("U16", "<u2", False),
        DType("U8", "u1", False),
        DType("BOOL", "u1", False),
    )
}


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> Float32:
    """Exact: a bfloat16 is the upper 16 bits of the float32 of the same value."""
    wide = bits.astype(np.uint32)
    return np.left_shift(wide, np.uint32(16), out=wide).view(np.float32)


def float32_to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    """Round to nearest, ties to even, NaN kept quiet. Returns the 16 bits of each value."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where((bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000), quiet, rounded).astype(np.uint16)


def to_float32(raw: Bytes, dtype: str) -> Float32:
    """`raw` bytes (any shape, flattened) of element type `dtype` as a flat float32 array.

    Raises UnsupportedError for element types that do not hold floating-point weights.
    """
    known = DTYPES.get(dtype)
    if known is None or not known.floating:
        raise UnsupportedError(f"element type {dtype} does not hold floating-point weights; expected F32, F16 or BF16")
    flat = raw.reshape(-1).view(known.numpy)
    if dtype == "BF16":
        return bfloat16_to_float32(flat)
    return flat.astype(np.float32, copy=False)


def from_float32(values: Float32, dtype: str) -> Bytes:
    """The bytes of `values` stored as `dtype` (F32, F16 or BF16), flat."""
    if dtype == "BF16":
        return float32_to_bfloat16(values).reshape(-1).view(np.uint8)
    if dtype not in ("F32", "F16"):
        raise UnsupportedError(f"cannot store floating-point values as {dtype}; use F32, F16 or BF16")
    return np.ascontiguousarray(values.reshape(-1), dtype=DTYPES[dtype].numpy).view(np.uint8)


def from_float32_exactly(values: Float32, dtype: str) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """The bytes of `values` as `from_float32` has them, and which values `dtype` does not hold, both flat.

    NaN counts as not held.
    """
    with np.errstate(over="ignore"):
        stored = from_float32(values, dtype)
    return stored, to_float32(stored, dtype) != values.reshape(-1)
