"""torchao: what config.json and the metadata of the files say, and what is found in a folder. Nothing is unpickled.

Source: transformers 5.17 (quantizers/quantizer_torchao.py, integrations/torchao.py), torchao 0.18 (core/config.py,
prototype/safetensors), by which the tests read it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import DTYPES
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import Decision, Plan
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.integers import IntegerGridName
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import FLOAT_PRESETS, Found, Module, Scheme, float_modules, refuse_apart
from anyquant.formats.torchao.layouts import INTX, ROW, TORCH_NAMES, ByteLayout, layout
from anyquant.models.architecture import Architecture
from anyquant.store.strict_json import parse_json

METHOD = "torchao"
WEIGHT, CODES = ".weight", "._weight_qdata"
PRESETS = {
    "INT8": "int8-channel",
    "INT8_ASYM": "int8-g64-asym",
    "INT4": "int4-g64",
    "INT4_ASYM": "int4-g64-asym",
    **FLOAT_PRESETS,
}
GROUPS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Torchao(Scheme):
    """See folder.scheme.Scheme. One grid for a search to choose: the config has one."""

    name: str = METHOD
    candidates: tuple[str, ...] = ("int8-channel",)
    presets: Mapping[str, str] = field(default_factory=lambda: PRESETS)

    def variant_beside(self, decision: Decision, kept: str) -> str:
        """The grid and the type of the model."""
        return f"{decision.grid}:{kept if kept in FLOATS else 'f32'}"

    def layout(self, name: str) -> ModuleLayout:
        return layout(name)

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        reasons = refuse_apart("torchao", plan, modules)
        chosen = [module for module in modules if module.grid not in FLOATS]
        grids = sorted({module.grid for module in chosen})
        if len(grids) > 1:
            reasons.append(f"several grids ({', '.join(grids)}) in one torchao folder")
        for module in chosen[:1]:
            found = layout(module.variant)
            if module.grid.endswith("-f16") and found.scale == "BF16":
                reasons.append(f"{module.grid}: torchao stores scales in the model's type, bfloat16; leave out -f16")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        module = next((one for one in modules if one.grid not in FLOATS), None)
        if module is None:
            return {}
        return {
            "quantization_config": {
                "quant_method": METHOD,
                "quant_type": {"default": _quant_type(layout(module.variant))},
                "modules_to_not_convert": float_modules(architecture, modules),
                "include_input_output_embeddings": False,
                "untie_embedding_weights": False,
            }
        }

    def metadata(self, modules: tuple[Module, ...], tensors: Sequence[str]) -> Mapping[str, str]:
        """One entry per tensor of the model, by its name there."""
        chosen = {module.path: module for module in modules if module.grid not in FLOATS}
        if not chosen:
            return {}
        facts = {f"{path}{WEIGHT}": layout(one.variant).facts(one.shape[1]) for path, one in chosen.items()}
        parts = {f"{path}.{one.suffix}" for path in chosen for one in layout(chosen[path].variant).tensors(1, 256)}
        facts |= {name: {"_type": "Tensor"} for name in tensors if name not in parts}
        return {"tensor_names": json.dumps(list(facts)), **{name: json.dumps(one) for name, one in facts.items()}}

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        """The classes that hold integers in bytes. Raises UnsupportedError for the others."""
        symmetric = _is_symmetric(stored)
        found: dict[str, Found] = {}
        for name in stored.names():
            if name.endswith(CODES):
                path = name.removesuffix(CODES)
                found[path] = _module(stored, path, symmetric)
        for name, text in stored.metadata.items():
            known = name.removesuffix(WEIGHT) in found or "." not in name
            kind = (
                None if known else parse_json(str(text).encode(), f"{stored.location}: metadata of {name}").get("_type")
            )
            if kind not in (None, "Tensor"):
                raise UnsupportedError(f"{stored.location}: {name} is a {kind}; {ROW} and {INTX} are read")
        if not found and self.claims(stored.config):
            raise BadInputError(f"{stored.location}: its settings say torchao, but there is no tensor named *{CODES}")
        return found


def _quant_type(found: ByteLayout) -> dict[str, Any]:
    """As torchao.core.config.config_to_dict writes the configuration that such weights come from."""
    if found.kind == ROW:
        granularity = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
        data: dict[str, Any] = {"granularity": granularity, "group_size": None, "set_inductor_config": True}
        return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": data}
    reach: dict[str, Any] = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    if found.name.group:
        reach = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": found.name.group}}
    mapping = "ASYMMETRIC" if found.name.asymmetric else "SYMMETRIC"
    data = {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{found.name.bits}"},
        "granularity": reach,
        "mapping_type": {"_type": "MappingType", "_data": mapping},
        "scale_dtype": None,
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def _is_symmetric(stored: Checkpoint) -> bool:
    """Whether the settings say so; zero-points that contradict it are refused when they are read."""
    settings = stored.config.get("quantization_config")
    kind = settings.get("quant_type") if isinstance(settings, Mapping) else None
    usual = kind.get("default") if isinstance(kind, Mapping) else None
    data = usual.get("_data") if isinstance(usual, Mapping) else None
    mapping = data.get("mapping_type") if isinstance(data, Mapping) else None
    if mapping is None:
        return isinstance(usual, Mapping) and usual.get("_type") == "Int8WeightOnlyConfig"
    return isinstance(mapping, Mapping) and mapping.get("_data") == "SYMMETRIC"


def _module(stored: Checkpoint, path: str, symmetric: bool) -> Found:
    where = f"{stored.location}: metadata of {path}{WEIGHT}"
    text = stored.metadata.get(f"{path}{WEIGHT}")
    if text is None:
        raise BadInputError(f"{where} is missing, though there is {path}{CODES}")
    facts = parse_json(str(text).encode(), where)
    kind, data = facts.get("_type"), facts.get("_data")
    if kind not in (ROW, INTX):
        raise UnsupportedError(f"{where}: it is a {kind}; {ROW} and {INTX} are read")
    spec = stored.spec(f"{path}{CODES}")
    data = data if isinstance(data, dict) else {}
    size, dtype = data.get("block_size"), data.get("dtype")
    names = {name: key for key, name in TORCH_NAMES.items()}
    if not isinstance(dtype, dict) or dtype.get("_data") not in names:
        raise BadInputError(f"{where}: its dtype is {dtype!r}")
    if not isinstance(size, list) or len(size) != 2 or size[0] != 1 or type(size[1]) is not int:
        raise UnsupportedError(f"{where}: its block_size is {size!r}; blocks of one row are read")
    if len(spec.shape) != 2 or size[1] <= 0 or spec.shape[1] % size[1]:
        raise BadInputError(f"{where}: blocks of {size} do not divide a weight of shape {list(spec.shape)}")
    group = 0 if size[1] == spec.shape[1] else size[1]
    if group and group not in GROUPS:
        raise UnsupportedError(f"{where}: no grid has groups of {group}")
    target = "int8" if kind == ROW else str((data.get("target_dtype") or {}).get("_data"))
    if target not in {f"int{bits}" for bits in range(2, 9)}:
        raise UnsupportedError(f"{where}: its target_dtype is {target}; int2 to int8 are read")
    scale = f"{path}._weight_scale"
    if scale not in stored.names() or not DTYPES[stored.spec(scale).dtype].floating:
        raise BadInputError(f"{stored.location}: there are no {scale} of a float type")
    name = IntegerGridName(int(target[3:]), f"g{group}" if group else "channel", not symmetric)
    return ByteLayout(name, names[dtype["_data"]], kind, stored.spec(scale).dtype), (spec.shape[0], spec.shape[1])


FORMAT = FolderFormat(Torchao())
