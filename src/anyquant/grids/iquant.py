"""The I-quants of GGUF: levels that are not evenly spaced, one by one or four or eight together in a codebook.

    iq4_nl   w = d * level[code]                                32 weights with one d
    iq4_xs   w = d * scale * level[code]                        256 with one d, 32 with a scale of 6 bits, -32..31
    iq3_s    w = d * (2 scale + 1) * magnitude * sign           entries of 4 magnitudes, 512; 32 with a scale of 4 bits
    iq3_xxs  w = d * (2 scale + 1) / 4 * magnitude * sign       entries of 4, 256; seven signs for two entries
    iq2_s    w = d * (2 scale + 1) / 8 * magnitude * sign       entries of 8, 1024; 16 with a scale of 4 bits

d is float16. A code of a codebook grid is one number: the entry's in its low bits, then one bit for each negative sign.
iq3_xxs: entry, entry, then the first seven signs; the eighth makes the number of negative ones even. Layout: ggml's
src/ggml-common.h; decoding in the order of operations of gguf-py's quants.py, bit for bit.
"""

from dataclasses import dataclass, field

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, UnsupportedError
from anyquant.core.extras import require
from anyquant.core.grid import Codes, Grid, Parameter, Params, Scope
from anyquant.core.grid import Lattice as Values
from anyquant.grids.iquant_reference import quantize_reference
from anyquant.grids.iquant_search import (
    BLOCK,
    LATTICES,
    LEVELS,
    SEARCHES,
    SUPER,
    Lattice,
    codebook,
    error_weights,
)
from anyquant.grids.kquant_search import relative_importance


@dataclass(frozen=True)
class IQuant(Grid):
    """What the two kinds share."""

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        return self.quantize(weights, importance, shared)[0]

    def quantize_reference(self, weights: Float32, importance: Float32 | None = None) -> tuple[Params, Codes]:
        """The search of `quantize` in NumPy, slow and readable."""
        return quantize_reference(self.name, weights, self._steering(weights, importance))

    def weighting(self, weights: Float32, importance: Float32 | None = None) -> Float32:
        """ggml's weight of each squared error, with `importance` as given."""
        objective, _ = SEARCHES[self.name].choose(importance)
        given = np.ones(1, dtype=np.float32) if importance is None else importance.astype(np.float32)
        return error_weights(objective, objective.factor, self.block[1], weights, given)

    def _steering(self, weights: Float32, importance: Float32 | None) -> Float32 | None:
        """Importance as the search takes it, after a check of the shape."""
        reason = self.refuses((weights.shape[0], weights.shape[1]))
        if reason is not None:
            raise UnsupportedError(f"{self.name}: {reason}")
        return None if importance is None else relative_importance(importance, weights.shape[1], self.block[1])

    def _columns(self, params: Params, columns: slice | None) -> tuple[int, int]:
        """Start and stop of a slice of columns."""
        start, stop, step = (columns or slice(None)).indices(params["d"].shape[1] * self.block[1])
        if step != 1 or start % self.vector or stop % self.vector:
            raise AnyQuantError(
                f"{self.name}: columns {start} to {stop} in steps of {step}, expected whole vectors of {self.vector}"
            )
        return start, max(start, stop)


@dataclass(frozen=True)
class LatticeQuant(IQuant):
    """A grid with a codebook."""

    facts: Lattice = field(kw_only=True)

    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        steering = self._steering(weights, importance)
        require("numba")
        from anyquant.grids.kernels import iquant

        return iquant.quantize_lattice(self.name, weights, steering)

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """The nearest codes: every entry of the codebook is compared."""
        require("numba")
        from anyquant.grids.kernels import iquant

        return iquant.encode_lattice(self.name, weights, self._scales(params, columns))

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        scales, facts, book = self._scales(params, columns), self.facts, codebook(self.name)
        signs = (codes >> np.array(facts.index_bits * (2 if facts.even else 1), codes.dtype)).astype(np.uint8)
        last = np.array(facts.entries - 1, codes.dtype)
        entries = codes & last
        if facts.even:
            shift = np.array(facts.index_bits, codes.dtype)
            entries = np.stack([entries, (codes >> shift) & last], axis=-1)
            signs |= (np.bitwise_count(signs) & np.uint8(1)) << np.uint8(7)
        values = book[entries].reshape(*codes.shape, self.vector).astype(np.float32)
        values *= scales[..., None]
        values *= SIGNS[signs, : self.vector]
        decoded: Float32 = values.reshape(len(codes), -1)
        return decoded

    def _scales(self, params: Params, columns: slice | None) -> Float32:
        """What the magnitudes of each vector in `columns` are multiplied with, in gguf's order: (rows, vectors)."""
        start, stop = self._columns(params, columns)
        at = np.arange(start // self.vector, stop // self.vector) * self.vector
        integers = params["scale"][:, at // self.facts.width].astype(np.float32) * np.float32(2) + np.float32(1)
        # exact: the units are powers of two
        scales: Float32 = params["d"][:, at // SUPER].astype(np.float32) * integers * np.float32(self.facts.unit)
        return scales


SIGNS = 1 - 2 * ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.float32)


@dataclass(frozen=True)
class LevelQuant(IQuant):
    """iq4_nl and iq4_xs."""

    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        steering = self._steering(weights, importance)
        require("numba")
        from anyquant.grids.kernels import iquant

        return iquant.quantize_levels(self.name, weights, steering)

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        require("numba")
        from anyquant.grids.kernels import iquant

        start, stop = self._columns(params, columns)
        scales = self._scales(params)[:, start // BLOCK : -(-stop // BLOCK)]
        return iquant.encode_levels(weights, scales, start)

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        start, stop = self._columns(params, columns)
        values = STEPS[codes]
        scales = self._scales(params)
        if columns is None:
            values.reshape(*scales.shape, BLOCK)[...] *= scales[..., None]
        else:
            values *= scales[:, np.arange(start, stop) // BLOCK]
        return values

    def lattice(self, params: Params) -> Values:
        """Sixteen levels under the scale of each block."""
        scales = self._scales(params)
        codes = np.arange(len(LEVELS), dtype=np.uint8)
        return Values(STEPS.copy(), codes, scales, np.zeros_like(scales), BLOCK, uniform=False)

    def _scales(self, params: Params) -> Float32:
        """What the levels of each block are multiplied with: (rows, in / 32)."""
        d = params["d"].astype(np.float32)
        if "scale" not in params:
            return d
        scales: Float32 = np.repeat(d, SUPER // BLOCK, axis=1) * params["scale"].astype(np.float32)
        return scales


STEPS = np.array(LEVELS, dtype=np.float32)


def make(name: str) -> IQuant:
    """The grid "iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs" or "iq2_s"."""
    if name == "iq4_nl":
        single = Parameter("d", "float16", 16, Scope.BLOCK, BLOCK)
        return LevelQuant(name, "iquant", (1, BLOCK), "uint8", 4, (single,))
    d = Parameter("d", "float16", 16, Scope.BLOCK, SUPER)
    if name == "iq4_xs":
        return LevelQuant(
            name, "iquant", (1, SUPER), "uint8", 4, (d, Parameter("scale", "int8", 6, Scope.BLOCK, BLOCK))
        )
    facts = LATTICES[name]
    parameters = (d, Parameter("scale", "uint8", 4, Scope.BLOCK, facts.width))
    return LatticeQuant(
        name, "iquant", (1, SUPER), facts.code_dtype, facts.code_bits, parameters, facts.vector, facts=facts
    )
