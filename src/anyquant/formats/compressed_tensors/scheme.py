"""compressed-tensors: what config.json says, and what is found in a folder.

Source: compressed_tensors.quantization.QuantizationConfig (version 0.19), by which the tests read it.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.linear import Role
from anyquant.core.plan import Activation, Decision, Plan
from anyquant.formats.compressed_tensors.inputs import SUFFIXES, arguments, input_scales
from anyquant.formats.compressed_tensors.layouts import PLAIN, Layout, layout
from anyquant.formats.compressed_tensors.reading import find_modules
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.integers import parse
from anyquant.formats.folder.modules import FLOATS
from anyquant.formats.folder.scheme import Found, InputScale, Module, Scheme, float_modules
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture

MIXED = "mixed-precision"
LINEAR = "Linear"


@cache
def _presets(key: str) -> Mapping[str, str]:
    """What presets.toml says of each, where it does."""
    text = (files("anyquant.formats.compressed_tensors") / "presets.toml").read_text(encoding="utf-8")
    return {name: row[key] for name, row in tomllib.loads(text)["preset"].items() if key in row}


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    """See folder.scheme.Scheme."""

    name: str = "compressed-tensors"
    presets: Mapping[str, str] = field(default_factory=lambda: _presets("grid"))
    candidates: tuple[str, ...] = ("int4-g128", "int4-g32", "int8-g128")
    activations: Mapping[str, str] = field(default_factory=lambda: _presets("activations"))
    input_suffixes: tuple[str, ...] = SUFFIXES

    def variant(self, decision: Decision) -> str:
        """Integers that meet rounded integers lie a byte each, as the engines that multiply them read them."""
        rounded = decision.input_activation
        plain = rounded is not None and find_grid(rounded.grid).family.startswith("integer")
        return decision.grid + (PLAIN if plain and parse(decision.grid, tensor=True) else "")

    def layout(self, name: str) -> Layout:
        return layout(name)

    def inputs(self, activation: Activation) -> Sequence[InputScale]:
        return input_scales(activation)

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons = []
        for module in modules:
            name = module.linears[0].name
            if module.grid in FLOATS:
                continue
            if module.role is Role.EMBEDDING:
                reasons.append(f"{name} on {module.grid}: transformers loads an embedding only in float")
            elif module.role is Role.ROUTER:
                reasons.append(f"{name} on {module.grid}: routers stay in float")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        groups = _groups(modules)
        if not groups:
            return {}
        formats = {group["format"] for group in groups.values()}
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": formats.pop() if len(formats) == 1 else MIXED,
                "quantization_status": "compressed",
                "config_groups": groups,
                "ignore": float_modules(architecture, modules),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        return find_modules(stored)


def _groups(modules: tuple[Module, ...]) -> dict[str, dict[str, Any]]:
    """One config group for each way of storing and rounding. A single one is meant for all Linears that are not
    ignored; of several, each names its modules, so that no module is meant twice."""
    together: dict[tuple[str, Activation | None], list[str]] = {}
    for module in modules:
        if module.grid not in FLOATS:
            together.setdefault((module.variant, module.activation), []).append(module.path)
    return {
        f"group_{number}": {
            "targets": [LINEAR] if len(together) == 1 else paths,
            "weights": dict(layout(variant).arguments()),
            "input_activations": None if activation is None else dict(arguments(activation)),
            "output_activations": None,
            "format": layout(variant).format,
        }
        for number, ((variant, activation), paths) in enumerate(together.items())
    }


FORMAT = FolderFormat(CompressedTensors())
