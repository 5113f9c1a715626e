"""Small floats in small groups, with a scale of 8 bits: the MX types of OCP and NVIDIA's NVFP4.

    mxfp4        w = e2m1 * 2^(scale - 127)                     groups of 32
    mxfp6_e2m3   w = e2m3 * 2^(scale - 127), and e3m2 alike     groups of 32
    mxfp8_e4m3   w = e4m3 * 2^(scale - 127), and e5m2 alike     groups of 32
    nvfp4        w = e2m1 * (e4m3(scale) / global_scale)        groups of 16
    nvfp4-bare   w = e2m1 * e4m3(scale)                         groups of 16, as MLX stores it

Codes and scales are bit patterns (OCP Microscaling Formats 1.0; a scale of 255, NaN, is never written). global_scale is
one float32 per tensor that divides, as compressed-tensors stores it. This package only makes powers of two, so that its
reciprocal is exact: ModelOpt's weight_scale_2 and ggml's ".scale" tensor, which multiply, hold the same values. Without
it the scales of small weights underflow: E4M3 has nothing between 0 and 2^-9.
"""

from dataclasses import dataclass, field

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.groups import gathered, scale_up, touched
from anyquant.grids.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, MiniFloat, levels_of, values_of
from anyquant.grids.scales import usable_importance

MX_GROUP, NV_GROUP = 32, 16
KINDS = {"mxfp4": E2M1, "mxfp6_e2m3": E2M3, "mxfp6_e3m2": E3M2, "mxfp8_e4m3": E4M3, "mxfp8_e5m2": E5M2}
BIAS = 127
EXPONENTS = np.append(np.ldexp(np.float32(1), np.arange(255) - BIAS), np.nan).astype(np.float32)
# the plain exponent first: of equal ones it is taken
OFFSETS = np.array([0, 1, -1, -2, -3], dtype=np.int64)
# E4M3 scales tried below and above the plain one: a factor of about 2 down and 1.7 up
REACH = (8, 6)
# without a global scale, weights that lose more than this share of their squares, in groups whose scales are not normal
# numbers of E4M3, are refused; usual weights lose 0.01
MOST_LOST = 0.04
FIRST_NORMAL = 8  # the pattern of 2^-6


@dataclass(frozen=True)
class Microscaling(Grid):
    """What MX and NVFP4 have in common; `kind` is the type of the values."""

    kind: MiniFloat = field(default=E2M1)

    @property
    def group(self) -> int:
        return self.block[1]

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """The patterns nearest to w / scale, ties to even, saturating, 0 where the scale is 0; compiled."""
        from anyquant.grids.kernels import minifloat

        scale, first = self._scales(params, columns)
        codes = np.empty(weights.shape, dtype=np.uint8)
        whole = np.ascontiguousarray(weights, dtype=np.float32)
        minifloat.encode(whole, scale, first, self.group, self.kind.rounding, codes)
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """value * scale in float32; of MX types exact."""
        scale, first = self._scales(params, columns)
        return scale_up(gathered(values_of(self.kind), codes), scale, first, self.group)

    def lattice(self, params: Params) -> Lattice:
        """All values of the type."""
        levels, codes = levels_of(self.kind)
        scale, _ = self._scales(params, None)
        return Lattice(levels, codes, scale, np.zeros_like(scale), self.group, uniform=False)

    def _scales(self, params: Params, columns: slice | None) -> tuple[Float32, int]:
        """Scales (rows, groups that `columns` touch), and where in the first group the columns begin."""
        raise NotImplementedError


