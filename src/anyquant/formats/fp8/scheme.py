"""8-bit floats under `quant_method: fp8`: what config.json says, and what is found in a folder.

Sources: transformers 5.17, integrations/finegrained_fp8.py (FP8Linear, Fp8Dequantize) and FineGrainedFP8Config, through
which the tests read it; DeepSeek-V3's README_WEIGHTS.md. `weight_scale_inv` multiplies, whatever its name says.

Engines round the inputs of these modules to 8 bits as well, a scale per token and 128 columns; on a CPU, transformers
decodes the weights and rounds no input.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Activation, Plan
from anyquant.formats.folder.extra import found_extras
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.minifloat import SCALE_FLOATS, ScaledLayout
from anyquant.formats.folder.modules import FLOATS, ModuleLayout
from anyquant.formats.folder.scheme import (
    APART,
    FLOAT_PRESETS,
    Found,
    InputScale,
    Module,
    Scheme,
    float_modules,
    refuse_apart,
)
from anyquant.grids.fp8 import BLOCK
from anyquant.models.architecture import Architecture

BLOCKS, TENSOR = "fp8_e4m3-block", "fp8_e4m3-tensor"
WRITTEN = {
    BLOCKS: ScaledLayout(BLOCKS, "weight_scale_inv"),
    TENSOR: ScaledLayout(TENSOR, "weight_scale_inv", scale_shape=()),
}
# where other writers put the scales: DeepSeek-V4 "scale", AutoFP8 and FBGEMM "weight_scale"
SCALES = ("weight_scale_inv", "weight_scale", "scale")
BESIDE = ("activation_scale", "input_scale", "input_scale_ub")
METHODS = ("fp8", "fbgemm_fp8")


@dataclass(frozen=True)
class Fp8(Scheme):
    """See folder.scheme.Scheme."""

    name: str = "fp8"
    candidates: tuple[str, ...] = (BLOCKS,)
    apart: tuple[Role, ...] = APART
    presets: Mapping[str, str] = field(default_factory=lambda: {"FP8_BLOCK": BLOCKS, "FP8": TENSOR, **FLOAT_PRESETS})

    def layout(self, name: str) -> ModuleLayout:
        if name not in WRITTEN:
            raise UnsupportedError(
                f"fp8 has no place for grid {name!r}; it holds: {', '.join(FLOATS)}, {', '.join(WRITTEN)}"
            )
        return WRITTEN[name]

    def claims(self, config: Mapping[str, Any]) -> bool:
        settings = config.get("quantization_config")
        return isinstance(settings, Mapping) and settings.get("quant_method") in METHODS

    def inputs(self, activation: Activation) -> Sequence[InputScale]:
        raise UnsupportedError("engines round the inputs of fp8 folders as they see fit, a plan cannot tell them how")

    def refuses(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> list[str]:
        """Readers differ on blocks that are not whole: transformers on a CPU divides a matrix into equal parts."""
        reasons = refuse_apart(self.name, plan, modules)
        quantized = {module.grid for module in modules if module.grid not in FLOATS}
        for module in modules:
            if module.grid != BLOCKS:
                continue
            if any(side > BLOCK and side % BLOCK for side in module.shape):
                reasons.append(
                    f"{module.path}: {module.shape[0]} x {module.shape[1]} is not whole blocks of {BLOCK}, which "
                    "transformers reads wrongly on a CPU; keep it in float or use fp8_e4m3-tensor"
                )
            rows = 0
            for linear in module.linears:
                if rows % BLOCK:
                    reasons.append(f"{linear.name} begins inside a block of {module.path}, at row {rows}")
                rows += linear.view.rows
        if len(quantized) > 1:
            reasons.append(f"fp8 has one kind of scale for all modules, not {' and '.join(sorted(quantized))}")
        return reasons

    def config(self, architecture: Architecture, plan: Plan, modules: tuple[Module, ...]) -> Mapping[str, Any]:
        """Without a quantized module there is no quantization_config."""
        grid = next((module.grid for module in modules if module.grid not in FLOATS), None)
        if grid is None:
            return {}
        return {
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK] if grid == BLOCKS else None,
                "modules_to_not_convert": float_modules(architecture, modules),
            }
        }

    def find(self, stored: Checkpoint) -> Mapping[str, Found]:
        """Every weight that is an 8-bit float, by the shape of its scales; `activation_scheme` may be static."""
        settings = stored.config.get("quantization_config")
        if settings is None:
            return {}
        if not isinstance(settings, Mapping) or settings.get("quant_method") not in METHODS:
            raise UnsupportedError(f"{stored.location}: quantization_config is not one of {', '.join(METHODS)}")
        blocks = settings.get("weight_block_size")
        if blocks is not None and list(blocks) != [BLOCK, BLOCK]:
            raise UnsupportedError(f"{stored.location}: blocks of {blocks}; only {BLOCK} x {BLOCK} are read")
        names = frozenset(stored.names())
        found: dict[str, Found] = {}
        for name in stored.names():
            if not name.endswith(".weight") or not stored.spec(name).dtype.startswith("F8_"):
                continue
            path = name.removesuffix(".weight")
            scale = next((one for one in SCALES if f"{path}.{one}" in names), None)
            if scale is None:
                raise BadInputError(f"{stored.location}: {name} has no {SCALES[0]}; it cannot be decoded without")
            found[path] = _found(stored, path, scale, names)
        return found


def _found(stored: Checkpoint, path: str, scale: str, names: frozenset[str]) -> Found:
    """The layout and shape of one module. Raises BadInputError for scales that fit no grid."""
    weight, scales = stored.spec(f"{path}.weight"), stored.spec(f"{path}.{scale}")
    if len(weight.shape) != 2:
        raise UnsupportedError(f"{stored.location}: {path}.weight of {len(weight.shape)} axes is not read")
    rows, columns = weight.shape
    kind = "e5m2" if weight.dtype == "F8_E5M2" else "e4m3"
    reaches = {
        (-(-rows // BLOCK), -(-columns // BLOCK)): "block",
        (rows,): "channel",
        (rows, 1): "channel",
        (1,): "tensor",
        (): "tensor",
    }
    reach = reaches.get(scales.shape)
    if reach is None or scales.dtype not in (*SCALE_FLOATS, "F8_E8M0"):
        raise BadInputError(
            f"{stored.location}: {path}.{scale} is {scales.dtype} {list(scales.shape)}; for a weight of {rows} x "
            f"{columns} floats, one scale per matrix, row or block of {BLOCK} x {BLOCK}, are expected"
        )
    extras = found_extras(stored, path, BESIDE, names)
    found = ScaledLayout(f"fp8_{kind}-{reach}", scale, scales.dtype, scales.shape, extras)
    return found, (rows, columns)


FORMAT = FolderFormat(Fp8())
