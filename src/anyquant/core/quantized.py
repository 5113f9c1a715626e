"""A checkpoint some of whose tensors are quantized: it knows their codes, too."""

from typing import Protocol, runtime_checkable

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.qtensor import QTensor


@runtime_checkable
class QuantizedCheckpoint(Checkpoint, Protocol):
    """As a Checkpoint, its quantized tensors are float32 matrices, decoded when they are read."""

    def grid_of(self, tensor: str) -> str | None:
        """The grid on which a tensor lies; None for one that is stored in float."""
        ...

    def quantized_rows(self, tensor: str, start: int, stop: int) -> QTensor:
        """Codes and parameters of rows [start, stop) of a tensor that lies on a grid."""
        ...
