"""AWQ: what config.json says. `zero_point` is true, also for symmetric grids: their zero-points of 8 are stored, and
engines that are told of none want another kernel. So a folder may hold both, in groups of one size.

Source: transformers 5.17 (AwqConfig, integrations/awq.py), vLLM (auto_awq.py), AutoAWQ 0.2 (models/_config.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Plan
from anyquant.formats.awq.layouts import BITS, EACH, PackedOutputs, layout
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.modules import FLOATS
from anyquant.formats.folder.scheme import FLOAT_PRESETS, HEAD_MODULE, Found, Module, Scheme, float_modules
from anyquant.formats.gptq.reading import measured, named, quantized_paths, settings_of
from anyquant.formats.gptq.scheme import refuse_modules
from anyquant.models.architecture import Architecture

PRESETS = {
    "W4A16_ASYM": "int4-g128-asym",
    "W4A16_ASYM_G64": "int4-g64-asym",
    "W4A16": "int4-g128",
    **FLOAT_PRESETS,
}
HOLDS = f"{', '.join(FLOATS)}, int4-gN and int4-channel (each with -asym and -f16)"


@dataclass(frozen=True)
class Awq(Scheme):
    """See folder.scheme.Scheme."""

    name: str = "awq"
    candidates: tuple[str, ...] = ("int4-g128-asym",)
    presets: Mapping[str, str] = field(default_factory=lambda: PRESETS)

    def layout(self, name: str) -> PackedOutputs:
        found = layout(name)
        if found is None:
            raise UnsupportedError(f"AWQ has no place for grid {name!r}; it holds {HOLDS}")
        return found

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons = refuse_modules(modules, EACH, across=1)
        if len(sizes := self._sizes(modules)) > 1:
            reasons.append(f"groups of {' and '.join(map(str, sorted(sizes)))} in one folder: AWQ states one size")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        sizes = self._sizes(modules)
        if not sizes:
            return {}
        return {
            "quantization_config": {
                "quant_method": "awq",
                "version": "gemm",
                "bits": BITS,
                "group_size": sizes.pop(),
                "zero_point": True,
                "lm_head": any(module.role is Role.HEAD and module.grid not in FLOATS for module in modules),
                "modules_to_not_convert": float_modules(architecture, modules),
            }
        }

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        return find_modules(stored)

    def _sizes(self, modules: tuple[Module, ...]) -> set[int]:
        return {self.layout(module.variant).name.group_size for module in modules if module.grid not in FLOATS}


def find_modules(stored: Checkpoint) -> Mapping[str, Found]:
    """Path of every quantized module to the name of its layout and its shape.

    All are read as asymmetric: zero-points are stored whatever `zero_point` says. Raises BadInputError where settings
    and tensors contradict each other, UnsupportedError for what is not read.
    """
    settings, where = settings_of(stored), stored.location
    bits = _number(settings, ("bits", "w_bit"), where)
    size = _number(settings, ("group_size", "q_group_size"), where)
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if bits != BITS or version != "gemm":
        raise UnsupportedError(f"{where}: AWQ of {bits} bits, version {version!r}, is not read, only 4 bits, 'gemm'")
    found = {}
    for path in quantized_paths(stored):
        found[path] = described(stored, path, [size])
    _check_excluded(settings.get("modules_to_not_convert") or [], list(found), stored)
    return found


def described(stored: Checkpoint, path: str, sizes: list[int]) -> tuple[str, tuple[int, int]]:
    """The name of a module's layout and its shape, as find has them."""
    reach, shape = measured(stored, path, {BITS}, sizes, packed_outputs=True)
    return named(stored, path, reach, asymmetric=True), shape


def _number(settings: Mapping[str, Any], keys: tuple[str, str], where: str) -> int:
    value = next((settings[key] for key in keys if key in settings), None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInputError(f"{where}: quantization_config has {keys[0]} {value!r}, expected an int")
    return value


def _check_excluded(excluded: Any, paths: list[str], stored: Checkpoint) -> None:
    """Raise BadInputError where a quantized module is excluded, or a name is no part of any tensor's.

    A name excludes what it is a part of; patterns, which some tools write, are left to them.
    """
    where = f"{stored.location}: modules_to_not_convert"
    if not isinstance(excluded, list) or not all(isinstance(one, str) for one in excluded):
        raise BadInputError(f"{where} is not a list of names")
    for one in excluded:
        if re.search(r"[*+?|\\^$\[({]", one):
            continue
        if hit := next((path for path in paths if f".{one}." in f".{path}."), None):
            raise BadInputError(f"{where} names {one!r}, yet {hit} is quantized")
        if one != HEAD_MODULE and not any(one in name for name in stored.names()):
            raise BadInputError(f"{where} names {one!r}, which is not there")


FORMAT = FolderFormat(Awq())
