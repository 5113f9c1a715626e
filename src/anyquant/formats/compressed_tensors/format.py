"""compressed-tensors as a Format: config.json, model.safetensors and the tokenizer's files in one folder."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import DTYPES, Bytes, Float32, from_float32, to_float32
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.linear import Carried, Linear, Role
from anyquant.core.plan import Chunk, Layout, Part, Plan, TargetFile, Unit
from anyquant.core.qtensor import QTensor
from anyquant.core.registry import suggest
from anyquant.formats.base import COMPANIONS
from anyquant.formats.certificate import OBJECT, Certificate
from anyquant.formats.compressed_tensors.config import (
    model_config,
    read_integer_layout,
    refuse_grids,
    stamp_config,
)
from anyquant.formats.compressed_tensors.layouts import FLOATS, IntegerLayout, layout
from anyquant.formats.decoded import DecodedArtifact
from anyquant.formats.masks import without_masks
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.runtimes.kv_cache import cannot_tell
from anyquant.store.files import SourceFile
from anyquant.store.safetensors import SafetensorsCheckpoint, read_header
from anyquant.store.safetensors_layout import write_safetensors_header

FILE = "model.safetensors"
CONFIG = "config.json"
CANDIDATES = ("int4-g128",)
APART = (Role.EMBEDDING, Role.HEAD, Role.ROUTER)
# what vLLM loads as one matrix (packed_modules_mapping), however it is stored
FUSED = {
    Role.ATTN_Q: "attn_qkv",
    Role.ATTN_K: "attn_qkv",
    Role.ATTN_V: "attn_qkv",
    Role.FFN_GATE: "ffn_gate_up",
    Role.FFN_UP: "ffn_gate_up",
}
SHAPE_BYTES = 16
GRIDS = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """A unit is one module: a fused module (Phi-3's qkv_proj) holds several Linears, in the order of its rows.

    The grid of a carried unit is the float grid of its source type.
    """

    name: str = "compressed-tensors"
    default_carried: str = ""
    entry: str = ""

    def part_names(self, architecture: Architecture) -> Mapping[str, str]:
        """Linear name to the source tensor, whose name the module keeps."""
        return {linear.name: linear.view.tensor for linear in architecture.linears}

    def preset(self, preset: str, architecture: Architecture, importance: bool) -> Mapping[str, tuple[str, str]]:
        """The schemes of presets.toml; the grid "" means as stored in the source."""
        known = presets()
        if preset.upper() not in known:
            raise UsageError(f"unknown preset {preset!r}; {suggest(preset.upper(), list(known))}")
        grid = known[preset.upper()]
        kept = APART if layout(grid).quantized else ()
        return {
            linear.name: ("", f"{preset}: embedding, head and routers stay as stored")
            if linear.role in kept
            else (grid, f"{preset}: base grid")
            for linear in architecture.linears
        }

    def default_grid(self, linear: Linear, architecture: Architecture, grid: str, source: str) -> tuple[str, str]:
        """As stored: engines expect embedding, head and routers in the model's own type."""
        return source, f"{linear.role.value}: stays as stored"

    def fallback(self, grid: str, linear: Linear) -> str | None:
        """None: which float type a module could stay in is for a rule to say."""
        return None

    def candidates(self, linear: Linear) -> tuple[str, ...]:
        """One integer grid, as several are not written in one folder."""
        return () if linear.role in APART else CANDIDATES

    def ties(self, architecture: Architecture) -> Mapping[str, str]:
        """Linears of one fused module, and those that vLLM fuses on loading: it refuses a half-quantized group."""
        return {
            linear.name: f"{linear.name.rpartition('.')[0]}.{FUSED[linear.role]}"
            for linear in architecture.linears
            if linear.role in FUSED
        }

    def refuses(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> list[str]:
        """See formats.base."""
        if architecture.dimensions.experts:
            return ["mixture-of-experts models are planned but not written to compressed-tensors yet"]
        reasons = refuse_grids(architecture, plan)
        for module, linears in _modules(architecture).items():
            if len({plan.decisions[linear.name].grid for linear in linears}) > 1:
                reasons.append(f"{module} is one module and cannot lie on several grids")
        if any(linear.view.transposed or not linear.view.tensor.endswith(".weight") for linear in architecture.linears):
            reasons.append("a matrix that is stored transposed or not as a module's weight is not written yet")
        for item in architecture.carried:
            if checkpoint.spec(item.tensor).dtype not in GRIDS or plan.carried[item.name] not in (
                "",
                checkpoint.spec(item.tensor).dtype,
            ):
                reasons.append(f"{item.name}: norms and biases stay in the type of the source, F32, F16 or BF16")
        if plan.kv_cache is not None:
            reasons.append(cannot_tell(plan.kv_cache))
        return reasons

    def layout(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> Layout:
        """config.json and the copied files are prefixes without parts; tensors keep the names of their modules."""
        units: list[Unit] = []
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        for module, linears in _modules(architecture).items():
            grid = plan.decisions[linears[0].name].grid
            rows, columns = sum(linear.view.rows for linear in linears), linears[0].view.columns
            stored = [(f"{module}.{one.suffix}", one.dtype, one.shape) for one in layout(grid).tensors(rows, columns)]
            names = tuple(name for name, _, _ in stored)
            units.append(Unit(module, tuple(linear.name for linear in linears), (), grid, names))
            tensors += stored
        for name, items in _carried(architecture).items():
            dtype = checkpoint.spec(name).dtype
            units += [Unit(item.name, (), (item.name,), GRIDS[dtype], (name,)) for item in items]
            tensors.append((name, dtype, (sum(item.length for item in items),)))
        weights = _weights_file(tensors)
        small = [TargetFile(CONFIG, text := model_config(checkpoint.config, architecture, plan), (), len(text))]
        for name in COMPANIONS:
            data = checkpoint.text_file(name)
            if data is not None:
                small.append(TargetFile(name, data, (), len(data)))
        return Layout((weights, *small), tuple(units))

    def stamp(self, file: TargetFile, certificate: Certificate) -> bytes | None:
        """See formats.base: config.json has it."""
        return stamp_config(file.prefix, certificate) if file.path == CONFIG else None

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        """See formats.base. The shape tensor of a module goes with its first row."""
        if rows.column_groups is not None:
            raise UnsupportedError(f"{linear}: reordered columns are not written yet")
        rows = without_masks(rows, linear)
        data = layout(unit.grid).pack(rows.codes, rows.params)
        places = self.slices(unit, architecture, linear, first_row, rows.shape[0])
        if len(places) > len(data):
            total = sum(architecture.by_name[name].view.rows for name in unit.linears)
            data = [*data, np.array([total, rows.shape[1]], dtype="<i8").view(np.uint8)]
        return [Chunk(part, offset, raw) for (part, offset, _), raw in zip(places, data, strict=True)]

    def slices(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int
    ) -> list[tuple[str, int, int]]:
        """One for each tensor that has rows; with the first row of a quantized module, also its shape."""
        before = 0
        for name in unit.linears[: unit.linears.index(linear)]:
            before += architecture.by_name[name].view.rows
        first = before + first_row
        sizes = layout(unit.grid).row_bytes(architecture.by_name[linear].view.columns)
        places = [(part, first * size, rows * size) for part, size in zip(unit.parts, sizes, strict=False)]
        if first == 0 and len(unit.parts) > len(sizes):
            places.append((unit.parts[-1], 0, SHAPE_BYTES))
        return places

    def unpack(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int, parts: Mapping[str, Bytes]
    ) -> QTensor:
        """See formats.base."""
        columns = architecture.by_name[linear].view.columns
        kind = layout(unit.grid)
        raw = [parts[part].reshape(rows, -1) for part in unit.parts[: len(kind.row_bytes(columns))]]
        params, codes = kind.unpack(raw)
        return QTensor(find_grid(unit.grid), (rows, columns), codes, params)

    def carry(self, unit: Unit, architecture: Architecture, values: Float32) -> list[Chunk]:
        """In the type of the source, which holds the values exactly."""
        dtype = FLOATS[unit.grid]
        item = architecture.carried_by_name[unit.carried[0]]
        return [Chunk(unit.parts[0], item.start * DTYPES[dtype].size, from_float32(values, dtype))]

    def parts(self, folder: Path) -> Mapping[str, Part]:
        """All tensors of model.safetensors."""
        entries, _ = read_header(SourceFile.of(folder, FILE))
        return {one.name: Part(one.name, one.dtype, one.shape, one.offset, one.nbytes) for one in entries}

    def open(self, artifact: Path, architecture: Architecture) -> Checkpoint:
        """See formats.base; `artifact` is the folder. Its config is the source's, without what we put there."""
        stored = SafetensorsCheckpoint(artifact)
        integer = read_integer_layout(stored.config, stored.location)
        names = set(stored.names())
        units = [_found(module, linears, integer, stored, names) for module, linears in _modules(architecture).items()]
        for name, items in _carried(architecture).items():
            units += [Unit(item.name, (), (item.name,), GRIDS[stored.spec(name).dtype], (name,)) for item in items]

        def read(part: str, offset: int, nbytes: int) -> Bytes:
            spec = stored.spec(part)
            row_bytes = spec.nbytes // max(spec.rows, 1)
            buffer = np.empty(nbytes, dtype=np.uint8)
            stored.read_into(part, offset // row_bytes, (offset + nbytes) // row_bytes, buffer)
            return buffer

        def carried(unit: Unit) -> Float32:
            item = architecture.carried_by_name[unit.carried[0]]
            whole = to_float32(read(unit.parts[0], 0, stored.spec(unit.parts[0]).nbytes), FLOATS[unit.grid])
            return whole[item.start : item.start + item.length]

        config = {key: value for key, value in stored.config.items() if key not in ("quantization_config", OBJECT)}
        return DecodedArtifact(stored.location, architecture, tuple(units), self, read, carried, config)


@cache
def presets() -> dict[str, str]:
    """Scheme to the grid of the block Linears, from presets.toml."""
    text = (files("anyquant.formats.compressed_tensors") / "presets.toml").read_text(encoding="utf-8")
    return {name: row["grid"] for name, row in tomllib.loads(text)["preset"].items()}


def _modules(architecture: Architecture) -> dict[str, list[Linear]]:
    """Module (the source tensor without ".weight") to its Linears in the order of their rows."""
    found: dict[str, list[Linear]] = {}
    for linear in architecture.linears:
        found.setdefault(linear.view.tensor.removesuffix(".weight"), []).append(linear)
    return {module: sorted(linears, key=lambda linear: linear.view.start) for module, linears in found.items()}


def _carried(architecture: Architecture) -> dict[str, list[Carried]]:
    """Source tensor to the carried pieces of it."""
    found: dict[str, list[Carried]] = {}
    for item in architecture.carried:
        found.setdefault(item.tensor, []).append(item)
    return found


def _weights_file(tensors: list[tuple[str, str, tuple[int, ...]]]) -> TargetFile:
    prefix, offsets = write_safetensors_header(tensors, {"format": "pt"})
    parts = tuple(
        Part(name, dtype, shape, offset, math.prod(shape) * DTYPES[dtype].size)
        for (name, dtype, shape), offset in zip(tensors, offsets, strict=True)
    )
    return TargetFile(FILE, prefix, parts, len(prefix) + sum(part.nbytes for part in parts))


def _found(
    module: str, linears: list[Linear], integer: IntegerLayout | None, stored: Checkpoint, names: set[str]
) -> Unit:
    """The unit of a module as an existing folder stores it."""
    if f"{module}.weight" in names:
        grid = GRIDS.get(stored.spec(f"{module}.weight").dtype, "")
    else:
        grid = integer.grid if integer is not None else ""
    if not grid:
        raise BadInputError(f"{stored.location}: {module} has no weight that can be read back")
    rows, columns = sum(linear.view.rows for linear in linears), linears[0].view.columns
    tensors = layout(grid).tensors(rows, columns)
    for one in tensors:
        spec = stored.spec(f"{module}.{one.suffix}")
        if (spec.dtype, spec.shape) != (one.dtype, one.shape):
            raise BadInputError(
                f"{stored.location}: {spec.name} is {spec.dtype} {list(spec.shape)}, the model calls for {one.dtype} "
                f"{list(one.shape)}; was it made from another model?"
            )
    names_of = tuple(f"{module}.{one.suffix}" for one in tensors)
    return Unit(module, tuple(linear.name for linear in linears), (), grid, names_of)


FORMAT = CompressedTensorsFormat()
