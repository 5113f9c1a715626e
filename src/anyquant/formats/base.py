"""What a format is: pure functions from a plan to files, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.linear import Linear
from anyquant.core.plan import Chunk, Layout, Part, Place, Plan, TargetFile, Unit
from anyquant.core.qtensor import QTensor
from anyquant.formats.certificate import Certificate
from anyquant.models.architecture import Architecture

# small files of the source that go along, where there are any
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class Rules(Protocol):
    """What planning asks of a target: its rules and its exact bytes.

    `default_carried` is the dtype in which norms and biases are stored; "" means as in the source.

    `entry` is what a runtime opens, relative to the output folder: a file, or "" for the folder itself.
    """

    @property
    def name(self) -> str: ...

    @property
    def default_carried(self) -> str: ...

    @property
    def entry(self) -> str: ...

    def part_names(self, architecture: Architecture) -> Mapping[str, str]:
        """Linear name to the name of the (first) part that holds it."""
        ...

    def preset(self, preset: str, architecture: Architecture, importance: bool) -> Mapping[str, tuple[str, str]]:
        """Linear name to (grid, reason) of a named mixture. Raises UsageError for an unknown name."""
        ...

    def activations(self, preset: str) -> str | None:
        """How a named mixture rounds activations, as `--activations` says it; None where it does not."""
        ...

    def default_grid(self, linear: Linear, architecture: Architecture, grid: str, source: str) -> tuple[str, str]:
        """(grid, reason) of an embedding, head or router when the block Linears go on `grid`.

        `source` is the float grid that holds the stored values exactly.
        """
        ...

    def own_grid(self, grid: str) -> str:
        """The grid in which this target holds what is asked for as `grid`: mostly that grid itself."""
        ...

    def fallback(self, grid: str, linear: Linear) -> str | None:
        """The grid used where the Linear's shape does not lie on `grid`, or None when there is none.

        The grid "" means as stored in the source.
        """
        ...

    def holds(self, grid: str) -> bool:
        """Whether there is a place for a matrix on the grid, as far as its name tells."""
        ...

    def candidates(self, linear: Linear) -> tuple[str, ...]:
        """Grids among which a search may choose for the Linear, beside the type it is stored in; () where it stays so.

        All of them may meet in one artifact.
        """
        ...

    def ties(self, architecture: Architecture) -> Mapping[str, str]:
        """Linear name to tie group, for Linears that this format stores in one tensor and so on one grid."""
        ...

    def refuses(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> list[str]:
        """Every reason why this plan cannot be written, before any work. Empty when it can."""
        ...

    def layout(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> Layout:
        """All files with their exact bytes; only headers and small text files of the checkpoint are read."""
        ...

    def slices(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int) -> list[Place]:
        """What these rows of the Linear occupy, and what all rows of the unit share."""
        ...


@runtime_checkable
class Format(Rules, Protocol):
    """Rules, and the pure functions between quantized rows and bytes."""

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        """The bytes of some rows of one Linear of the unit; rows start at logical row `first_row` of that Linear.

        What is shared comes with the first row of the unit.
        """
        ...

    def unpack(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int, parts: Mapping[str, Bytes]
    ) -> QTensor:
        """Inverse of `pack`: `parts` holds, for each part, the bytes that `slices` names for these rows."""
        ...

    def carry(self, unit: Unit, architecture: Architecture, values: Float32) -> list[Chunk]:
        """The bytes of a carried tensor."""
        ...

    def inputs(self, unit: Unit, architecture: Architecture, plan: Plan, maxima: Mapping[str, float]) -> list[Chunk]:
        """The bytes of the unit's `inputs`; `maxima`: the largest magnitude that enters a Linear, by its name.

        Raises AnyQuantError when one is missing.
        """
        ...

    def stamp(self, file: TargetFile, certificate: Certificate) -> bytes | None:
        """The prefix of a file of the layout with this certificate in it, as long as before; None: it has none."""
        ...

    def parts(self, folder: Path) -> Mapping[str, Part]:
        """Every planned part of the artifact in `folder`, as its bounded reader finds it (to compare with a layout)."""
        ...

    def open(self, artifact: Path, architecture: Architecture) -> Checkpoint:
        """The artifact (its folder, or its file) as a Checkpoint with the tensor names of the source.

        Every tensor is decoded to float32 from the bytes of the artifact, with permutations and fusions undone.
        `architecture` is that of the source. Raises BadInputError when the artifact does not belong to it.
        """
        ...
