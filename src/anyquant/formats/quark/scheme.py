"""AMD Quark's folder: what config.json says, and what is found in a folder.

Nothing here runs such a folder: it is verified against what Quark itself writes, and byte for byte.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Activation, Plan
from anyquant.formats.folder.extra import found_extras
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.integers import Int8Layout
from anyquant.formats.folder.minifloat import ScaledLayout
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import (
    APART,
    FLOAT_PRESETS,
    Found,
    InputScale,
    Module,
    Scheme,
    float_modules,
    refuse_apart,
)
from anyquant.formats.quark.specs import INPUTS, INT8, MX, grid_of, layer_settings, layout
from anyquant.models.architecture import Architecture

VERSION = "0.13"
SCALE, ZERO = "weight_scale", "weight_zero_point"
# what activations and key-value caches are rounded with; no part of a weight
BESIDE = (ZERO, "input_scale", "input_zero_point", "output_scale")


@dataclass(frozen=True)
class Quark(Scheme):
    """See folder.scheme.Scheme."""

    name: str = "quark"
    candidates: tuple[str, ...] = ("mxfp4", "fp8_e4m3-channel")
    apart: tuple[Role, ...] = APART
    rounds_inputs: bool = True
    presets: Mapping[str, str] = field(
        default_factory=lambda: {
            "MXFP4": "mxfp4",
            "MXFP6_E3M2": "mxfp6_e3m2",
            "MXFP6_E2M3": "mxfp6_e2m3",
            "PTPC_FP8": "fp8_e4m3-channel",
            "FP8": "fp8_e4m3-tensor",
            **FLOAT_PRESETS,
        }
    )

    def layout(self, name: str) -> ModuleLayout:
        return layout(name)

    def inputs(self, activation: Activation) -> Sequence[InputScale]:
        """None: the engines find their scales from the values. `refuses` says what they do not read."""
        return ()

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        """Integers have no kernel that leaves inputs as they are: a plan has to say what happens to them."""
        reasons = refuse_apart(self.name, plan, modules)
        for module in modules:
            for linear in module.linears:
                asked = plan.decisions[linear.name].input_activation
                if asked is not None and asked != INPUTS.get(module.grid):
                    reasons.append(
                        f"{linear.name}: inputs rounded to {asked.grid} ({asked.mode}) are not written beside "
                        f"{module.grid} yet"
                    )
                elif asked is None and module.grid in INT8:
                    reasons.append(f"{linear.name}: {module.grid} runs with rounded inputs only: int8-channel")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """The settings of most modules are the global ones, others are named. Without a quantized module there is no
        quantization_config."""
        kinds = {module.path: _kind(module, plan) for module in modules if module.grid not in FLOATS}
        if not kinds:
            return {}
        usual = Counter(kinds.values()).most_common(1)[0][0]
        return {
            "quantization_config": {
                "algo_config": None,
                "exclude": float_modules(architecture, modules),
                "export": {
                    "kv_cache_group": [],
                    "min_kv_scale": 0.0,
                    "pack_method": "reorder",
                    "weight_format": "real_quantized",
                    "weight_merge_groups": None,
                },
                "global_quant_config": layer_settings(*usual),
                "kv_cache_post_rope": False,
                "kv_cache_quant_config": {},
                "layer_quant_config": {path: layer_settings(*kind) for path, kind in kinds.items() if kind != usual},
                "layer_type_quant_config": {},
                "quant_method": "quark",
                "quant_mode": "eager_mode",
                "softmax_quant_spec": None,
                "version": VERSION,
            }
        }

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        """Every module that has scales, by the settings that match its path."""
        settings = stored.config.get("quantization_config")
        if settings is None:
            return {}
        if not isinstance(settings, Mapping) or settings.get("quant_method") != "quark":
            raise UnsupportedError(f"{stored.location}: quantization_config is not Quark's")
        names = frozenset(stored.names())
        found: dict[str, Found] = {}
        for name in stored.names():
            path, _, suffix = name.rpartition(".")
            scaled = f"{path}.{SCALE}" in names
            if suffix != "weight" or not (scaled or stored.spec(name).dtype in ("U8", "I8", "F8_E4M3")):
                continue
            if not scaled:
                raise BadInputError(f"{stored.location}: {name} has no {SCALE}; it cannot be decoded without")
            found[path] = _found(stored, path, _weight_settings(settings, path, stored.location), names)
        return found


def _kind(module: Module, plan: Plan) -> tuple[str, bool]:
    """The grid of a module, and whether its inputs are rounded: always but where MX types stand alone."""
    asked = plan.decisions[module.linears[0].name].input_activation
    return module.grid, asked is not None or module.grid not in MX


def _weight_settings(settings: Mapping[str, Any], path: str, where: str) -> Mapping[str, Any]:
    """What the settings say of the weight of a module, by its path, its type or for all. Raises BadInputError."""
    excluded = settings.get("exclude") or []
    if isinstance(excluded, list) and any(_matches(str(pattern), path) for pattern in excluded):
        raise BadInputError(f"{where}: {path} has a {SCALE}, but its settings exclude it")
    named = settings.get("layer_quant_config") or {}
    by_type = settings.get("layer_type_quant_config") or {}
    layers = [one for pattern, one in named.items() if _matches(pattern, path)]
    if any(layer != layers[0] for layer in layers):
        raise BadInputError(f"{where}: {path} is matched by several entries of layer_quant_config, which differ")
    layer = layers[0] if layers else by_type.get("Linear", settings.get("global_quant_config"))
    weight = layer.get("weight") if isinstance(layer, Mapping) else None
    if not isinstance(weight, Mapping):
        raise UnsupportedError(f"{where}: its settings do not describe the weight of {path} by one type")
    return weight


def _matches(pattern: str, path: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    return fnmatchcase(path, pattern)


def _found(stored: Checkpoint, path: str, settings: Mapping[str, Any], names: frozenset[str]) -> Found:
    """The layout and shape of one module."""
    grid = grid_of(settings)
    if grid is None:
        kind = ", ".join(f"{key} {settings.get(key)}" for key in ("dtype", "qscheme", "group_size", "symmetric"))
        raise UnsupportedError(f"{stored.location}: {path}: a weight of {kind} is not read")
    weight, scale = stored.spec(f"{path}.weight"), stored.spec(f"{path}.{SCALE}")
    if len(weight.shape) != 2:
        raise UnsupportedError(f"{stored.location}: {path}.weight of {len(weight.shape)} axes is not read")
    rows, width = weight.shape
    extras = found_extras(stored, path, BESIDE, names)
    written = layout(grid)
    if isinstance(written, Int8Layout):
        return replace(written, extras=extras), (rows, width)
    if not isinstance(written, ScaledLayout):
        raise UnsupportedError(f"{stored.location}: {path} on {grid} is not read")
    columns = width * 8 // written.bits
    if grid in MX:
        return replace(written, extras=extras), (rows, columns)
    # a scale of a matrix is () or (1,), those of rows are (out,) or (out, 1)
    high = 1 if grid.endswith("tensor") else rows
    shape = scale.shape if scale.elements == high else written.scale_shape
    return replace(written, scale_shape=shape, extras=extras), (rows, columns)


FORMAT = FolderFormat(Quark())
