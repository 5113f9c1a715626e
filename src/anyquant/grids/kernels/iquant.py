"""The fast twin of grids/iquant_reference.py: arrays in, stored parameters and codes out."""

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.grids.iquant_search import BLOCK, LATTICES, SEARCHES, SUPER, tables
from anyquant.grids.kernels import iquant_lattice, iquant_levels, iquant_nearest

Stored = dict[str, npt.NDArray[np.generic]]
Codes = npt.NDArray[np.unsignedinteger]


def quantize_lattice(name: str, weights: Float32, importance: Float32 | None) -> tuple[Stored, Codes]:
    """Parameters and codes of `weights` (rows, in) on a grid with a codebook, without the interpreter lock.

    `importance` comes from `relative_importance`. Rows are independent and results do not depend on how they are cut.
    """
    lattice, search, table = LATTICES[name], SEARCHES[name], tables(name)
    objective, effort = search.choose(importance)
    rows, columns = weights.shape
    d = np.empty((rows, columns // SUPER), dtype=np.float32)
    scale = np.empty((rows, columns // lattice.width), dtype=np.uint8)
    codes = np.empty((rows, columns // lattice.vector), dtype=lattice.code_dtype)
    facts = (np.float32(lattice.first), np.float32(lattice.step), np.float32(lattice.highest))
    iquant_lattice.quantize(
        np.ascontiguousarray(weights, dtype=np.float32),
        np.ones(columns, dtype=np.float32) if importance is None else importance,
        objective.kind,
        np.float32(objective.search_factor),
        (lattice.dims, lattice.even, lattice.index_bits, np.float32(lattice.unit), facts),
        (table.book, table.points, table.names),
        np.asarray(effort.steps, dtype=np.float32),
        np.asarray(search.trials, dtype=np.float32),
        (effort.rounds, effort.reach),
        (d, scale),
        codes,
    )
    return {"d": d.astype(np.float16), "scale": scale}, codes


def encode_lattice(name: str, weights: Float32, scales: Float32) -> Codes:
    """Nearest codes of `weights` (rows, in) under the scale of each vector, `scales` (rows, vectors)."""
    lattice = LATTICES[name]
    book = tables(name).book
    codes = np.empty((len(weights), weights.shape[1] // lattice.vector), dtype=lattice.code_dtype)
    source, norms = np.ascontiguousarray(weights, dtype=np.float32), (book * book).sum(axis=0)
    iquant_nearest.encode(source, scales, book, norms, lattice.even, lattice.index_bits, codes)
    return codes


def quantize_levels(name: str, weights: Float32, importance: Float32 | None) -> tuple[Stored, Codes]:
    """Parameters and codes of `weights` (rows, in) on iq4_nl or iq4_xs; otherwise like `quantize_lattice`."""
    search = SEARCHES[name]
    objective, effort = search.choose(importance)
    rows, columns = weights.shape
    source = np.ascontiguousarray(weights, dtype=np.float32)
    d = np.empty((rows, columns // BLOCK), dtype=np.float32)
    scale = np.ones((rows, columns // BLOCK), dtype=np.int8)
    steering = np.ones(columns, dtype=np.float32) if importance is None else importance
    shared = SUPER // BLOCK if search.trials else 1
    iquant_levels.quantize(
        source.reshape(-1),
        steering.reshape(-1, BLOCK),
        objective.kind,
        np.float32(objective.search_factor),
        shared,
        np.asarray(effort.steps, dtype=np.float32),
        np.asarray(search.trials, dtype=np.float32),
        effort.rounds,
        (d.reshape(-1), scale.reshape(-1)),
    )
    codes = encode_levels(source, d * scale.astype(np.float32), 0)
    if shared == 1:
        return {"d": d.astype(np.float16)}, codes
    return {"d": d[:, ::shared].astype(np.float16), "scale": scale}, codes


def encode_levels(weights: Float32, scales: Float32, start: int) -> Codes:
    """Nearest codes of `weights` (rows, columns), of which the first is column `start`; `scales` of the blocks of 32
    that they touch."""
    codes = np.empty(weights.shape, dtype=np.uint8)
    source = np.ascontiguousarray(weights, dtype=np.float32)
    iquant_levels.encode(source, np.ascontiguousarray(scales), BLOCK, start, codes)
    return codes
