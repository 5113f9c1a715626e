"""What is found in a ModelOpt folder: the algorithm of each module from its settings, the rest from its tensors.

Newer folders have their settings in config.json, in the words of compressed-tensors, and in hf_quant_config.json; older
ones only in the latter. Both name the algorithm (`quant_algo`), for all modules or by module (`quantized_layers`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.formats.folder.extra import Extra, found_extras
from anyquant.formats.folder.integers import Int8Layout
from anyquant.formats.folder.minifloat import NvLayout, ScaledLayout
from anyquant.formats.folder.modules import ModuleLayout
from anyquant.formats.folder.scheme import Found
from anyquant.formats.modelopt.layouts import SMOOTHING, Int4Layout, Smoothed, one_value
from anyquant.grids.fp8 import BLOCK

LEGACY = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
SCALE, SCALE_2, INVERSE = "weight_scale", "weight_scale_2", "weight_scale_inv"
# what activations and key-value caches are rounded with; no part of a weight
BESIDE = ("input_scale", "k_scale", "v_scale")
FP8 = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "channel", "FP8_PB_WO": "block", "FP8_BLOCK_SCALES": "block"}
NVFP4 = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8")


@dataclass(frozen=True)
class Stated:
    """The algorithm of all modules, or of each by path, in capitals."""

    everywhere: str
    layers: Mapping[str, str] | None

    def of(self, path: str) -> str | None:
        return self.everywhere if self.layers is None else self.layers.get(path)


def find(stored: Checkpoint) -> Mapping[str, Found]:
    """See folder.scheme.Scheme.find. A module is quantized where it has scales and where its settings say so; one
    without the other is refused."""
    stated = _stated(stored)
    if stated is None:
        return {}
    names = frozenset(stored.names())
    found: dict[str, Found] = {}
    for name in stored.names():
        path, _, suffix = name.rpartition(".")
        scaled = any(f"{path}.{one}" in names for one in (SCALE, INVERSE))
        if suffix != "weight" or not (scaled or stored.spec(name).dtype in ("U8", "I8", "F8_E4M3")):
            continue
        if not scaled:
            raise BadInputError(f"{stored.location}: {name} has no {SCALE}; it cannot be decoded without")
        algorithm = stated.of(path)
        if algorithm is None:
            raise BadInputError(f"{stored.location}: {path} has a {SCALE}, but quantized_layers does not name it")
        found[path] = _module(stored, path, algorithm, names)
    for path in stated.layers or ():
        if path not in found:
            raise BadInputError(f"{stored.location}: quantized_layers names {path}, which has no {SCALE}")
    return found


def _stated(stored: Checkpoint) -> Stated | None:
    """None when neither file says that anything is quantized. Raises BadInputError."""
    settings: Any = stored.config.get("quantization_config")
    if settings is None:
        text = stored.text_file(LEGACY)
        if text is None:
            return None
        try:
            settings = json.loads(text)["quantization"]
        except (ValueError, KeyError, TypeError):
            raise BadInputError(f"{stored.location}: {LEGACY} does not say what is quantized") from None
    elif not isinstance(settings, Mapping) or not str(settings.get("quant_method")).startswith("modelopt"):
        raise UnsupportedError(f"{stored.location}: quantization_config is not ModelOpt's")
    if isinstance(settings, Mapping) and isinstance(settings.get("quantization"), Mapping):
        settings = settings["quantization"]
    algorithm = settings.get("quant_algo") if isinstance(settings, Mapping) else None
    if not isinstance(algorithm, str):
        raise BadInputError(f"{stored.location}: its settings name no quant_algo")
    if algorithm.upper() != MIXED:
        return Stated(algorithm.upper(), None)
    layers = settings.get("quantized_layers")
    if not isinstance(layers, Mapping) or not layers:
        raise BadInputError(f"{stored.location}: {MIXED} without quantized_layers")
    named = {path: layer.get("quant_algo") if isinstance(layer, Mapping) else None for path, layer in layers.items()}
    for path, one in named.items():
        if not isinstance(one, str):
            raise BadInputError(f"{stored.location}: quantized_layers gives {path} no quant_algo")
    return Stated(MIXED, {path: str(one).upper() for path, one in named.items()})


def _module(stored: Checkpoint, path: str, algorithm: str, names: frozenset[str]) -> Found:
    """The layout and shape of one module."""
    weight = stored.spec(f"{path}.weight")
    scale = stored.spec(f"{path}.{SCALE if f'{path}.{SCALE}' in names else INVERSE}")
    if len(weight.shape) != 2:
        raise UnsupportedError(f"{stored.location}: {path}.weight of {len(weight.shape)} axes is not read")
    extras = found_extras(stored, path, BESIDE, names)
    second = stored.spec(f"{path}.{SCALE_2}") if f"{path}.{SCALE_2}" in names else None
    layout, shape = _layout(stored, algorithm, weight, scale, second, extras)
    if f"{path}.{SMOOTHING}" in names:
        layout = Smoothed(layout, stored.spec(f"{path}.{SMOOTHING}").dtype)
    return layout, shape


def _layout(
    stored: Checkpoint,
    algorithm: str,
    weight: TensorSpec,
    scale: TensorSpec,
    second: TensorSpec | None,
    extras: tuple[Extra, ...],
) -> tuple[ModuleLayout, tuple[int, int]]:
    """By the algorithm; shapes of scales vary (ModelOpt drops axes of one), their number does not."""
    rows, columns = weight.shape
    if algorithm in FP8:
        reach = FP8[algorithm]
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        expected = {"tensor": (1, 1), "channel": (rows, 1), "block": blocks}[reach]
        if scale.elements == expected[0] * expected[1]:
            suffix = scale.name.rpartition(".")[2]
            found = ScaledLayout(f"fp8_e4m3-{reach}", suffix, scale_shape=scale.shape, extras=extras)
            return found, (rows, columns)
    elif algorithm in NVFP4:
        if second is None or not one_value(second.dtype, second.shape, second.nbytes):
            raise BadInputError(f"{stored.location}: {weight.name} has no {SCALE_2} of one value beside its {SCALE}")
        return NvLayout(second.shape, extras), (rows, 2 * columns)
    elif algorithm == "MXFP8":
        return ScaledLayout("mxfp8_e4m3", scale_dtype="U8", extras=extras), (rows, columns)
    elif algorithm == "W4A8_MXFP4_FP8":
        return ScaledLayout("mxfp4", scale_dtype="U8", extras=extras), (rows, 2 * columns)
    elif algorithm in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        return Int8Layout(extras=extras), (rows, columns)
    elif algorithm == "W4A16_AWQ":
        groups = scale.row_length
        if scale.shape == (2 * rows, groups) and groups and columns % groups == 0:
            return Int4Layout(columns // groups, extras), (2 * rows, columns)
    else:
        raise UnsupportedError(f"{stored.location}: quant_algo {algorithm} of {weight.name} is not read")
    raise BadInputError(
        f"{stored.location}: {scale.name} is {list(scale.shape)}, which does not fit {weight.name} of "
        f"{list(weight.shape)} under {algorithm}"
    )
