"""ModelOpt's unified checkpoint: what is written in hf_quant_config.json and, in other words, in config.json.

Sources: nvidia-modelopt 0.47, torch/export (process_layer_quant_config, convert_hf_quant_config_format), by whose files
the tests judge it; vLLM, model_executor/layers/quantization/modelopt.py; TensorRT-LLM, _torch/modules/linear.py.

Nothing here runs such a folder: it is verified against ModelOpt's schema, and byte for byte.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.linear import Role
from anyquant.core.plan import Activation, Plan
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import (
    APART,
    FLOAT_PRESETS,
    HEAD_MODULE,
    Found,
    InputScale,
    Module,
    Scheme,
    refuse_apart,
)
from anyquant.formats.modelopt.layouts import INPUT_SCALE, Int4Layout, layout
from anyquant.formats.modelopt.reading import LEGACY, find
from anyquant.models.architecture import Architecture

# what engines look for to tell who laid out the folder, not who wrote it
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "nvfp4 with inputs": {"quant_algo": "NVFP4", "group_size": 16},
    "fp8_e4m3-tensor": {"quant_algo": "FP8"},
    "fp8_e4m3-channel": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    "fp8_e4m3-block": {"quant_algo": "fp8_pb_wo"},  # in small letters, as ModelOpt writes it
    "mxfp8_e4m3": {"quant_algo": "MXFP8", "group_size": 32},
    "int8-channel": {"quant_algo": "W8A16"},
}
NVFP4, FP8 = Activation("nvfp4", "dynamic"), Activation("fp8_e4m3-tensor", "static")
# how the engines round what enters modules on a grid
INPUTS = {
    "fp8_e4m3-channel": Activation("fp8_e4m3-channel", "dynamic"),
    "mxfp8_e4m3": Activation("mxfp8_e4m3", "dynamic"),
    "nvfp4": NVFP4,
    "fp8_e4m3-tensor": FP8,
}
# and what they read of it: amax / 448, and amax / (6 * 448) as a power of two
SCALES = {
    FP8: (InputScale(INPUT_SCALE, "scale", ()),),
    NVFP4: (InputScale(INPUT_SCALE, "global_scale", (), reciprocal=True),),
}
GROUPS: Mapping[str, tuple[Mapping[str, Any] | None, Mapping[str, Any]]] = {
    # quant_algo: how inputs and weights are described in the words of compressed-tensors
    "FP8": ({"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"}),
    "FP8_PER_CHANNEL_PER_TOKEN": (
        {"num_bits": 8, "type": "float"},
        {"num_bits": 8, "type": "float", "strategy": "channel"},
    ),
    "NVFP4": ({"num_bits": 4, "type": "float", "group_size": 16}, {"num_bits": 4, "type": "float", "group_size": 16}),
    "W4A16_NVFP4": (None, {"num_bits": 4, "type": "float", "group_size": 16}),
    "W4A16_AWQ": (None, {"num_bits": 4, "type": "int"}),
    "W8A16": (None, {"num_bits": 8, "type": "int"}),
    "MXFP8": ({"num_bits": 8, "type": "float", "group_size": 32}, {"num_bits": 8, "type": "float", "group_size": 32}),
}
DESCRIBED = ("FP8", "NVFP4", "W4A16_NVFP4")  # the algorithms for which a folder of one kind describes its group as well
WHOLE_BLOCKS = 128


@dataclass(frozen=True)
class ModelOpt(Scheme):
    """See folder.scheme.Scheme."""

    name: str = "modelopt"
    candidates: tuple[str, ...] = ("int4-g128", "int8-channel")
    apart: tuple[Role, ...] = APART
    input_suffixes: tuple[str, ...] = (INPUT_SCALE,)
    rounds_inputs: bool = True
    activations: Mapping[str, str] = field(default_factory=lambda: {"FP8": "fp8_e4m3-tensor:static", "NVFP4": "nvfp4"})
    presets: Mapping[str, str] = field(
        default_factory=lambda: {
            "FP8": "fp8_e4m3-tensor",
            "NVFP4": "nvfp4",
            "W4A16_NVFP4": "nvfp4",
            "W4A16_AWQ": "int4-g128",
            "W8A16": "int8-channel",
            "FP8_PER_CHANNEL_PER_TOKEN": "fp8_e4m3-channel",
            "FP8_PB_WO": "fp8_e4m3-block",
            "MXFP8": "mxfp8_e4m3",
            **FLOAT_PRESETS,
        }
    )

    def layout(self, name: str) -> ModuleLayout:
        return layout(name)

    def inputs(self, activation: Activation) -> Sequence[InputScale]:
        """Whether a grid is met by it, `refuses` says."""
        return SCALES.get(activation, ())

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons = refuse_apart(self.name, plan, modules)
        quantized = {module.grid for module in modules if module.grid not in FLOATS}
        for module in modules:
            reasons += _module_reasons(module, plan)
        if len(quantized) > 1 and "fp8_e4m3-block" in quantized:
            reasons.append("fp8_e4m3-block is the grid of all modules of a ModelOpt folder or of none")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        legacy = _legacy(architecture, modules)
        return {} if legacy is None else {"quantization_config": _unified(legacy["quantization"])}

    def files(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, bytes]:
        legacy = _legacy(architecture, modules)
        return {} if legacy is None else {LEGACY: json.dumps(legacy, indent=4).encode() + b"\n"}

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        return find(stored)


def _module_reasons(module: Module, plan: Plan) -> list[str]:
    """Why the engines that read ModelOpt's folders could not load a module, or would not compute what is planned."""
    reasons = []
    for linear in module.linears:
        asked = plan.decisions[linear.name].input_activation
        if asked is not None and asked != INPUTS.get(module.grid):
            reasons.append(
                f"{linear.name}: inputs rounded to {asked.grid} ({asked.mode}) are not read beside {module.grid}"
            )
    if module.grid == "fp8_e4m3-tensor" and module.activation is None:
        reasons.append(
            f"{module.path}: FP8 needs the scale of its inputs: --activations fp8_e4m3-tensor:static; "
            "fp8_e4m3-channel and fp8_e4m3-block need none"
        )
    multiple = {"fp8_e4m3-block": WHOLE_BLOCKS}.get(module.grid, layout_multiple(module.grid))
    if any(linear.view.rows % multiple for linear in module.linears):
        reasons.append(f"{module.path}: its rows are not a multiple of {multiple}, as engines expect of {module.grid}")
    if module.grid == "fp8_e4m3-block" and module.shape[1] % WHOLE_BLOCKS:
        reasons.append(f"{module.path}: its {module.shape[1]} columns are not whole blocks of {WHOLE_BLOCKS}")
    return reasons


