"""compressed-tensors: what config.json says, and what is found in a folder.

Source: compressed_tensors.quantization.QuantizationConfig (version 0.19), by which the tests read it.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Plan
from anyquant.formats.compressed_tensors.layouts import IntegerLayout, layout
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import APART, Found, Module, float_modules
from anyquant.models.architecture import Architecture

FORMAT_NAME = "pack-quantized"
PACKED = ".weight_packed"


@dataclass(frozen=True)
class CompressedTensors:
    """See folder.scheme.Scheme."""

    name: str = "compressed-tensors"
    candidates: tuple[str, ...] = ("int4-g128",)
    apart: tuple[Role, ...] = APART

    @cached_property
    def presets(self) -> Mapping[str, str]:
        """Scheme to the grid of the block Linears, from presets.toml."""
        text = (files("anyquant.formats.compressed_tensors") / "presets.toml").read_text(encoding="utf-8")
        return {name: row["grid"] for name, row in tomllib.loads(text)["preset"].items()}

    def layout(self, grid: str) -> ModuleLayout:
        return layout(grid)

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons, quantized = [], set()
        for module in modules:
            decision = plan.decisions[module.linears[0].name]
            if decision.input_activation:
                reasons.append(f"{decision.linear}: quantized activations are not written to compressed-tensors yet")
            if module.grid in FLOATS:
                continue
            quantized.add(module.grid)
            if module.role is Role.EMBEDDING:
                reasons.append(f"{decision.linear} on {module.grid}: transformers loads an embedding only in float")
            elif module.role is Role.ROUTER:
                reasons.append(f"{decision.linear} on {module.grid}: routers stay in float")
        if len(quantized) > 1:
            reasons.append(f"several integer grids ({', '.join(sorted(quantized))}) are not written in one folder yet")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        grid = next((module.grid for module in modules if module.grid not in FLOATS), None)
        if grid is None:
            return {}
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": FORMAT_NAME,
                "quantization_status": "compressed",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": layout(grid).arguments(),
                        "input_activations": None,
                        "output_activations": None,
                        "format": FORMAT_NAME,
                    }
                },
                "ignore": float_modules(architecture, modules),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        }

    def files(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, bytes]:
        return {}

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        integer = _read_layout(stored.config, stored.location)
        if integer is None:
            return {}
        found: dict[str, Found] = {}
        for name in stored.names():
            if name.endswith(PACKED):
                spec = stored.spec(name)
                found[name.removesuffix(PACKED)] = (integer.grid, (spec.rows, spec.row_length * 32 // integer.bits))
        return found


def _read_layout(config: Mapping[str, Any], where: str) -> IntegerLayout | None:
    """The layout that a config describes. Raises UnsupportedError for one that is not read."""
    settings = config.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise BadInputError(f"{where}: quantization_config is not an object")
    groups = settings.get("config_groups")
    group = groups.get("group_0") if isinstance(groups, Mapping) and len(groups) == 1 else None
    arguments = group.get("weights") if isinstance(group, Mapping) else None
    if settings.get("format") == FORMAT_NAME and isinstance(arguments, Mapping):
        bits, size = arguments.get("num_bits"), arguments.get("group_size")
        found = layout(f"int{bits}-g{size}")
        if isinstance(found, IntegerLayout) and {**found.arguments(), **arguments} == dict(found.arguments()):
            return found
    raise UnsupportedError(f"{where}: only one group of symmetric {FORMAT_NAME} integers is read back")


FORMAT = FolderFormat(CompressedTensors())
