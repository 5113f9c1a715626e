"""What tells one format of quantized Hugging Face folders from another; all else is `folder.format`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import Plan
from anyquant.formats.folder.modules import ModuleLayout
from anyquant.models.architecture import Architecture

APART = (Role.EMBEDDING, Role.HEAD, Role.ROUTER)


@dataclass(frozen=True)
class Module:
    """A module of a plan: its path, the Linears whose rows it holds, its shape, and the grid they share."""

    path: str
    linears: tuple[Linear, ...]
    shape: tuple[int, int]
    grid: str

    @property
    def role(self) -> Role:
        return self.linears[0].role


class Scheme(Protocol):
    """`presets`: named schemes and the grid of the block Linears. `candidates`: grids that a search may choose from.

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

    def layout(self, grid: str) -> ModuleLayout:
        """How a grid is stored. Raises UnsupportedError for one that the format cannot hold, naming those it can."""
        ...

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        """Reasons beyond `layout`'s, before any work."""
        ...

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """The keys of config.json that say what is quantized and how, such as "quantization_config"."""
        ...

    def files(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, bytes]:
        """Further small files, by name."""
        ...

    def find(self, stored: Checkpoint) -> Mapping[str, tuple[str | ModuleLayout, tuple[int, int]]]:
        """Path of every quantized module of a folder to its grid and shape (out, in), from its config and headers.

        In place of the grid a layout, where that differs from the one in which we write the grid.
        Raises BadInputError for what contradicts itself, UnsupportedError for a way of storing that is not read.
        """
        ...
