"""AutoRound: what config.json says, and what is found in a folder.

A folder has one `packing_format`, and each of them one way to store integers:

    auto_round:auto_gptq    symmetric: GPTQ's layout, version 1, without g_idx
    auto_round:auto_awq     asymmetric of 4 bits: AWQ's layout, which vLLM reads, too
    auto_round              asymmetric of other widths: GPTQ's layout, zero-points as they are

`extra_config` says of single modules what is other than the rest: bits, group size, symmetry; 16 bits stay in float.

Source: auto-round 0.16, export/export_to_autoround, inference/convert_model.py and inference/backend.py;
transformers 5.17 (AutoRoundConfig); vLLM (auto_round.py).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import Decision, Plan
from anyquant.formats.awq import layouts as awq
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.integers import IntegerGridName, parse
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import FLOAT_PRESETS, Found, Module, Scheme
from anyquant.formats.gptq import layouts as gptq
from anyquant.formats.gptq.reading import G_IDX, measured, named, quantized_paths, settings_of
from anyquant.formats.gptq.scheme import MULTIPLE, names_of, refuse_modules
from anyquant.models.architecture import Architecture

HOLDS = f"{', '.join(FLOATS)}, int2 to int8 (-gN, -channel, each with -asym and -f16)"
BITS = tuple(range(2, 9))
WHOLE = 16  # bits that stay in float
GPTQ, AWQ, PLAIN = "auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"
# how each packing format stores modules: the end of a layout's name
ENDS = {GPTQ: "1:bare", AWQ: "awq", PLAIN: "2:bare"}
# other names under which folders say the same
ALIASES = {"auto_round:gptq": GPTQ, "auto": GPTQ, "auto_round:awq": AWQ, "auto_round:gptqmodel": PLAIN}
PRESETS = {
    "W2A16": "int2-g128",
    "W2A16G32": "int2-g32",
    "W2A16G64": "int2-g64",
    "W3A16": "int3-g128",
    "W4A16": "int4-g128",
    "W8A16": "int8-g128",
    "W4A16_ASYM": "int4-g128-asym",
    **FLOAT_PRESETS,
}


@dataclass(frozen=True)
class AutoRound(Scheme):
    """See folder.scheme.Scheme. The candidates of a search are symmetric: they share a packing format."""

    name: str = "auto-round"
    candidates: tuple[str, ...] = ("int2-g64", "int3-g128", "int4-g128", "int4-g32", "int8-g128")
    presets: Mapping[str, str] = field(default_factory=lambda: PRESETS)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Earlier releases wrote "intel/auto-round"."""
        settings = config.get("quantization_config")
        return isinstance(settings, Mapping) and str(settings.get("quant_method")).endswith(self.name)

    def variant(self, decision: Decision) -> str:
        name = parse(decision.grid)
        return decision.grid if name is None else f"{decision.grid}:{ENDS[_packing(name)]}"

    def layout(self, name: str) -> ModuleLayout:
        grid, *flags = name.split(":")
        found: ModuleLayout | None
        if "awq" in flags:
            found = awq.layout(":".join([grid, *(flag for flag in flags if flag != "awq")]))
        else:
            found = gptq.layout(name)
        if found is None:
            raise UnsupportedError(f"AutoRound has no place for grid {grid!r}; it holds {HOLDS}")
        return found

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons = refuse_modules(modules, MULTIPLE)
        formats = sorted({_packing(name) for name in names_of(modules)})
        if len(formats) > 1:
            reasons.append(
                f"its grids need the packing formats {' and '.join(formats)}, an AutoRound folder has one: keep to "
                "symmetric grids, to 4 bits with -asym, or to other widths with -asym"
            )
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        names = names_of(modules)
        if not names:
            return {}
        base = Counter(names).most_common(1)[0][0]
        extra = {module.path: one for module in modules if (one := _exception(base, module))}
        return {
            "quantization_config": {
                "quant_method": "auto-round",
                "packing_format": _packing(base),
                "data_type": "int",
                **_described(base),
                "block_name_to_quantize": _blocks(modules),
                **({"extra_config": extra} if extra else {}),
            }
        }

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        return find_modules(stored)


