"""How rounded activations are described: the `input_activations` entry of a config group, and its tensors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from anyquant.core.errors import UnsupportedError
from anyquant.core.plan import Activation
from anyquant.formats.folder.scheme import InputScale

SUFFIXES = ("input_scale", "input_global_scale", "input_zero_point")
PER_TOKEN = re.compile(r"(?:int([48])|fp8_e4m3)-channel")
PER_TENSOR = re.compile(r"(?:int(8)|fp8_e4m3)-tensor")
HOLDS = (
    "int8-channel, int4-channel, fp8_e4m3-channel, fp8_e4m3-g128, int8-tensor:static, fp8_e4m3-tensor:static, nvfp4, "
    "mxfp4, mxfp8_e4m3"
)


def arguments(activation: Activation) -> Mapping[str, Any]:
    """The QuantizationArgs of a rounded input. Raises UnsupportedError for one that the library does not know."""
    name, dynamic = activation.grid, activation.mode == "dynamic"
    if dynamic and (match := PER_TOKEN.fullmatch(name)):
        return {**_type(match[1]), "strategy": "token", "dynamic": True}
    if not dynamic and (match := PER_TENSOR.fullmatch(name)):
        return {**_type(match[1]), "strategy": "tensor", "dynamic": False}
    if name == "fp8_e4m3-g128" and dynamic:
        return {**_type(None), "strategy": "group", "group_size": 128, "dynamic": True}
    if name == "nvfp4" and dynamic:
        scales = {"scale_dtype": "torch.float8_e4m3fn"}
        return {**_type(None, 4), "strategy": "tensor_group", "group_size": 16, "dynamic": "local", **scales}
    if name in ("mxfp4", "mxfp8_e4m3") and dynamic:
        kind = _type(None, 4 if name == "mxfp4" else 8)
        return {**kind, "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"}
    raise UnsupportedError(
        f"compressed-tensors does not describe inputs on {name} ({activation.mode}); it knows {HOLDS}"
    )


def _type(integer: str | None, bits: int = 8) -> dict[str, Any]:
    if integer is not None:
        return {"num_bits": int(integer), "type": "int", "symmetric": True}
    return {"num_bits": bits, "type": "float", "symmetric": True}


def input_scales(activation: Activation) -> Sequence[InputScale]:
    """The tensors of a rounded input: none where everything is found from the values themselves."""
    described = arguments(activation)
    if described["dynamic"] is False:
        return (InputScale("input_scale", "scale"),)
    return (InputScale("input_global_scale", "global_scale"),) if described["dynamic"] == "local" else ()
