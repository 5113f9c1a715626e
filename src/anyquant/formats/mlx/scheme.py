"""MLX: what config.json says, and what is found in a folder.

Source: mlx_lm.utils (0.32: `load_model`, `quantize_model`, `save_config`), by which the tests read it.
"""

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Plan
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import Found, Module, Scheme
from anyquant.formats.mlx.layouts import layout, layout_of
from anyquant.grids.affine import GROUPS, WIDTHS
from anyquant.models.architecture import Architecture

# families whose tensor names mlx-lm has as transformers has them, and whose computation it shares
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
# settings of yarn that mlx-lm does not read
UNREAD_YARN = ("attention_factor", "truncate")
# mode -> bits and group where settings say null (mlx.nn.layers.quantized)
DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
SCALES, WEIGHT = ".scales", ".weight"


def _presets() -> Mapping[str, str]:
    """Preset to the grid of all matrices, from presets.toml."""
    text = (files("anyquant.formats.mlx") / "presets.toml").read_text(encoding="utf-8")
    return {name: row["grid"] for name, row in tomllib.loads(text)["preset"].items()}


@dataclass(frozen=True)
class Mlx(Scheme):
    """See folder.scheme.Scheme. Embedding and head are quantized like the blocks, as mlx-lm does by default."""

    name: str = "mlx"
    presets: Mapping[str, str] = field(default_factory=lambda: _presets())
    candidates: tuple[str, ...] = tuple(f"affine{bits}-g64" for bits in WIDTHS)
    apart: tuple[Role, ...] = ()

    def claims(self, config: Mapping[str, Any]) -> bool:
        """mlx-lm writes its settings twice, without a method."""
        settings = config.get("quantization")
        return isinstance(settings, Mapping) and "quant_method" not in settings

    def layout(self, name: str) -> ModuleLayout:
        return layout(name)

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        """What mlx-lm would load, and compute something else of."""
        reasons = []
        if architecture.family not in FAMILIES:
            known = ", ".join(FAMILIES)
            reasons.append(f"models of family {architecture.family} are not written to mlx yet; known: {known}")
        scaling = architecture.dimensions.rope_scaling
        if scaling.get("rope_type") == "longrope":
            reasons.append(
                "mlx-lm rotates by the long factors of longrope whatever the length; transformers by the short ones "
                f"up to {scaling.get('original_max_position_embeddings')} tokens"
            )
        unread = [key for key in UNREAD_YARN if scaling.get(key) not in (None, True)]
        return [*reasons, *(f"mlx-lm does not read {key} of the rotary scaling" for key in unread)]

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """The most common settings, those of every other module by its path, and what mlx-lm reads only outside.

        Its Llama and Phi-3 look for rope_theta and rope_scaling where transformers had them before version 5, and fall
        back to 10000 in silence; they take heads for tied that config.json does not say to be separate.
        """
        sizes = architecture.dimensions
        said: dict[str, Any] = {"rope_theta": sizes.rope_theta, "tie_word_embeddings": architecture.tied}
        if sizes.rope_scaling:
            said["rope_scaling"] = dict(sizes.rope_scaling)
        if sizes.rope_dim != sizes.head_dim:
            said["partial_rotary_factor"] = sizes.rope_dim / sizes.head_dim
        stored = {module.path: layout(module.grid) for module in modules if module.grid not in FLOATS}
        if not stored:
            return said
        weights: Counter[tuple[tuple[str, Any], ...]] = Counter()
        for module in modules:
            if module.path in stored:
                weights[tuple(stored[module.path].settings().items())] += module.shape[0] * module.shape[1]
        common = dict(weights.most_common(1)[0][0])
        others = {path: one.settings() for path, one in stored.items() if one.settings() != common}
        settings = {**common, **others}
        return {**said, "quantization": settings, "quantization_config": settings}

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        settings = stored.config.get("quantization")
        if settings is None:
            return {}
        if not isinstance(settings, Mapping):
            raise BadInputError(f"{stored.location}: quantization in config.json is not an object")
        names = set(stored.names())
        paths = [name.removesuffix(SCALES) for name in stored.names() if name.endswith(SCALES)]
        found: dict[str, Found] = {}
        for path in paths:
            if f"{path}{WEIGHT}" not in names:
                raise BadInputError(f"{stored.location}: {path} has scales and no weight")
            found[path] = _read(stored, path, settings)
        for path, one in settings.items():
            if isinstance(one, Mapping) and path not in found:
                raise BadInputError(
                    f"{stored.location}: config.json gives settings for {path}, which has no {SCALES[1:]} in the folder"
                )
        return found


def _read(stored: Checkpoint, path: str, settings: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """Grid and shape of a module, by its own settings or the common ones, which its tensors must fit."""
    where = f"{stored.location}: {path}"
    own = settings.get(path, True)
    if own is False:
        raise BadInputError(f"{where}: config.json says that it is not quantized, and it has scales")
    one = own if isinstance(own, Mapping) else settings
    if one.get("global_scale"):
        raise UnsupportedError(f"{where}: a scale of the whole tensor is not read from mlx folders")
    mode, bits, group = one.get("mode", "affine"), one.get("bits"), one.get("group_size")
    usual = DEFAULTS.get(mode, (None, None)) if isinstance(mode, str) else (None, None)
    bits, group = (default if said is None else said for said, default in zip((bits, group), usual, strict=True))
    kind = layout_of(mode, bits, group) if isinstance(bits, int) and isinstance(group, int) else None
    if kind is None:
        raise UnsupportedError(
            f"{where}: mode {mode!r} with {bits!r} bits in groups of {group!r} is not read; known: affine with "
            f"{', '.join(map(str, WIDTHS))} bits in groups of {', '.join(map(str, GROUPS))}, mxfp4, mxfp8 and nvfp4"
        )
    weight, scales = stored.spec(f"{path}{WEIGHT}"), stored.spec(f"{path}{SCALES}")
    columns = scales.row_length * kind.group
    if weight.dtype != "U32" or weight.row_length * 32 != columns * kind.bits:
        raise BadInputError(
            f"{where}: weight {weight.dtype} {list(weight.shape)} and scales {list(scales.shape)} do not fit {bits} "
            f"bits in groups of {group}"
        )
    return kind.grid, (weight.rows, columns)


def _fallbacks() -> Mapping[str, tuple[str, ...]]:
    """Smaller groups, then as stored: mlx-lm leaves what its groups do not divide as it is."""
    found: dict[str, tuple[str, ...]] = {}
    for form in ("affine{}-g{}", "int{}-g{}", "int{}-g{}-asym"):
        for bits in WIDTHS:
            for group in GROUPS:
                smaller = [form.format(bits, other) for other in reversed(GROUPS) if other < group]
                found[form.format(bits, group)] = (*smaller, "")
    return found | dict.fromkeys(("mxfp4", "mxfp8_e4m3", "nvfp4-bare"), ("",))


FORMAT = FolderFormat(Mlx(), framework="mlx", fallbacks=_fallbacks(), fuses=False)