def find_modules(stored: Checkpoint) -> Mapping[str, Found]:
    """Path of every quantized module to the name of its layout and its shape.

    Raises BadInputError where settings and tensors contradict each other, UnsupportedError for what is not read.
    """
    settings, where = settings_of(stored), stored.location
    stated = settings.get("packing_format") or GPTQ
    form = ALIASES.get(stated, stated) if isinstance(stated, str) else None
    if form is None or form not in ENDS:
        raise UnsupportedError(f"{where}: packing_format {stated!r} is not read; known: {', '.join(ENDS)}")
    kind, inputs = settings.get("data_type"), settings.get("act_bits")
    if kind not in (None, "int") or inputs not in (None, 16, 32):
        raise UnsupportedError(
            f"{where}: data_type {kind!r} with act_bits {inputs!r} is not read, only integer weights"
        )
    if settings.get("rotation_config"):
        raise UnsupportedError(f"{where}: weights under a rotation (rotation_config) are not read")
    extra = _extra(settings, where)
    widths = {bits for bits in _said(settings, extra, "bits", where) if bits < WHOLE}
    sizes = _said(settings, extra, "group_size", where)
    asymmetric = form == AWQ or not all(row.get("sym", True) for row in (settings, *extra.values()))
    found, names = {}, set(stored.names())
    for path in quantized_paths(stored):
        if (extra.get(path, {}).get("bits") or 0) >= WHOLE:
            raise BadInputError(f"{where}: extra_config leaves {path} in {WHOLE} bits, yet it has a qweight")
        reach, shape = measured(stored, path, widths, sizes, packed_outputs=form == AWQ)
        end = ENDS[form].replace("bare", "order") if path + G_IDX in names else ENDS[form]
        found[path] = (f"{named(stored, path, reach, asymmetric)}:{end}", shape)
    return found


def _packing(name: IntegerGridName) -> str:
    """The packing format that holds a grid and that most engines read."""
    if not name.asymmetric:
        return GPTQ
    return AWQ if name.bits == awq.BITS else PLAIN


def _described(name: IntegerGridName) -> dict[str, Any]:
    return {"bits": name.bits, "group_size": name.group_size, "sym": not name.asymmetric}


def _exception(base: IntegerGridName, module: Module) -> dict[str, Any] | None:
    """What extra_config says of a module; None where there is nothing to say."""
    if module.grid in FLOATS:
        return {"bits": WHOLE, "data_type": "float"} if module.linears[0].block is not None else None
    name = names_of([module])[0]
    return _described(name) if name != base or module.linears[0].block is None else None


def _blocks(modules: tuple[Module, ...]) -> str:
    """The path of the list of blocks: "model.layers"."""
    module = next(module for module in modules if module.linears[0].block is not None)
    return module.path.split(f".{module.linears[0].block}.")[0]


def _extra(settings: Mapping[str, Any], where: str) -> Mapping[str, Mapping[str, Any]]:
    extra = settings.get("extra_config") or {}
    if not isinstance(extra, Mapping) or not all(isinstance(row, Mapping) for row in extra.values()):
        raise BadInputError(f"{where}: quantization_config has an extra_config that is no object of objects")
    return extra


def _said(settings: Mapping[str, Any], extra: Mapping[str, Mapping[str, Any]], key: str, where: str) -> list[int]:
    """What is said of `key`, for all modules and for single ones."""
    said = [settings.get(key), *(row[key] for row in extra.values() if row.get(key) is not None)]
    for value in said:
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadInputError(f"{where}: quantization_config has {key} {value!r}, expected an int")
        if key == "bits" and value not in BITS and value < WHOLE:
            raise UnsupportedError(f"{where}: {value} bits are not read, only {BITS[0]} to {BITS[-1]}")
    return said


FORMAT = FolderFormat(AutoRound())
