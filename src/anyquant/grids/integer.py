"""Integers with one scale per group of consecutive weights, per row, or per matrix; with or without a zero-point.

    int4-g128          w = scale * level              levels -8 to 7, groups of 128 weights of a row
    int4-g128-asym     w = scale * (level - zero)     levels and zero 0 to 15
    int8-channel       one scale for a whole row, of any width
    int8-tensor        one scale for a whole matrix, from `prepare`, or found where there is none to share
    int4-g128-f16      as int4-g128, with float16 scales, as GPTQ and AWQ files hold them

Scales are bfloat16 values greater than 0, so that they are exact in models stored as bfloat16 or float32, and in
float16 as long as they are normal there; with "-f16" they are float16 values. Those of `plain` are any float32.
Zero-points are integers, as GPTQ, AWQ, ONNX and compressed-tensors hold them. The objective is the squared error,
weighted by the importance of the input channel.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from anyquant.core.dtypes import Float32, bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.integer_search import MATRIX, ROW, Search
from anyquant.grids.recode import Int32, fitting_zero, regrouped, without_shift
from anyquant.grids.scales import LARGEST_HALF, apply_by_group, spread_out

PATTERN = re.compile(r"int([2-8])-(?:g(16|32|64|128|256)|(channel|tensor))(-asym)?(-f16)?")
REACHES = {"channel": ROW, "tensor": MATRIX}
SCOPES = {ROW: Scope.ROW, MATRIX: Scope.TENSOR}
ENDLESS = 1 << 31  # the width of a group that has no end
HUGE = np.float32(1e30)
EPSILON = np.finfo(np.float32).eps


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Symmetric: codes are the levels, int8, the parameter "scale" is float32. Asymmetric: codes are uint8, and the
    parameter "zero", uint8, is the code of zero. `search` says how many levels there are and how far a scale reaches.
    """

    search: Search = field(kw_only=True)

    def prepare(self, absolute_maximum: float, tie_group: tuple[float, ...] = ()) -> Params:
        """The scale that just reaches the largest magnitude of all on both sides of zero; {} but for "tensor" grids."""
        if self.search.group != MATRIX:
            return {}
        largest = np.float32(max((absolute_maximum, *tie_group)))
        stored = float32_to_bfloat16(np.array([[largest / np.float32(self.search.middle - 1)]], dtype=np.float32))
        scale = bfloat16_to_float32(stored)
        if scale * np.float32(self.search.middle - 1) < largest:
            scale = bfloat16_to_float32(stored + np.uint16(1))
        scale = np.where(scale > 0, scale, np.float32(1))
        return self._stored(self._rounded(scale), np.full((1, 1), self.search.middle, np.float32))

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """Scales, and zero-points: the best that the search finds, never worse than plain rounding.

        `shared` holds those of "tensor" grids; without it, `weights` are the matrix.
        """
        if self.search.group == MATRIX and shared is not None:
            return {parameter.name: shared[parameter.name] for parameter in self.parameters}
        scale, zero = self.search.find(weights, importance)
        return self._stored(self._rounded(scale) if self.search.half else scale, zero)

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """Scales that just cover the range of each group, as compressed-tensors computes them for activations.

        Symmetric: max |w| over half of the range of the levels (127.5 for eight bits; the largest weight comes to lie
        half a step beyond the last level). Asymmetric: from minimum to maximum, 0 included.
        """
        if self.search.group == MATRIX and shared is not None:
            return {parameter.name: shared[parameter.name] for parameter in self.parameters}
        shape = self.search.shape(weights.shape)
        groups = weights.reshape(*shape, -1)
        top, bottom = np.maximum(groups.max(axis=2), 0), np.minimum(groups.min(axis=2), 0)
        highest = np.float32(self.search.highest)
        if not self.search.asymmetric:
            scale = np.maximum(top, -bottom) / (highest / np.float32(2))
            return self._stored(np.where(scale == 0, EPSILON, scale), scale)
        scale = (top - bottom) / highest
        scale = np.where(scale == 0, EPSILON, scale)
        return self._stored(scale, np.clip(np.rint(-bottom / scale), 0, highest))

    def _rounded(self, scale: Float32) -> Float32:
        """Scales as the grid stores them."""
        if not self.search.half:
            return bfloat16_to_float32(float32_to_bfloat16(scale))
        return np.minimum(scale, LARGEST_HALF).astype(np.float16).astype(np.float32)

    def _stored(self, scale: Float32, zero: Float32) -> Params:
        if not self.search.asymmetric:
            return {"scale": scale}
        return {"scale": scale, "zero": zero.astype(np.uint8)}

    def hold(self, levels: Int32, scale: Float32, shift: Float32) -> tuple[Params, Codes] | None:
        """Scales as the grid stores them; a zero-point is kept where it can be."""
        rows, columns = levels.shape
        groups = columns // self.search.group if self.search.group > 0 else 1
        spread = [regrouped(values, groups) for values in (scale, shift)]
        if spread[0] is None or spread[1] is None:
            return None
        counted = without_shift(levels, spread[0], spread[1])
        if counted is None:
            return None
        levels, scale, zero = counted
        if self.search.group == MATRIX:
            if (scale != scale[0]).any() or self.search.asymmetric:
                return None
            scale = scale[:1]
        stored = self._rounded(scale)
        if not self.search.asymmetric:
            if levels.min(initial=0) < -self.search.middle or levels.max(initial=0) >= self.search.middle:
                return None
            return self._stored(stored, stored), levels.astype(np.int8)
        grouped = levels.reshape(rows, groups, -1)
        preferred = np.where((zero >= 0) & (zero <= self.search.highest), zero, self.search.middle)
        found = fitting_zero(grouped, preferred, self.search.highest)
        if found is None:
            return None
        codes = (grouped + found[:, :, None]).reshape(levels.shape).astype(np.uint8)
        return self._stored(stored, found.astype(np.float32)), codes

    def lattice(self, params: Params) -> Lattice:
        """scale * level, or scale * level - scale * zero. Both exact: scales have eight bits."""
        scale = params["scale"]
        lowest = 0 if self.search.asymmetric else -self.search.middle
        levels = np.arange(lowest, lowest + self.search.highest + 1)
        shift = -scale * params["zero"] if self.search.asymmetric else np.zeros_like(scale)
        width = self.search.group if self.search.group > 0 else ENDLESS
        return Lattice(levels.astype(np.float32), levels.astype(self.code_dtype), scale, shift, width, uniform=True)

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """Nearest levels, rint(w / scale) in float32, 0 where the scale is 0; whole rows are compiled code."""
        if columns is None:
            return self._encode_rows(weights, params)
        scale = self._spread(params["scale"], columns)
        highest = np.float32(self.search.highest)
        zero = self._spread(params["zero"], columns) if self.search.asymmetric else np.float32(self.search.middle)
        with np.errstate(over="ignore"):
            levels = weights / np.where(scale == 0, HUGE, scale)
        np.rint(levels, out=levels)
        levels += zero
        np.maximum(levels, np.float32(0), out=levels)
        np.minimum(levels, highest, out=levels)
        if not self.search.asymmetric:
            levels -= zero
        return levels.astype(self.code_dtype)

    def _encode_rows(self, weights: Float32, params: Params) -> Codes:
        from anyquant.grids.kernels import zero_point

        scale = np.ascontiguousarray(params["scale"])
        middle = np.float32(self.search.middle)
        lowest = np.float32(0) if self.search.asymmetric else -middle
        zero = params["zero"].astype(np.float32) if self.search.asymmetric else np.full_like(scale, middle)
        groups = np.ascontiguousarray(weights, dtype=np.float32).reshape(len(weights), scale.shape[1], -1)
        codes = np.empty(groups.shape, dtype=self.code_dtype)
        zero_point.encode(groups, scale, zero, np.float32(self.search.highest), lowest, codes)
        return codes.reshape(weights.shape)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """scale * (level - zero) in float32: exact."""
        values = codes.astype(np.float32)
        if self.search.asymmetric:
            apply_by_group(np.subtract, values, params["zero"], self.search.group, columns)
        apply_by_group(np.multiply, values, params["scale"], self.search.group, columns)
        return values

    def _spread(self, values: Codes, columns: slice) -> Float32:
        """A parameter for each weight of `columns`, in a shape that broadcasts to them."""
        if self.search.group > 0:
            return spread_out(values, self.search.group, columns)
        return values.astype(np.float32, copy=False)


