"""What a format is: pure functions from a plan to files, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.plan import Chunk, Layout, Plan, Unit
from anyquant.core.qtensor import QTensor
from anyquant.models.architecture import Architecture


class Format(Protocol):
    """`default_carried` is the dtype in which norms and biases are stored."""

    name: str
    default_carried: str

    def ties(self, architecture: Architecture) -> Mapping[str, str]:
        """Linear name to tie group, for Linears that this format stores in one tensor and so on one grid."""
        ...

    def refuses(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> list[str]:
        """Every reason why this plan cannot be written, before any work. Empty when it can."""
        ...

    def layout(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> Layout:
        """All files with their exact bytes; only headers and small text files of the checkpoint are read."""
        ...

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        """The bytes of some rows of one Linear of the unit; rows start at logical row `first_row` of that Linear."""
        ...

    def unpack(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int, parts: Mapping[str, Bytes]
    ) -> QTensor:
        """Inverse of `pack`: `parts` holds, for each part, the bytes that `slices` names for these rows."""
        ...

    def slices(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int
    ) -> list[tuple[str, int, int]]:
        """(part, offset in the part, bytes) that these rows of the Linear occupy."""
        ...

    def carry(self, unit: Unit, architecture: Architecture, values: Float32) -> list[Chunk]:
        """The bytes of a carried tensor."""
        ...

    def open(self, artifact: Path) -> Checkpoint:
        """The artifact as a Checkpoint with the source's own tensor names, every tensor decoded to float32."""
        ...
