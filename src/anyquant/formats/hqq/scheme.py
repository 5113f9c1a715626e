"""HQQ: what config.json says, and what is found in a folder. Nothing of a folder is run here: the package itself calls
`eval` on names of types that it finds in the tensors.

Source: hqq 0.2.8 (core/quantize.py), transformers 4.57 and 5.17 (HqqConfig).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.dtypes import DTYPES
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import Plan
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.modules import FLOATS, Along, ModuleLayout, Stored
from anyquant.formats.folder.scheme import FLOAT_PRESETS, Found, Module, Scheme, float_modules, refuse_apart
from anyquant.formats.hqq.layouts import OF_BITS, GroupLayout, layout
from anyquant.models.architecture import Architecture

METHOD = "hqq"
CODES = ".W_q"
PRESETS = {
    "INT8": "int8-g64-asym",
    "INT4": "int4-g64-asym",
    "INT3": "int3-g64-asym",
    "INT2": "int2-g32-asym",
    **FLOAT_PRESETS,
}
FACTS = (
    *("nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "compute_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)
GROUPS = (16, 32, 64, 128, 256)  # of the integer grids


@dataclass(frozen=True)
class Hqq(Scheme):
    """See folder.scheme.Scheme. One grid for a search to choose: the config has one."""

    name: str = METHOD
    candidates: tuple[str, ...] = ("int4-g64-asym",)
    presets: Mapping[str, str] = field(default_factory=lambda: PRESETS)

    def layout(self, name: str) -> ModuleLayout:
        return layout(name)

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons = refuse_apart("HQQ", plan, modules)
        chosen = [module for module in modules if module.grid not in FLOATS]
        if len({module.grid for module in chosen}) > 1:
            reasons.append(f"several grids ({', '.join(sorted({module.grid for module in chosen}))}) in one HQQ folder")
        for module in chosen:
            kind = layout(module.grid)
            groups = module.shape[0] * module.shape[1] // (kind.group or module.shape[1])
            if groups % kind.packing.parts and not kind.packing.padded:
                reasons.append(f"{module.path}: {groups} groups are not a multiple of {kind.packing.parts}")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        module = next((one for one in modules if one.grid not in FLOATS), None)
        if module is None:
            return {}
        kind = layout(module.grid)
        weights = {
            "nbits": kind.bits,
            "channel_wise": True,
            "group_size": kind.group or None,
            "optimize": False,
            "round_zero": True,
            "axis": 1,
            "view_as_float": False,
        }
        return {
            "quantization_config": {
                "quant_method": METHOD,
                "quant_config": {
                    "weight_quant_params": weights,
                    "scale_quant_params": None,
                    "zero_quant_params": None,
                    "offload_meta": False,
                },
                "skip_modules": float_modules(architecture, modules),
            }
        }

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        """Also of folders that transformers 4 saved: zero-points of any value, other types, other views."""
        names = frozenset(stored.names())
        found: dict[str, Found] = {
            name.removesuffix(CODES): _module(stored, name.removesuffix(CODES), names)
            for name in stored.names()
            if name.endswith(CODES)
        }
        if not found and self.claims(stored.config):
            raise BadInputError(f"{stored.location}: its settings say hqq, but there is no tensor that ends in {CODES}")
        return found


def _module(stored: Checkpoint, path: str, names: frozenset[str]) -> Found:
    where = f"{stored.location}: {path}"
    for wanted in ("nbits", "group_size", "shape", "axis", "packing", "scale", "zero"):
        if f"{path}.{wanted}" not in names:
            raise BadInputError(f"{where} has no {wanted}, or it is quantized itself or kept apart, which is not read")
    bits, group, axis = (_number(stored, f"{path}.{name}") for name in ("nbits", "group_size", "axis"))
    shape = _values(stored, f"{path}.shape")
    if axis != 1:
        raise UnsupportedError(f"{where}: its groups run down the columns (axis {axis}); only axis 1 is read")
    if bits not in OF_BITS or bytes(_values(stored, f"{path}.packing")).decode("latin-1") != OF_BITS[bits]:
        raise UnsupportedError(f"{where}: {bits} bits, packed in another way than {OF_BITS.get(bits, 'any known')}")
    if len(shape) != 2 or min(shape) <= 0 or group <= 0 or shape[1] % group:
        raise BadInputError(f"{where}: groups of {group} do not divide the rows of a matrix of shape {list(shape)}")
    rows, columns = int(shape[0]), int(shape[1])
    scale, zero, storage = (stored.spec(f"{path}.{name}").dtype for name in ("scale", "zero", "W_q"))
    if scale != zero or not DTYPES[scale].floating:
        raise UnsupportedError(f"{where}: scale is {scale} and zero {zero}; they are read in one float type")
    grid = f"hqq{bits}-g{group}"
    if not _flag(stored, path, "optimize", names) and _flag(stored, path, "round_zero", names):
        grid = _whole(stored, path, bits, group, columns) or grid
    facts = tuple(
        Stored(name, stored.spec(f"{path}.{name}").dtype, stored.spec(f"{path}.{name}").shape, Along.ONCE)
        for name in FACTS
        if f"{path}.{name}" in names
    )
    return GroupLayout(grid, bits, group, scale, storage, facts), (rows, columns)


def _whole(stored: Checkpoint, path: str, bits: int, group: int, columns: int) -> str | None:
    """The integer grid of a module whose zero-points are all levels; None if there is none."""
    reach = f"g{group}" if group in GROUPS else "channel" if group == columns else None
    zero = read_tensor(stored, f"{path}.zero")
    if bits < 2 or reach is None or not np.array_equal(zero, np.clip(np.rint(zero), 0, (1 << bits) - 1)):
        return None
    return f"int{bits}-{reach}" if (zero == 1 << (bits - 1)).all() else f"int{bits}-{reach}-asym"


def _flag(stored: Checkpoint, path: str, name: str, names: frozenset[str]) -> bool:
    return f"{path}.{name}" in names and bool(_number(stored, f"{path}.{name}"))


def _number(stored: Checkpoint, name: str) -> int:
    values = _values(stored, name)
    if len(values) != 1:
        raise BadInputError(f"{stored.location}: {name} is not one number")
    return values[0]


def _values(stored: Checkpoint, name: str) -> list[int]:
    """The values of a small tensor of integers."""
    spec = stored.spec(name)
    if spec.dtype not in ("U8", "I32", "I64") or spec.nbytes > 64:
        raise BadInputError(f"{stored.location}: {name} is {spec.dtype} {list(spec.shape)}, not a few integers")
    buffer = np.empty(spec.nbytes, dtype=np.uint8)
    stored.read_into(name, 0, spec.rows, buffer)
    return [int(value) for value in buffer.view(DTYPES[spec.dtype].numpy)]


FORMAT = FolderFormat(Hqq())
