"""How the I-quants are searched: what the fast kernels and the slow reference share, without either's machinery.

The objective to beat is that of ggml's encoder (github.com/ggml-org/ggml, src/ggml-quants.c, quantize_row_iq*_impl).
ggml picks an ideal scale per sub-block and rounds it afterwards; here the rounded scale is searched with the codes.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.extras import require
from anyquant.grids.kquant_search import IMPORTANCE_SPREAD, SQUARE, Objective, span

SUPER = 256
BLOCK = 32  # weights that share a scale in iq4_nl and iq4_xs
# the levels of iq4_nl and iq4_xs (ggml-common.h, kvalues_iq4nl), as gguf.quants.IQ4_NL has them
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CANDIDATES = 32  # codebook entries that the search weighs for one pattern of rounded magnitudes

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Effort:
    """`steps`: where a trial scale puts the largest weight of a sub-block, in levels; `rounds` of refinement on the
    stored values, each trying up to `reach` stored scales on either side."""

    steps: tuple[float, ...]
    rounds: int
    reach: int = 1


@dataclass(frozen=True)
class Search:
    """`plain` and `important` are the objectives without and with importance, each with its effort.

    `trials`: the integers that the largest scale of a super-block is tried as, before d is rounded.
    """

    plain: Objective
    plain_effort: Effort
    important: Objective
    important_effort: Effort
    trials: tuple[float, ...] = ()

    def choose(self, importance: Float32 | None) -> tuple[Objective, Effort]:
        """What the search uses."""
        return (self.plain, self.plain_effort) if importance is None else (self.important, self.important_effort)


@dataclass(frozen=True)
class Lattice:
    """A codebook of magnitudes in front of signs: value = d * (2 * scale + 1) * unit * magnitude * sign.

    `dims` weights share an entry, `width` a scale; magnitudes are near `first` + `step` * (0 .. `highest`).
    `even`: two entries share seven stored signs, the product of all eight is positive.
    """

    dims: int
    entries: int
    width: int
    unit: float
    first: float
    step: float
    highest: int
    even: bool = False

    @property
    def vector(self) -> int:
        """Weights per code."""
        return 8 if self.even else self.dims

    @property
    def index_bits(self) -> int:
        """Bits of the number of an entry."""
        return (self.entries - 1).bit_length()

    @property
    def code_bits(self) -> int:
        """Bits of a code: the numbers of its entries, then its signs."""
        return 2 * self.index_bits + 7 if self.even else self.index_bits + self.dims

    @property
    def code_dtype(self) -> str:
        """The numpy type of codes."""
        return "uint16" if self.code_bits <= 16 else "uint32"


@dataclass(frozen=True)
class Tables:
    """The codebook `book`, float32 (dims, entries), and the entries to weigh for each pattern of rounded magnitudes.

    A pattern is a number with one digit 0 .. `highest` per dimension, the first the lowest. `points` uint8 (patterns,
    dims * CANDIDATES) holds the magnitudes of its candidates, dimension by dimension; `names` uint16 (patterns,
    CANDIDATES) which entries these are, the nearest first.
    """

    book: Float32
    points: npt.NDArray[np.uint8]
    names: npt.NDArray[np.uint16]


LATTICES = {
    "iq3_s": Lattice(dims=4, entries=512, width=32, unit=1.0, first=1, step=2, highest=7),
    "iq3_xxs": Lattice(dims=4, entries=256, width=32, unit=0.25, first=4, step=8, highest=7, even=True),
    "iq2_s": Lattice(dims=8, entries=1024, width=16, unit=0.125, first=8, step=17.5, highest=2),
}

SPREAD = Objective(IMPORTANCE_SPREAD, 2.0, 2.0)
# x^2 alone ignores small weights: damping it lowers the plain error as well, and keeps both below ggml's (measured)
SEARCHES = {
    "iq4_nl": Search(
        *(Objective(SQUARE, 0.0, 2.0), Effort((*span(-136, -112, 9), *span(100, 124, 7)), 1)),
        *(SPREAD, Effort((*span(-140, -104, 13), *span(92, 128, 11)), 1)),
    ),
    "iq4_xs": Search(
        *(Objective(SQUARE, 0.0, 2.0), Effort((*span(-136, -112, 7), *span(100, 124, 5)), 2)),
        *(SPREAD, Effort((*span(-140, -104, 11), *span(92, 128, 9)), 2)),
        tuple(-32 + trial for trial in span(-1.0, 5.0, 13)),
    ),
    "iq3_s": Search(
        *(Objective(SQUARE, 0.0, 1.0), Effort(span(11.4, 16.6, 5), 2)),
        *(SPREAD, Effort(span(10.6, 17.8, 6), 1)),
        span(25, 33, 13),
    ),
    "iq3_xxs": Search(
        *(Objective(SQUARE, 0.0, 0.5), Effort(span(11.2, 17.0, 5), 2)),
        *(SPREAD, Effort(span(10.6, 18.4, 6), 1)),
        span(25, 33, 13),
    ),
    "iq2_s": Search(
        *(Objective(SQUARE, 0.5, 0.5), Effort(span(3.4, 6.1, 5), 1)),
        *(SPREAD, Effort(span(3.4, 7.2, 7), 1)),
        span(25, 33, 13),
    ),
}


@cache
def codebook(name: str) -> npt.NDArray[np.uint8]:
    """The magnitudes of a codebook, uint8 (entries, dims), from `gguf.quants`, which has them from ggml-common.h."""
    source = getattr(require("gguf.quants"), name.upper())
    source.init_grid()
    found = source.grid.reshape(LATTICES[name].entries, LATTICES[name].dims)
    book: npt.NDArray[np.uint8] = found.astype(np.uint8)
    book.setflags(write=False)
    return book


@cache
def tables(name: str) -> Tables:
    """The codebook with the candidates of every pattern, by distance of the pattern to the entry."""
    lattice, book = LATTICES[name], codebook(name)
    count = (lattice.highest + 1) ** lattice.dims
    digits = (np.arange(count)[:, None] // (lattice.highest + 1) ** np.arange(lattice.dims)) % (lattice.highest + 1)
    patterns = (lattice.first + lattice.step * digits).astype(np.float32)
    entries = book.astype(np.float32)
    distance = (entries * entries).sum(axis=1) - 2 * (patterns @ entries.T)
    near = np.argpartition(distance, CANDIDATES, axis=1)[:, :CANDIDATES]
    order = np.lexsort((near, np.take_along_axis(distance, near, axis=1)), axis=1)
    names = np.take_along_axis(near, order, axis=1).astype(np.uint16)
    points = np.ascontiguousarray(book[names].transpose(0, 2, 1)).reshape(count, -1)
    return Tables(np.ascontiguousarray(entries.T), points, names)


def error_weights(objective: Objective, factor: float, block: int, weights: Float32, importance: Float32) -> Float32:
    """The weight of each squared error, shape of `weights` (rows, in); means are over `block` weights."""
    x = weights.reshape(weights.shape[0], -1, block)
    squares = x * x
    spread: Float32 = (squares + np.float32(factor) * squares.mean(axis=2, keepdims=True)).reshape(weights.shape)
    return spread if objective.kind == SQUARE else np.sqrt(spread) * importance
