"""What tells one format of quantized Hugging Face folders from another; all else is `folder.format`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import Bytes
from anyquant.core.errors import UnsupportedError
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import EMPTY, Activation, Decision, Plan
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture

APART = (Role.EMBEDDING, Role.HEAD, Role.ROUTER)
HEAD_MODULE = "lm_head"
# the presets that every format has: all matrices in one float type
FLOAT_PRESETS = {grid.upper(): grid for grid in FLOATS}
# how a module of a folder is stored: a grid in the way that the scheme writes it, or any layout; and (out, in)
Found = tuple[str | ModuleLayout, tuple[int, int]]


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


@dataclass(frozen=True)
class Scheme(ABC):
    """A format is a subclass with these facts as defaults; what it does not say is as here.

    `presets`: named schemes and the grid of the block Linears, "" for as stored; `activations`: those of them that
    round what enters matrices, and how, as `--activations` says it. `candidates`: grids that a search may choose from.
    `apart`: roles that `--grid` and presets leave as they are stored. `input_suffixes`: tensors beside a module's own
    that say how its input is rounded, by the end of their names. `rounds_inputs`: engines may do so without being told.
    """

    name: str
    presets: Mapping[str, str]
    candidates: tuple[str, ...]
    apart: tuple[Role, ...] = APART
    activations: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    input_suffixes: tuple[str, ...] = ()
    rounds_inputs: bool = False

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json says that a folder is of this format."""
        settings = config.get("quantization_config")
        return isinstance(settings, Mapping) and settings.get("quant_method") == self.name

    def variant(self, decision: Decision) -> str:
        """The name of the layout for a decision: the grid, where a grid is stored in one way only."""
        return decision.grid

    def variant_beside(self, decision: Decision, kept: str) -> str:
        """As `variant`, for a format that stores the weights of models of another type otherwise.

        `kept` is the grid of the model's embedding.
        """
        return self.variant(decision)

    @abstractmethod
    def layout(self, name: str) -> ModuleLayout:
        """The layout of that name. Raises UnsupportedError for a grid that the format cannot hold, naming those it can.

        The name is what `variant` or `find` says.
        """

    def inputs(self, activation: Activation) -> Sequence[InputScale]:
        """The tensors that a rounded input adds to a module. Raises UnsupportedError for one that cannot be described.

        This one knows none.
        """
        raise UnsupportedError(f"{self.name} does not describe quantized activations ({activation.grid})")

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        """Reasons beyond `layout`'s and `inputs`', before any work."""
        return []

    @abstractmethod
    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """The keys of config.json that say what is quantized and how, such as "quantization_config"."""

    def metadata(self, modules: tuple[Module, ...], tensors: Sequence[str]) -> Mapping[str, str]:
        """What the metadata of the safetensors files says about the modules; `tensors` are the names of all."""
        return {}

    def files(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, bytes]:
        """Further small files, by name."""
        return {}

    @abstractmethod
    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        """Path of every quantized module of a folder to how it is stored and its shape (out, in), from its config and
        headers.

        Raises BadInputError for what contradicts itself, UnsupportedError for a way of storing that is not read.
        """


def float_modules(architecture: Architecture, modules: tuple[Module, ...]) -> list[str]:
    """Linear modules that stay in float, in order, the head last; a tied head is a module of its own."""
    names = [module.path for module in modules if module.grid in FLOATS and module.role is not Role.EMBEDDING]
    return [*names, HEAD_MODULE] if architecture.tied else names


def refuse_apart(name: str, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
    """Reasons against quantized embeddings, heads and routers, which most engines load in float only."""
    return [
        f"{module.linears[0].name} on {module.grid}: engines load the {module.role.value} of {name} only in float"
        for module in modules
        if module.role in APART and module.grid not in FLOATS
    ]