@dataclass(frozen=True)
class MxGrid(Microscaling):
    """The parameter "scale" is the biased exponent, uint8 (rows, in / 32)."""

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """Of five exponents around the plain one the best of each group."""
        return {"scale": self._exponents(weights, importance, OFFSETS)}

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """log2 max |w|, rounded up from 1.75 times a power of two on, less the exponent of the type's largest value.

        As compressed-tensors and vLLM find the scales of activations. OCP MX 1.0, section 6.3, always rounds down,
        which clips what lies beyond the largest value by up to a quarter.
        """
        largest = np.abs(weights, dtype=np.float32).reshape(len(weights), -1, self.group).max(axis=2)
        mantissa, exponent = np.frexp(largest)  # mantissa in [0.5, 1)
        rounded = exponent - 1 + (mantissa >= 0.875) - self.kind.top_exponent + BIAS
        return {"scale": np.where(largest > 0, np.clip(rounded, 0, 2 * BIAS), 0).astype(np.uint8)}

    def _exponents(self, weights: Float32, importance: Float32 | None, offsets: Codes) -> Codes:
        from anyquant.grids.kernels import minifloat

        whole = np.ascontiguousarray(weights, dtype=np.float32)
        steering = usable_importance(importance, weights.shape[1], self.group)
        scale = np.empty((len(weights), weights.shape[1] // self.group), dtype=np.uint8)
        top = self.kind.top_exponent
        minifloat.exponents(whole, steering, (top, 2 * BIAS - top), self.kind.rounding, offsets, scale)
        return scale

    def _scales(self, params: Params, columns: slice | None) -> tuple[Float32, int]:
        groups, first = touched(columns, self.group)
        return gathered(EXPONENTS, params["scale"][:, groups]), first


@dataclass(frozen=True)
class NvGrid(Microscaling):
    """The parameters are "scale", E4M3 patterns in uint8 (rows, in / 16), and "global_scale", float32 (1, 1).

    `bare`: there is no global scale. Then weights are refused by UnsupportedError that are too small for that.
    """

    bare: bool = False

    def prepare(self, absolute_maximum: float, tie_group: tuple[float, ...] = ()) -> Params:
        """The power of two that puts the largest scale a group may want (its largest weight on the value 4) just
        below the largest E4M3 value: groups down to 1/9000 of the tensor's maximum then have normal scales."""
        if self.bare:
            return {}
        largest = max((absolute_maximum, *tie_group))
        exponent = 0
        if largest > 0:
            exponent = int(np.clip(np.floor(np.log2(4 * E4M3.highest / largest)), -126, 126))
        return {"global_scale": np.array([[2.0**exponent]], dtype=np.float32)}

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """Of the E4M3 scales around the plain one, and those that least squares leads to, the best of each group."""
        return self._fitted(weights, importance, shared, REACH)

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """max |w| / 6 as E4M3."""
        return self._fitted(weights, None, shared, (0, 0))

    def _fitted(
        self, weights: Float32, importance: Float32 | None, shared: Params | None, reach: tuple[int, int]
    ) -> Params:
        from anyquant.grids.kernels import minifloat

        if shared is None:
            shared = self.prepare(float(np.abs(weights).max(initial=0)))
        unit = np.float32(1) if self.bare else np.float32(shared["global_scale"][0, 0])
        with np.errstate(over="ignore"):
            scales = values_of(E4M3)[:127] / unit
            usable = scales[np.isfinite(scales * np.float32(self.kind.highest))]
        whole = np.ascontiguousarray(weights, dtype=np.float32)
        steering = usable_importance(importance, weights.shape[1], self.group)
        chosen = np.empty((len(weights), weights.shape[1] // self.group), dtype=np.uint8)
        kinds = (self.kind.rounding, E4M3.rounding, unit)
        minifloat.group_scales(whole, steering, usable, reach, kinds, chosen)
        if not self.bare:
            return {"scale": chosen, "global_scale": shared["global_scale"]}
        self._refuse_underflow(whole, {"scale": chosen})
        return {"scale": chosen}

    def _refuse_underflow(self, weights: Float32, params: Params) -> None:
        small = np.repeat(params["scale"] < FIRST_NORMAL, self.group, axis=1)
        if not small.any():
            return
        difference = self.decode(self.encode(weights, params), params) - weights
        lost, all_of_it = (float(np.sum(part * part, dtype=np.float64)) for part in (difference[small], weights))
        if lost > MOST_LOST * all_of_it:
            largest, share = np.abs(weights).max(), lost / all_of_it
            raise UnsupportedError(
                f"{self.name} has no scale of the tensor, and these weights (at most {largest:.1e}) are so small "
                f"that their E4M3 scales underflow: {share:.0%} of their squares would be lost; choose mxfp4 or an "
                "affine grid"
            )

    def _scales(self, params: Params, columns: slice | None) -> tuple[Float32, int]:
        groups, first = touched(columns, self.group)
        scale = gathered(values_of(E4M3), params["scale"][:, groups])
        if not self.bare:
            scale /= params["global_scale"]
        return scale, first


def make(name: str) -> Microscaling:
    """The grid "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4" or "nvfp4-bare"."""
    if name in ("nvfp4", "nvfp4-bare"):
        scale = Parameter("scale", "uint8", 8, Scope.BLOCK, NV_GROUP)
        whole = Parameter("global_scale", "float32", 32, Scope.TENSOR)
        bare = name != "nvfp4"
        both = (scale,) if bare else (scale, whole)
        return NvGrid(name, "microscaling", (1, NV_GROUP), "uint8", E2M1.bits, both, kind=E2M1, bare=bare)
    if name not in KINDS:
        raise UsageError(f"unknown microscaling grid {name!r}; known: {', '.join(KINDS)}, nvfp4, nvfp4-bare")
    kind = KINDS[name]
    parameters = (Parameter("scale", "uint8", 8, Scope.BLOCK, MX_GROUP),)
    return MxGrid(name, "microscaling", (1, MX_GROUP), "uint8", kind.bits, parameters, kind=kind)