def make(name: str) -> IntegerGrid:
    """The grid "int{bits}-{reach}", then perhaps "-asym", then perhaps "-f16"; bits 2 to 8, reach g16, g32, g64, g128,
    g256, channel or tensor."""
    match = PATTERN.fullmatch(name)
    if match is None:
        raise UsageError(
            f"unknown integer grid {name!r}; expected int2 to int8, then -g16, -g32, -g64, -g128, -g256, -channel or "
            "-tensor, then perhaps -asym, then perhaps -f16, such as int4-g128"
        )
    bits, reach, asymmetric = int(match[1]), match[3], match[4] is not None
    group = REACHES[reach] if reach else int(match[2])
    scope, columns = SCOPES.get(group, Scope.BLOCK), max(group, 0)
    scale = Parameter("scale", "float32", 16, scope, columns)
    zero = Parameter("zero", "uint8", bits, scope, columns)
    return IntegerGrid(
        name=name,
        family="integer" + (f"-{reach}" if reach else "") + ("-asym" if asymmetric else ""),
        block=(1, max(group, 1)),
        code_dtype="uint8" if asymmetric else "int8",
        code_bits=bits,
        parameters=(scale, zero) if asymmetric else (scale,),
        search=Search(bits, group, asymmetric, match[5] is not None),
    )
