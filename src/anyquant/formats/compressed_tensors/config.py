"""config.json of a compressed-tensors folder: the source's own, with `quantization_config`.

Source: compressed_tensors.quantization.QuantizationConfig (version 0.19), by which the tests read it.
"""

import json
from collections.abc import Mapping
from typing import Any

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import Plan
from anyquant.formats.certificate import BLANK, OBJECT, WIDEST, Certificate
from anyquant.formats.compressed_tensors.layouts import IntegerLayout, layout
from anyquant.formats.masks import refuse_corrections
from anyquant.models.architecture import Architecture

FORMAT_NAME = "pack-quantized"
HEAD_MODULE = "lm_head"


def refuse_grids(architecture: Architecture, plan: Plan) -> list[str]:
    """Why the grids of a plan cannot be described by one config group."""
    reasons, quantized = [], set()
    for linear in architecture.linears:
        decision = plan.decisions[linear.name]
        try:
            found = layout(decision.grid)
        except UnsupportedError as error:
            reasons.append(f"{linear.name}: {error}")
            continue
        reasons += refuse_corrections(decision, "compressed-tensors")
        if decision.input_activation:
            reasons.append(f"{linear.name}: quantized activations are not written to compressed-tensors yet")
        if not isinstance(found, IntegerLayout):
            continue
        quantized.add(decision.grid)
        if linear.role is Role.EMBEDDING:
            reasons.append(f"{linear.name} on {decision.grid}: transformers loads an embedding only in float")
        elif linear.role is Role.ROUTER:
            reasons.append(f"{linear.name} on {decision.grid}: routers stay in float")
    if len(quantized) > 1:
        reasons.append(f"several integer grids ({', '.join(sorted(quantized))}) are not written in one folder yet")
    return reasons


def model_config(source: Mapping[str, Any], architecture: Architecture, plan: Plan) -> bytes:
    """The bytes of config.json. Without an integer grid there is no quantization_config."""
    config = {**source, **plan.config_patch}
    integer = _integer_layout(architecture.linears, plan)
    if integer is not None:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": FORMAT_NAME,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": integer.arguments(),
                    "input_activations": None,
                    "output_activations": None,
                    "format": FORMAT_NAME,
                }
            },
            "ignore": _float_modules(architecture, plan),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    return _rendered(config, BLANK)


def stamp_config(text: bytes, certificate: Certificate) -> bytes:
    """A config.json of `model_config` with its certificate filled in, as many bytes as before."""
    return _rendered(json.loads(text), certificate)


def _rendered(config: Mapping[str, Any], certificate: Certificate) -> bytes:
    """Padded behind the object with blanks, which JSON ignores, to the length that any certificate allows."""

    def text(one: Certificate) -> bytes:
        return json.dumps({**config, OBJECT: one.plain()}, indent=2, ensure_ascii=False, sort_keys=True).encode()

    return text(certificate).ljust(len(text(WIDEST))) + b"\n"


def _integer_layout(linears: tuple[Linear, ...], plan: Plan) -> IntegerLayout | None:
    for linear in linears:
        found = layout(plan.decisions[linear.name].grid)
        if isinstance(found, IntegerLayout):
            return found
    return None


def _float_modules(architecture: Architecture, plan: Plan) -> list[str]:
    """Linear modules that stay in float, in order, the head last; a tied head is a module of its own."""
    modules = {
        linear.module: None
        for linear in architecture.linears
        if linear.role is not Role.EMBEDDING and not isinstance(layout(plan.decisions[linear.name].grid), IntegerLayout)
    }
    if architecture.tied:
        modules[HEAD_MODULE] = None
    return list(modules)


def read_integer_layout(config: Mapping[str, Any], where: str) -> IntegerLayout | None:
    """The layout that a config written by `model_config` describes. Raises UnsupportedError for any other."""
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
