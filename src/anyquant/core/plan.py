"""Plan: every decision and every byte, before anything is written.

A plan holds one Decision per Linear and one storage type per carried tensor. A format turns it into a Layout: files,
each a prefix of known bytes followed by parts (stored tensors) at known offsets. A Unit joins the two: the ordered
Linears whose rows fill one set of parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from anyquant.core.corrections import CorrectionSpec

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Step:
    """An algorithm or transform by name, with all of its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=lambda: EMPTY)


@dataclass(frozen=True)
class Activation:
    """How what enters a matrix is rounded while the model runs: on `grid`, whose rows are tokens.

    `mode` is "dynamic" (parameters from the values themselves) or "static" (from calibration, one for all tokens).
    """

    grid: str
    mode: str


@dataclass(frozen=True)
class Decision:
    """What happens to one Linear: `requested` is the grid asked for, `grid` the one used, `reason` why it is so.

    `algorithm` chooses the values, after `prune` has chosen which may differ from zero, and before `correct` adds to
    what came out; `corrections` are what these two leave in the QTensor. Linears of one `tie_group` must share a grid
    in the target (a fused tensor).
    """

    linear: str
    requested: str
    grid: str
    reason: str
    algorithm: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    prune: Step | None = None
    correct: Step | None = None
    corrections: tuple[CorrectionSpec, ...] = ()
    input_activation: Activation | None = None
    tie_group: str | None = None

    @property
    def chain(self) -> str:
        """What is done, as one writes it: "wanda -> gptq"."""
        before = [] if self.prune is None else [self.prune.name]
        after = [] if self.correct is None else [self.correct.name]
        return " -> ".join([*before, self.algorithm, *after])


@dataclass(frozen=True)
class Plan:
    """`decisions` by Linear name and `carried` (storage dtype by Carried name), both in architecture order.

    `importance` tells whether per-channel second moments steer the rounding. `config_patch` are changes to the model's
    config that the artifact needs.
    """

    family: str
    decisions: Mapping[str, Decision]
    carried: Mapping[str, str]
    label: str
    importance: bool = False
    kv_cache: str | None = None
    transforms: tuple[Step, ...] = ()
    config_patch: Mapping[str, Any] = field(default_factory=lambda: EMPTY)

    def tied(self, linear: str) -> tuple[str, ...]:
        """The Linears of its tie group, itself among them: an engine stores them as one matrix."""
        group = self.decisions[linear].tie_group
        if group is None:
            return (linear,)
        return tuple(name for name, decision in self.decisions.items() if decision.tie_group == group)


@dataclass(frozen=True)
class Part:
    """One stored tensor of the artifact. `dtype` is the format's own type name, `shape` as the format writes it.

    `offset` counts from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Unit:
    """What is quantized and packed together: the rows of `linears`, in order, or one carried tensor.

    `grid` is their common grid ("" for a carried tensor). `parts` are names in the Layout. `row_multiple`: row blocks
    handed to `Format.pack` must start and end at multiples of it within each Linear (a row permutation is local to
    such a block). `permutation` names the format's row permutation, or is "". `corrections` are stored beside the
    codes, where the format has a place for them. `variant` is the format's name for one of several ways to store the
    grid. `inputs` are parts that say how the input of the Linears is rounded. `floats`: the type in which the format's
    layout leaves it to the model to hold scales and the like, where there are such.
    """

    name: str
    linears: tuple[str, ...]
    carried: tuple[str, ...]
    grid: str
    parts: tuple[str, ...]
    row_multiple: int = 1
    permutation: str = ""
    corrections: tuple[CorrectionSpec, ...] = ()
    variant: str = ""
    inputs: tuple[str, ...] = ()
    floats: str = ""


@dataclass(frozen=True)
class TargetFile:
    """One file of the artifact: `prefix` bytes (header, or the whole of a small file), then parts, `nbytes` in all."""

    path: str
    prefix: bytes
    parts: tuple[Part, ...]
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """All files of an artifact and the units that fill their parts."""

    files: tuple[TargetFile, ...]
    units: tuple[Unit, ...]

    @property
    def nbytes(self) -> int:
        """Exact bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def payload(self) -> int:
        """Exact bytes of tensor data."""
        return sum(part.nbytes for file in self.files for part in file.parts)

    def locate(self) -> dict[str, tuple[TargetFile, Part]]:
        """Part name to its file and place."""
        return {part.name: (file, part) for file in self.files for part in file.parts}


@dataclass(frozen=True)
class Place:
    """Bytes of a part: `runs` stretches of `nbytes` each, which begin `pitch` bytes apart; the first at `offset`.

    Several runs: rows of a matrix that is stored transposed. `shared`: they belong to all rows of the unit; they are
    packed with its first row, and read with any.
    """

    part: str
    offset: int
    nbytes: int
    runs: int = 1
    pitch: int = 0
    shared: bool = False

    @property
    def total(self) -> int:
        """Bytes of all runs."""
        return self.nbytes * self.runs


@dataclass(frozen=True)
class Chunk:
    """Packed bytes of some rows and where they go, run after run."""

    place: Place
    data: Any  # a contiguous uint8 array or bytes, `place.total` of them
