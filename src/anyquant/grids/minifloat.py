"""Small floats of 4 to 8 bits: what their bit patterns mean, as the OCP specifications define them.

The sign is the highest bit, then come exponent and mantissa. An exponent field of 0 means a subnormal number. E4M3 is
the variant without infinities (OCP 8-bit Floating Point Specification 1.0, "fn" in torch); the types below 8 bits have
neither infinities nor NaN (OCP Microscaling Formats 1.0).
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32


class Rounding(NamedTuple):
    """What compiled code needs to round a float32 to a small float: see `kernels.minifloat.to_code`."""

    shift: int
    rebias: int
    normal: np.float32
    magic: np.float32
    highest: np.float32
    sign: int


@dataclass(frozen=True)
class MiniFloat:
    """`highest` is the largest finite value; `bits` counts the sign. Patterns beyond it are infinities or NaN."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    highest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def top_exponent(self) -> int:
        """floor(log2 highest)."""
        return int(np.floor(np.log2(self.highest)))

    @property
    def rounding(self) -> Rounding:
        least = 1 - self.bias  # the exponent of the smallest normal number
        return Rounding(
            shift=23 - self.mantissa_bits,
            rebias=(127 - self.bias) << self.mantissa_bits,
            normal=np.float32(2.0**least),
            magic=np.float32(2.0 ** (23 + least - self.mantissa_bits)),
            highest=np.float32(self.highest),
            sign=self.bits - 1,
        )


E2M1 = MiniFloat("e2m1", 2, 1, 1, 6.0)
E2M3 = MiniFloat("e2m3", 2, 3, 1, 7.5)
E3M2 = MiniFloat("e3m2", 3, 2, 3, 28.0)
E4M3 = MiniFloat("e4m3", 4, 3, 7, 448.0)
E5M2 = MiniFloat("e5m2", 5, 2, 15, 57344.0)


@cache
def values_of(kind: MiniFloat) -> Float32:
    """The value of every bit pattern, (2^bits,) float32, exact, infinities and NaN included. Read-only."""
    pattern = np.arange(2**kind.bits)
    fraction = pattern & (2**kind.mantissa_bits - 1)
    exponent = (pattern >> kind.mantissa_bits) & (2**kind.exponent_bits - 1)
    whole = np.where(exponent > 0, 2**kind.mantissa_bits, 0) + fraction
    magnitude = np.ldexp(whole.astype(np.float64), np.maximum(exponent, 1) - kind.bias - kind.mantissa_bits)
    beyond = magnitude > kind.highest
    magnitude[beyond] = np.where(fraction[beyond] == 0, np.inf, np.nan)
    values: Float32 = np.where(pattern >> (kind.bits - 1) == 1, -magnitude, magnitude).astype(np.float32)
    values.setflags(write=False)
    return values


@cache
def levels_of(kind: MiniFloat) -> tuple[Float32, npt.NDArray[np.uint8]]:
    """The finite values in ascending order and their bit patterns; of the two zeros the positive one."""
    values = values_of(kind)
    patterns = np.flatnonzero(np.isfinite(values))
    patterns = patterns[patterns != 2 ** (kind.bits - 1)]
    order = patterns[np.argsort(values[patterns])]
    return values[order], order.astype(np.uint8)
