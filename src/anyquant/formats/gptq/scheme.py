"""GPTQ: what config.json says. Symmetric grids are written in version 1 ("gptq"), which every engine reads and which
is exact for them; asymmetric ones in version 2, the only one with a place for a zero-point of 0.

Source: GPTQModel 7.6 (quantization/config.py, `dynamic`), transformers 5.17 (GPTQConfig), vLLM (auto_gptq.py).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Decision, Plan
from anyquant.formats.folder.format import FUSED, FolderFormat
from anyquant.formats.folder.integers import IntegerGridName, parse
from anyquant.formats.folder.modules import FLOATS
from anyquant.formats.folder.scheme import APART, FLOAT_PRESETS, Found, Module, Scheme
from anyquant.formats.gptq.layouts import PackedInputs, layout
from anyquant.formats.gptq.reading import BITS, find_modules
from anyquant.models.architecture import Architecture

HOLDS = f"{', '.join(FLOATS)}, int2, int3, int4 and int8 (-gN, -channel, each with -asym and -f16)"
MULTIPLE = 32  # GPTQModel packs whole words of 32 codes of any width, both ways
PRESETS = {
    "W2A16": "int2-g64",
    "W3A16": "int3-g128",
    "W4A16": "int4-g128",
    "W4A16_G32": "int4-g32",
    "W4A16_ASYM": "int4-g128-asym",
    "W8A16": "int8-g128",
    **FLOAT_PRESETS,
}
# an option of a decision whose rows come with reordered columns (QTensor.column_groups)
ORDERED = "act_order"
# what vLLM and SGLang call the matrices that they fuse, by which they look into `dynamic`
FUSED_NAMES = {"attn_qkv": "qkv_proj", "ffn_gate_up": "gate_up_proj"}


@dataclass(frozen=True)
class Gptq(Scheme):
    """See folder.scheme.Scheme. One grid for a search to choose: transformers does not read `dynamic`."""

    name: str = "gptq"
    candidates: tuple[str, ...] = ("int4-g128",)
    presets: Mapping[str, str] = field(default_factory=lambda: PRESETS)

    def variant(self, decision: Decision) -> str:
        """The grid, the version of its zero-points, and whether its columns may be reordered."""
        name = parse(decision.grid)
        if name is None:
            return decision.grid
        version = "2" if name.asymmetric else "1"
        return f"{decision.grid}:{version}" + (":order" if decision.options.get(ORDERED) else "")

    def layout(self, name: str) -> PackedInputs:
        found = layout(name)
        if found is None or found.name.bits not in BITS:
            raise UnsupportedError(f"GPTQ has no place for grid {name.split(':')[0]!r}; it holds {HOLDS}")
        return found

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons = refuse_modules(modules, MULTIPLE)
        kinds = {name.asymmetric for name in names_of(modules)}
        if len(kinds) > 1:
            reasons.append(
                "symmetric and asymmetric grids do not go into one GPTQ folder: it has one checkpoint_format, and they "
                "need version 1 and version 2"
            )
        for module in modules:
            if len(module.linears) > 1 and self._ordered(module):
                reasons.append(
                    f"{module.path}: a fused module has one order of its columns, its matrices have their own"
                )
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        names = names_of(modules)
        if not names:
            return {}
        base = Counter(names).most_common(1)[0][0]
        settings: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": base.bits,
            "group_size": base.group_size,
            "sym": not base.asymmetric,
            "desc_act": any(self._ordered(module) for module in modules),
            "checkpoint_format": "gptq_v2" if base.asymmetric else "gptq",
            "pack_dtype": "int32",
            "lm_head": any(module.role is Role.HEAD and module.grid not in FLOATS for module in modules),
        }
        blocks = [module for module in modules if module.linears[0].block is not None]
        listed = [module.path for module in blocks if module.grid not in FLOATS]
        if len(listed) < len(blocks):
            settings["modules_in_block_to_quantize"] = [listed]
        if dynamic := dict(_exceptions(base, modules)):
            settings["dynamic"] = dynamic
        return {"quantization_config": settings}

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        return find_modules(stored)

    def _ordered(self, module: Module) -> bool:
        return module.grid not in FLOATS and self.layout(module.variant).ordered


def refuse_modules(modules: Iterable[Module], multiple: int, *, across: int = 0) -> list[str]:
    """Reasons against quantized embeddings and routers, and against shapes: outputs at a multiple of `multiple`, inputs
    at one of `across` (0: the same)."""
    reasons = []
    for module in modules:
        if module.grid in FLOATS:
            continue
        name = module.linears[0].name
        if module.role in (Role.EMBEDDING, Role.ROUTER):
            reasons.append(f"{name} on {module.grid}: no engine loads a quantized {module.role.value} of this format")
        rows, columns = module.shape
        if rows % multiple or columns % (across or multiple):
            reasons.append(
                f"{name}: {rows} x {columns} is not a multiple of {multiple} x {across or multiple}, which are packed "
                "into whole words; leave it in float"
            )
    return reasons


def names_of(modules: Iterable[Module]) -> list[IntegerGridName]:
    """The grids of quantized modules, as far as settings tell them apart."""
    found = [parse(module.grid) for module in modules if module.grid not in FLOATS]
    # not by float16 scales, where others are bfloat16 values in float16
    return [replace(name, half=False) for name in found if name is not None]


def _exceptions(base: IntegerGridName, modules: Iterable[Module]) -> Iterable[tuple[str, dict[str, Any]]]:
    """`dynamic`: patterns of modules that are not as the settings say, "-:" for those in float."""
    for module in modules:
        if module.role in APART and module.grid in FLOATS:
            continue
        if module.grid in FLOATS:
            for pattern in _patterns(module):
                yield f"-:{pattern}", {}
        elif (name := names_of([module])[0]) != base:
            for pattern in _patterns(module):
                yield f"+:{pattern}", {"bits": name.bits, "group_size": name.group_size, "sym": not name.asymmetric}


def _patterns(module: Module) -> list[str]:
    """Its path, and that of the matrix into which vLLM and SGLang fuse it."""
    paths = [module.path]
    fused = FUSED_NAMES.get(FUSED.get(module.role, ""))
    if fused is not None and len(module.linears) == 1:
        paths.append(f"{module.path.rpartition('.')[0]}.{fused}")
    return [f"^{re.escape(path)}$" for path in paths]


FORMAT = FolderFormat(Gptq())
