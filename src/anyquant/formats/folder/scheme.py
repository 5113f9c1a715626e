"""What tells one format of quantized Hugging Face folders from another; all else is `folder.format`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import Bytes
from anyquant.core.errors import UnsupportedError
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import Activation, Decision, Plan
from anyquant.formats.folder.modules import ModuleLayout
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture

APART = (Role.EMBEDDING, Role.HEAD, Role.ROUTER)


@dataclass(frozen=True)
class InputScale:
    """A scalar tensor, float32, with a tensor-wide `parameter` of the grid on which the input is rounded.

    `reciprocal`: with one divided by it.
    """

    suffix: str
    parameter: str
    shape: tuple[int, ...] = (1,)
    reciprocal: bool = False

    def value(self, activation: Activation, maximum: float) -> Bytes:
        """The bytes for inputs of magnitudes up to `maximum`."""
        found = find_grid(activation.grid).prepare(maximum)[self.parameter]
        values = np.float32(1) / found if self.reciprocal else found
        return np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Module:
    """A module of a plan: its path, the Linears whose rows it holds, its shape, the grid they share.

    `variant` is the name of its layout; `activation` says how its input is rounded, if it is.
    """

    path: str
    linears: tuple[Linear, ...]
    shape: tuple[int, int]
    grid: str
    variant: str
    activation: Activation | None = None

    @property
    def role(self) -> Role:
        return self.linears[0].role


class Scheme(Protocol):
    """A scheme is a subclass; what it does not say is as here.

    `presets`: named schemes and the grid of the block Linears. `candidates`: grids that a search may choose from.

    `apart`: roles that `--grid` and presets leave as they are stored.
    """

    @property
    def name(self) -> str: ...

    @property
    def presets(self) -> Mapping[str, str]: ...

    @property
    def candidates(self) -> tuple[str, ...]: ...

    @property
    def apart(self) -> tuple[Role, ...]: ...

    @property
    def activations(self) -> Mapping[str, str]:
        """The presets that round activations, and how: as `--activations` says it."""
        return {}

    @property
    def input_suffixes(self) -> tuple[str, ...]:
        """Tensors beside a module's own that say how its input is rounded, by the end of their names."""
        return ()

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json says that a folder is of this format."""
        settings = config.get("quantization_config")
        return isinstance(settings, Mapping) and settings.get("quant_method") == self.name

    def variant(self, decision: Decision) -> str:
        """The name of the layout for a decision: the grid, where a grid is stored in one way only."""
        return decision.grid

    def layout(self, name: str) -> ModuleLayout:
        """The layout of that name. Raises UnsupportedError for a grid that the format cannot hold, naming those it can.

        The name is what `variant` or `find` says.
        """
        ...

    def inputs(self, activation: Activation) -> Sequence[InputScale]:
        """The tensors that a rounded input adds to a module. Raises UnsupportedError for one that cannot be described.

        This one knows none.
        """
        raise UnsupportedError(f"{self.name} does not describe quantized activations ({activation.grid})")

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        """Reasons beyond `layout`'s and `inputs`', before any work."""
        return []

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """The keys of config.json that say what is quantized and how, such as "quantization_config"."""
        ...

    def files(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, bytes]:
        """Further small files, by name."""
        return {}

    def find(self, stored: Checkpoint) -> Mapping[str, tuple[str, tuple[int, int]]]:
        """Path of every quantized module of a folder to the name of its layout and its shape (out, in), from its config
        and headers.

        Raises BadInputError for what contradicts itself, UnsupportedError for a way of storing that is not read.
        """
        ...
