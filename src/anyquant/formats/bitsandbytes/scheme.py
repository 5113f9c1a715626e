"""bitsandbytes: what config.json says, and what is found in a folder.

Source: transformers 5.17, utils/quantization_config.py (BitsAndBytesConfig), integrations/bitsandbytes.py and
quantizers/quantizers_utils.py (should_convert_module), by which the tests read it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import DTYPES
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Plan
from anyquant.formats.bitsandbytes.layouts import (
    BLOCKS,
    FOUR_BIT,
    STATE,
    IntegerLayout,
    Nested,
    TableLayout,
    layout,
    widest_group,
)
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import FLOAT_PRESETS, Found, Module, Scheme, float_modules
from anyquant.models.architecture import Architecture
from anyquant.store.strict_json import parse_json

METHOD = "bitsandbytes"
# as transformers' BitsAndBytesConfig calls them
PRESETS = {
    "NF4": "nf4-g64",
    "FP4": "fp4-g64",
    "INT8": "int8-channel",
    **FLOAT_PRESETS,
}
TORCH_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
STATE_NAME = re.compile(rf"(.+)\.weight\.{re.escape(STATE)}(nf4|fp4)")
MAXIMUM_STATE = 4096  # bytes
SCALES = ".SCB"


@dataclass(frozen=True)
class BitsAndBytes(Scheme):
    """See folder.scheme.Scheme."""

    name: str = METHOD
    candidates: tuple[str, ...] = ("nf4-g256", "nf4-g64", "nf4-g32")
    presets: Mapping[str, str] = field(default_factory=lambda: PRESETS)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Folders of the first versions do not name their method."""
        settings = config.get("quantization_config")
        if not isinstance(settings, Mapping) or "quant_method" in settings:
            return super().claims(config)
        return "load_in_4bit" in settings or "load_in_8bit" in settings

    def layout(self, grid: str) -> ModuleLayout:
        return layout(grid)

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons, four, eight = [], False, False
        for module in modules:
            first = module.linears[0].name
            if module.grid in FLOATS:
                continue
            found = FOUR_BIT.fullmatch(module.grid) is not None
            four, eight = four or found, eight or not found
            if module.role is Role.EMBEDDING:
                reasons.append(f"{first} on {module.grid}: transformers loads an embedding only in float")
            elif module.role is Role.ROUTER:
                reasons.append(f"{first} on {module.grid}: routers stay in float")
        if four and eight:
            reasons.append("bitsandbytes loads a folder in four bits or in eight, not in both; choose one kind of grid")
        skipped = float_modules(architecture, modules)
        for module in modules:
            if module.grid not in FLOATS and _is_skipped(module.path, skipped):
                reasons.append(f"{module.path}: transformers would keep it in float, as its name ends like a float one")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config. The type to compute in is the model's own.

        What stays in float is always listed, even when it is nothing: without a list it is the last module.
        """
        grids = [module.grid for module in modules if module.grid not in FLOATS]
        if not grids:
            return {}
        kept = next((module.grid for module in modules if module.role is Role.EMBEDDING), "f32")
        match = FOUR_BIT.fullmatch(grids[0])
        return {
            "quantization_config": {
                "quant_method": METHOD,
                "load_in_4bit": match is not None,
                "load_in_8bit": match is None,
                "bnb_4bit_quant_type": match[1] if match else "fp4",
                "bnb_4bit_use_double_quant": False,
                "bnb_4bit_compute_dtype": TORCH_TYPES.get(kept, "float32"),
                "bnb_4bit_quant_storage": "uint8",
                "llm_int8_threshold": 6.0,
                "llm_int8_skip_modules": float_modules(architecture, modules),
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
            }
        }

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        """Also of folders that transformers wrote: nested maxima, longer blocks, other storage types."""
        settings = _settings(stored)
        if settings is None:
            return {}
        names = set(stored.names())
        found: dict[str, Found] = {}
        for name in stored.names():
            match = STATE_NAME.fullmatch(name)
            if match is not None:
                found[match[1]] = _table_module(stored, match[1], name, names)
            elif name.endswith(SCALES):
                found[name.removesuffix(SCALES)] = _integer_module(stored, name.removesuffix(SCALES), names)
        _check_modules(stored, found, settings)
        return found


def _settings(stored: Checkpoint) -> Mapping[str, Any] | None:
    settings = stored.config.get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise BadInputError(f"{stored.location}: quantization_config is not an object")
    if settings.get("quant_method", METHOD) != METHOD:
        raise UnsupportedError(f"{stored.location}: its quantization method is {settings['quant_method']!r}")
    if bool(settings.get("load_in_4bit")) == bool(settings.get("load_in_8bit")):
        raise BadInputError(
            f"{stored.location}: quantization_config must say one of load_in_4bit and load_in_8bit for bitsandbytes"
        )
    return settings


def _check_modules(stored: Checkpoint, found: Mapping[str, Found], settings: Mapping[str, Any]) -> None:
    """Raise BadInputError where settings and tensors contradict each other."""
    four = bool(settings.get("load_in_4bit"))
    skipped = settings.get("llm_int8_skip_modules") or []
    if not isinstance(skipped, list) or not all(isinstance(one, str) for one in skipped):
        raise BadInputError(f"{stored.location}: llm_int8_skip_modules is not a list of names")
    if not found:
        raise BadInputError(
            f"{stored.location}: its settings say bitsandbytes, but no tensor is stored so; if its weights are float, "
            "remove quantization_config from config.json"
        )
    for path, (one, _) in found.items():
        if isinstance(one, TableLayout) != four:
            raise BadInputError(
                f"{stored.location}: {path} is not stored in {4 if four else 8} bits, as its settings say"
            )
        if _is_skipped(path, skipped):
            raise BadInputError(f"{stored.location}: {path} is quantized, but llm_int8_skip_modules names it")
    for name in stored.names():
        path, _, last = name.rpartition(".")
        if last == "weight" and path not in found and not DTYPES[stored.spec(name).dtype].floating:
            wanted = f"weight.{STATE}nf4 or fp4" if four else "SCB"
            raise BadInputError(
                f"{stored.location}: {name} is {stored.spec(name).dtype}, but there is no {path}.{wanted} beside it"
            )


def _table_module(stored: Checkpoint, path: str, name: str, names: set[str]) -> Found:
    """A four-bit module by its quant_state."""
    where = f"{stored.location}: {name}"
    spec, kind = stored.spec(name), name.rpartition("__")[2]
    if spec.dtype != "U8" or len(spec.shape) != 1 or spec.nbytes > MAXIMUM_STATE:
        raise BadInputError(f"{where} is {spec.dtype} {list(spec.shape)}, not JSON of at most {MAXIMUM_STATE} bytes")
    buffer = np.empty(spec.nbytes, dtype=np.uint8)
    stored.read_into(name, 0, 1, buffer)
    state = parse_json(buffer.tobytes(), where)
    shape, block = state.get("shape"), state.get("blocksize")
    if state.get("quant_type") != kind:
        raise BadInputError(f"{where}: its quant_type is {state.get('quant_type')!r}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(one) is int and one > 0 for one in shape):
        raise BadInputError(f"{where}: the shape {shape!r} is not that of a matrix")
    if block not in BLOCKS:
        raise BadInputError(f"{where}: the blocksize {block!r} is not one of {', '.join(map(str, BLOCKS))}")
    group = widest_group(shape[1], block)
    if not group:
        raise UnsupportedError(f"{where}: rows of {shape[1]} columns are not cut into blocks of {block} in whole 32s")
    weight = f"{path}.weight"
    if weight not in names:
        raise BadInputError(f"{stored.location}: there is no {weight} beside its quant_state")
    storage = stored.spec(weight).dtype
    if storage not in DTYPES:
        raise BadInputError(f"{stored.location}: {weight} is stored as {storage}")
    nested = _nested(state, where) if f"{weight}.nested_absmax" in names else None
    if nested is None and "nested_offset" in state:
        raise BadInputError(f"{stored.location}: there is no {weight}.nested_absmax, which its quant_state calls for")
    columns = int(shape[1])
    return TableLayout(kind, block, group, storage, buffer.tobytes(), nested, columns), (int(shape[0]), columns)


def _nested(state: Mapping[str, Any], where: str) -> Nested:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or not 0 < block <= max(BLOCKS):
        raise BadInputError(f"{where}: the nested_blocksize is {block!r}")
    if not isinstance(offset, int | float) or isinstance(offset, bool):
        raise BadInputError(f"{where}: the nested_offset is {offset!r}")
    if state.get("nested_dtype") != "float32":
        raise UnsupportedError(f"{where}: the nested_dtype is {state.get('nested_dtype')!r}; only float32 is read")
    return Nested(block, float(offset))


def _integer_module(stored: Checkpoint, path: str, names: set[str]) -> Found:
    """An eight-bit module by its SCB."""
    weight = f"{path}.weight"
    if weight not in names or len(stored.spec(weight).shape) != 2:
        raise BadInputError(f"{stored.location}: there is no matrix {weight} beside {path}{SCALES}")
    spec = stored.spec(weight)
    return IntegerLayout(marked=f"{path}.weight_format" in names), (spec.rows, spec.row_length)


def _is_skipped(path: str, names: list[str]) -> bool:
    """Whether transformers keeps a module in float for one of these names: a pattern for its beginning, or its end."""
    return any(path.endswith(name) or _begins(path, name) for name in names)


def _begins(path: str, pattern: str) -> bool:
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise BadInputError(f"llm_int8_skip_modules: {pattern!r} is not a pattern: {error}") from None


FORMAT = FolderFormat(BitsAndBytes())
