"""Which tensors and which settings belong to a grid in a Quark folder.

Sources: amd-quark 0.13, torch/quantization/config/config.py (QTensorConfig) and torch/utils/pack.py, by whose files the
tests judge it; vLLM, model_executor/layers/quantization/quark.
"""

from collections.abc import Mapping
from typing import Any

from anyquant.core.errors import UnsupportedError
from anyquant.core.plan import Activation
from anyquant.formats.folder.extra import Extra
from anyquant.formats.folder.integers import Int8Layout
from anyquant.formats.folder.minifloat import ScaledLayout
from anyquant.formats.folder.modules import FLOATS, ModuleLayout

FP8 = {"fp8_e4m3-tensor": "per_tensor", "fp8_e4m3-channel": "per_channel"}
INT8 = {"int8-tensor": "per_tensor", "int8-channel": "per_channel"}
MX = {"mxfp4": "fp4", "mxfp6_e2m3": "fp6_e2m3", "mxfp6_e3m2": "fp6_e3m2"}
WRITTEN: Mapping[str, ModuleLayout] = {
    "fp8_e4m3-tensor": ScaledLayout("fp8_e4m3-tensor", scale_shape=()),
    "fp8_e4m3-channel": ScaledLayout("fp8_e4m3-channel", scale_shape=("high",)),
    "int8-tensor": Int8Layout("int8-tensor", (Extra("weight_zero_point", "I8", (), 0),)),
    "int8-channel": Int8Layout("int8-channel", (Extra("weight_zero_point", "I8", ("rows",), 0),)),
    **{grid: ScaledLayout(grid, scale_dtype="U8") for grid in MX},
}
# the inputs that engines round; those of MX types may also stay as they are
INPUTS = {
    **dict.fromkeys(FP8, Activation("fp8_e4m3-channel", "dynamic")),
    **dict.fromkeys(INT8, Activation("int8-channel", "dynamic")),
    **{grid: Activation(grid, "dynamic") for grid in MX},
}
OBSERVERS = {"per_tensor": "PerTensorMinMaxObserver", "per_channel": "PerChannelMinMaxObserver"}
BLANK: Mapping[str, Any] = {
    "block_size": None,
    "ch_axis": None,
    "enable_buffer_reuse": False,
    "group_size": None,
    "is_scale_quant": False,
    "max_input_numel": 4194304,
    "mx_element_dtype": None,
    "round_method": "half_even",
    "scale_calculation_mode": None,
    "scale_format": None,
    "scale_type": None,
    "symmetric": True,
    "zero_point_type": "int32",
}
GROUP = 32


def layout(grid_name: str) -> ModuleLayout:
    """Raises UnsupportedError for a grid that the format cannot hold."""
    if grid_name not in WRITTEN:
        raise UnsupportedError(f"quark has no place for grid {grid_name!r}; it holds: {', '.join((*FLOATS, *WRITTEN))}")
    return WRITTEN[grid_name]


def layer_settings(grid: str, rounded: bool) -> dict[str, Any]:
    """The settings of a module (QLayerConfig) on `grid`; `rounded`: its inputs are rounded as INPUTS says."""
    inputs = _spec(INPUTS[grid].grid, dynamic=True, axis=1) if rounded else None
    return {
        "bias": None,
        "input_tensors": inputs,
        "output_tensors": None,
        "target_device": None,
        "weight": _spec(grid, dynamic=False, axis=0),
    }


def _spec(grid: str, dynamic: bool, axis: int) -> dict[str, Any]:
    """QTensorConfig; `axis` is the one along which there are several scales per channel."""
    if grid in MX:
        return {
            **BLANK,
            "ch_axis": -1,
            "dtype": MX[grid],
            "group_size": GROUP,
            "is_dynamic": dynamic,
            "observer_cls": "PerBlockMXObserver",
            "qscheme": "per_group",
            "scale_calculation_mode": "even",
            "scale_format": "e8m0",
            "scale_type": "float",
            "symmetric": None,
        }
    scheme, dtype = (FP8[grid], "fp8_e4m3") if grid in FP8 else (INT8[grid], "int8")
    found = {**BLANK, "dtype": dtype, "is_dynamic": dynamic, "observer_cls": OBSERVERS[scheme], "qscheme": scheme}
    return found | ({"ch_axis": axis, "scale_type": "float"} if scheme == "per_channel" else {})


def grid_of(settings: Mapping[str, Any]) -> str | None:
    """The grid that the settings of a weight describe; None for one that is not read."""
    dtype, scheme = settings.get("dtype"), settings.get("qscheme")
    if scheme == "per_group":
        fits = settings.get("group_size") == GROUP and settings.get("scale_format") == "e8m0"
        return next((grid for grid, name in MX.items() if fits and name == dtype), None)
    if scheme == "per_channel" and settings.get("ch_axis") != 0:
        return None
    if dtype == "fp8_e4m3":
        return next((grid for grid, name in FP8.items() if name == scheme), None)
    if dtype == "int8" and settings.get("symmetric") is True:
        return next((grid for grid, name in INT8.items() if name == scheme), None)
    return None