def layout_multiple(grid: str) -> int:
    """Rows that lie together in a tensor."""
    return 1 if grid in FLOATS else layout(grid).row_multiple


def _algorithm(module: Module) -> Mapping[str, Any]:
    """The entry of a module under "quantized_layers"."""
    kind = layout(module.grid)
    if isinstance(kind, Int4Layout):
        return {"quant_algo": "W4A16_AWQ", "group_size": kind.group, "has_zero_point": False, "pre_quant_scale": True}
    return ALGORITHMS["nvfp4 with inputs" if module.activation == NVFP4 else module.grid]


def _legacy(architecture: Architecture, modules: tuple[Module, ...]) -> dict[str, Any] | None:
    """hf_quant_config.json; None when nothing is quantized. A mixture names what is quantized, else what is not is
    named; a tied head is a module of its own."""
    layers = {module.path: dict(_algorithm(module)) for module in modules if module.grid not in FLOATS}
    if not layers:
        return None
    quantization: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    first = next(iter(layers.values()))
    if all(layer == first for layer in layers.values()):
        excluded = [module.path for module in modules if module.grid in FLOATS]
        excluded += [HEAD_MODULE] if architecture.tied else []
        quantization |= {**first, "exclude_modules": sorted(excluded)}
    else:
        quantization["quantized_layers"] = layers
    return {"producer": PRODUCER, "quantization": quantization}


def _unified(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The same as config.json says it."""
    found: dict[str, Any] = {}
    layers = quantization.get("quantized_layers")
    if layers is not None:
        paths: dict[str, list[str]] = {}
        for path, layer in layers.items():
            paths.setdefault(json.dumps(layer, sort_keys=True), []).append(path)
        found["config_groups"] = {
            f"group_{place}": {**_group(json.loads(layer)), "targets": sorted(names)}
            for place, (layer, names) in enumerate(paths.items())
        }
        found["quantized_layers"] = layers
    elif quantization["quant_algo"] in DESCRIBED:
        found["config_groups"] = {"group_0": {**_group(quantization), "targets": ["Linear"]}}
    return {
        **found,
        "ignore": quantization.get("exclude_modules", []),
        "quant_algo": quantization["quant_algo"],
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }


def _group(layer: Mapping[str, Any]) -> dict[str, Any]:
    inputs, weights = GROUPS[layer["quant_algo"]]
    group = {"group_size": layer["group_size"]} if layer["quant_algo"] == "W4A16_AWQ" else {}
    found: dict[str, Any] = {} if inputs is None else {"input_activations": {"dynamic": False, **inputs}}
    return found | {"weights": {"dynamic": False, **weights, **group}}


FORMAT = FolderFormat(ModelOpt())
