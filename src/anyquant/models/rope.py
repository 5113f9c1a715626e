"""Rotary position settings of config.json, in either spelling."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import EMPTY
from anyquant.models.families import Family
from anyquant.models.fields import shown

# keys of each scaling: those it needs, then those it may have (transformers.modeling_rope_utils)
KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"})
        | {"mscale", "mscale_all_dim", "truncate"},
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor", "original_max_position_embeddings"}),
        frozenset({"factor", "attention_factor"}),
    ),
}


def read_rope(
    config: Mapping[str, Any], family: Family, head_dim: int, context: int, where: str
) -> tuple[float, int, Mapping[str, Any]]:
    """(theta, rotated dimensions of a head, scaling). Scaling is {} or {"rope_type": ..., its parameters}.

    Raises BadInputError for contradictory or impossible values, UnsupportedError for a rotary type or parameter that
    is not known.
    """
    settings = _merged(config, where)
    theta = settings.pop("rope_theta", None)
    theta = family.default_theta if theta is None else theta
    if not _is_number(theta) or theta <= 0:
        raise BadInputError(f"{where}: rope_theta = {shown(theta)} is not a positive number")
    rotated = _rotated(settings.pop("partial_rotary_factor", None), family, head_dim, where)
    kind = _kind(settings, family, where)
    if kind == "default":
        settings.pop("original_max_position_embeddings", None)
    original = config.get("original_max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        # the field beside the rotary settings has priority over the one inside, as in transformers
        if original is not None:
            settings["original_max_position_embeddings"] = original
        elif kind != "longrope":
            settings.setdefault("original_max_position_embeddings", context)
    _check(kind, settings, rotated, where)
    return float(theta), rotated, MappingProxyType({"rope_type": kind, **settings}) if kind != "default" else EMPTY


def _merged(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of all spellings in one mapping; two different values for one key are refused."""
    merged: dict[str, Any] = {}
    outside = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for source in ("rope_parameters", "rope_scaling", ""):
        found = config.get(source) if source else outside
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise BadInputError(f"{where}: {source} = {shown(found)} is not an object")
        for key, value in found.items():
            name = "rope_type" if key == "type" else key
            if value is None:
                continue
            if name in merged and merged[name] != value:
                raise BadInputError(
                    f"{where}: {name} is given twice, as {shown(merged[name])} and as {shown(value)}; keep one"
                )
            merged[name] = value
    return merged


def _rotated(factor: Any, family: Family, head_dim: int, where: str) -> int:
    factor = 1.0 if factor is None else factor
    if not _is_number(factor) or not 0 < factor <= 1:
        raise BadInputError(f"{where}: partial_rotary_factor = {shown(factor)} is not a number above 0 and up to 1")
    if factor != 1 and not family.partial_rotary:
        raise UnsupportedError(
            f"{where}: partial_rotary_factor = {shown(factor)} is not supported for {family.model_type}; only 1"
        )
    rotated = int(head_dim * factor)
    if rotated == 0 or rotated % 2:
        raise BadInputError(
            f"{where}: {rotated} of {head_dim} dimensions of a head would be rotated; they come in pairs"
        )
    return rotated


def _kind(settings: dict[str, Any], family: Family, where: str) -> str:
    kind = settings.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in family.rope_types:
        known = ", ".join(sorted(family.rope_types))
        raise UnsupportedError(
            f"{where}: rope_type = {shown(kind)} is not supported for {family.model_type}; known: {known}"
        )
    return kind


def _check(kind: str, settings: Mapping[str, Any], rotated: int, where: str) -> None:
    needed, allowed = KEYS[kind]
    for key in sorted(needed - settings.keys()):
        raise BadInputError(f"{where}: rotary scaling {kind} has no {key} in config.json")
    for key in sorted(settings.keys() - needed - allowed):
        raise UnsupportedError(f"{where}: {key} = {shown(settings[key])} is not known for rotary scaling {kind}")
    for key, value in settings.items():
        if key in ("short_factor", "long_factor"):
            _check_factors(key, value, rotated, where)
        elif key == "truncate":
            if not isinstance(value, bool):
                raise BadInputError(f"{where}: {key} = {shown(value)} of the rotary scaling is not true or false")
        elif not _is_number(value) or value <= 0:
            raise BadInputError(f"{where}: {key} = {shown(value)} of the rotary scaling is not a positive number")


def _check_factors(key: str, value: Any, rotated: int, where: str) -> None:
    if not isinstance(value, list) or not all(_is_number(item) and item > 0 for item in value):
        raise BadInputError(f"{where}: {key} of the rotary scaling is not a list of positive numbers")
    if len(value) != rotated // 2:
        raise BadInputError(f"{where}: {key} of the rotary scaling has {len(value)} values, expected {rotated // 2}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
