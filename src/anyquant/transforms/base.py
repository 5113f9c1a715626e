"""What a transform is: a pure function from a model to rewrites of its weights that do not change what it computes.

Two kinds. One works before calibration, on the whole model (`prepare`); one works on a block, with statistics and the
grids that its matrices will lie on (`block`). A chain such as "rotate -> awq" hands each the model that the one before
it left: `RewrittenCheckpoint`, `detect` of it, and statistics collected there or mapped by `Rewrites.map_moments`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from anyquant.calibrate.stats import Moments, Statistics
from anyquant.core.checkpoint import Checkpoint, read_tensor, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid
from anyquant.core.plan import EMPTY
from anyquant.models.architecture import Architecture
from anyquant.transforms.rewrites import Rewrites


class Scene(Protocol):
    """A block of the model, as a calibrated transform sees it."""

    @property
    def architecture(self) -> Architecture: ...

    @property
    def block(self) -> int: ...

    def weights(self, linear: str) -> Float32:
        """The float matrix (out, in) of a Linear, by name."""
        ...

    def carried(self, name: str) -> Float32:
        """The values of a norm or bias, by Carried name, 1-D."""
        ...

    def moments(self, group: str) -> Moments | None:
        """Statistics of an input group; None where there are none."""
        ...

    def grid(self, linear: str) -> Grid | None:
        """The grid that a Linear will lie on; None when it stays as it is."""
        ...


@dataclass(frozen=True)
class BlockScene:
    """A Scene that reads each matrix when asked. `grids` gives the grid of a Linear by its name, or None."""

    architecture: Architecture
    block: int
    checkpoint: Checkpoint
    statistics: Statistics
    grids: Callable[[str], Grid | None]

    def weights(self, linear: str) -> Float32:
        view = self.architecture.by_name[linear].view
        return read_view(self.checkpoint, view, 0, view.rows)

    def carried(self, name: str) -> Float32:
        found = self.architecture.carried_by_name[name]
        return read_tensor(self.checkpoint, found.tensor)[found.start : found.start + found.length]

    def moments(self, group: str) -> Moments | None:
        return self.statistics.moments.get(group)

    def grid(self, linear: str) -> Grid | None:
        return self.grids(linear)


@dataclass(frozen=True)
class Transform:
    """`needs` names the statistics it must have, `uses` those it takes where there are any; `options` are its
    defaults, whose types are binding. The functions are handed complete options.

    `refuses` gives the reason why an architecture cannot be rewritten so, or None; it is called before anything else,
    and raises UsageError for options out of range. Exactly one of the others is set:
    `prepare` rewrites the model before calibration, `block` one block, whose tensors alone it may name.
    """

    name: str
    refuses: Callable[[Architecture, Mapping[str, Any]], str | None]
    options: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    needs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    prepare: Callable[[Architecture, Checkpoint, Mapping[str, Any]], Rewrites] | None = None
    block: Callable[[Scene, Mapping[str, Any]], Rewrites] | None = None
