"""Fast twins of the searches in `grids.legacy`: one row block at a time, without the interpreter lock."""

import numpy as np
import numpy.typing as npt
from numba import njit

from anyquant.core.dtypes import Float32

BLOCK = 32
MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to the nearest even integer


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def largest_magnitudes(weights: Float32, out: Float32) -> None:
    """max |w| of every block of 32: `weights` flat, finite, `out` flat. Exact: the flags only allow vectors."""
    for block in range(out.size):
        largest = np.float32(0)
        for j in range(block * BLOCK, (block + 1) * BLOCK):
            magnitude = abs(weights[j])
            largest = magnitude if magnitude > largest else largest
        out[block] = largest


@njit(nogil=True, cache=True)
def encode_eight(weights: Float32, d: Float32, codes: npt.NDArray[np.int8]) -> None:
    """codes = rint(w / d) within -127..127, all flat; `d` holds the stored float16 value of each block of 32."""
    for block in range(d.size):
        scale = d[block]
        inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
        for j in range(block * BLOCK, (block + 1) * BLOCK):
            level = min(max(weights[j] * inverse, np.float32(-127)), np.float32(127))
            codes[j] = np.int8((level + MAGIC) - MAGIC)
