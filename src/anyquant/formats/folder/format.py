"""A Format over any Scheme: config.json, safetensors in shards and the tokenizer's files in one folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import DTYPES, Bytes, Float32, from_float32
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError, UsageError
from anyquant.core.linear import Carried, Linear, Role
from anyquant.core.plan import EMPTY, Chunk, Decision, Layout, Part, Place, Plan, TargetFile, Unit
from anyquant.core.qtensor import QTensor
from anyquant.core.registry import suggest
from anyquant.formats.base import COMPANIONS
from anyquant.formats.certificate import Certificate
from anyquant.formats.folder.config import CONFIG, model_config, stamp_config
from anyquant.formats.folder.modules import (
    FLOAT_GRIDS,
    FLOATS,
    OWN,
    FloatLayout,
    ModuleLayout,
    Stored,
    narrowed,
    own_type,
    widened,
)
from anyquant.formats.folder.reader import QuantizedFolder
from anyquant.formats.folder.scheme import Module, Scheme
from anyquant.formats.masks import refuse_corrections, without_masks
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.runtimes.kv_cache import cannot_tell
from anyquant.store.files import SourceFile
from anyquant.store.safetensors import INDEX, SINGLE, SafetensorsCheckpoint, read_header
from anyquant.store.safetensors_layout import write_safetensors_header

SHARD_BYTES = 5_000_000_000  # as transformers divides a model
# what engines load as one matrix (vLLM: packed_modules_mapping), however it is stored
FUSED = {
    Role.ATTN_Q: "attn_qkv",
    Role.ATTN_K: "attn_qkv",
    Role.ATTN_V: "attn_qkv",
    Role.FFN_GATE: "ffn_gate_up",
    Role.FFN_UP: "ffn_gate_up",
}


@dataclass(frozen=True)
class FolderFormat:
    """A unit is one module: a fused module (Phi-3's qkv_proj) holds several Linears, in the order of its rows.

    The grid of a carried unit is the float grid of its source type. `entry` is "": a runtime opens the folder.
    `framework` is what the metadata of the safetensors files say. `fallbacks`: by grid, those to take in its place for
    a matrix that does not lie on it, the first that fits; "" is the type of the source. `fuses`: whether engines fuse
    modules when they load them.
    """

    scheme: Scheme
    shard_bytes: int = SHARD_BYTES
    default_carried: str = ""
    entry: str = ""
    framework: str = "pt"
    fallbacks: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: EMPTY)
    fuses: bool = True

    @property
    def name(self) -> str:
        return self.scheme.name

    def part_names(self, architecture: Architecture) -> Mapping[str, str]:
        """Linear name to the source tensor, whose name the module keeps."""
        return {linear.name: linear.view.tensor for linear in architecture.linears}

    def preset(self, preset: str, architecture: Architecture, importance: bool) -> Mapping[str, tuple[str, str]]:
        """The named schemes; the grid "" means as stored in the source."""
        known = self.scheme.presets
        name = next((one for one in known if one.upper() == preset.upper()), None)
        if name is None:
            raise UsageError(f"unknown preset {preset!r}; {suggest(preset.upper(), list(known))}")
        grid = known[name]
        kept = () if grid in FLOATS else self.scheme.apart
        return {
            linear.name: ("", f"{preset}: {linear.role.value} stays as stored")
            if linear.role in kept
            else (grid, f"{preset}: base grid")
            for linear in architecture.linears
        }

    def activations(self, preset: str) -> str | None:
        """See formats.base."""
        return {name.upper(): text for name, text in self.scheme.activations.items()}.get(preset.upper())

    def default_grid(self, linear: Linear, architecture: Architecture, grid: str, source: str) -> tuple[str, str]:
        """As stored, for the roles that the scheme sets apart: engines expect them in the model's own type."""
        if linear.role in self.scheme.apart:
            return source, f"{linear.role.value}: stays as stored"
        return grid, f"{linear.role.value}: as the blocks"

    def own_grid(self, grid: str) -> str:
        """The grid of the scheme's layout."""
        try:
            return self._layout(grid).grid
        except UnsupportedError:  # `refuses` says so for the Linear
            return grid

    def fallback(self, grid: str, linear: Linear) -> str | None:
        """The first of `fallbacks` that fits; None without any: a rule must say what to do."""
        for other in self.fallbacks.get(grid, ()):
            if not other or find_grid(other).refuses(linear.shape) is None:
                return other
        return None

    def holds(self, grid: str) -> bool:
        """Those of the scheme, and float types."""
        try:
            self._layout(grid)
        except UnsupportedError:
            return False
        return True

    def candidates(self, linear: Linear) -> tuple[str, ...]:
        """Those of the scheme, for what it quantizes."""
        return () if linear.role in self.scheme.apart else self.scheme.candidates

    def ties(self, architecture: Architecture) -> Mapping[str, str]:
        """Linears of one fused module, and those that engines fuse on loading: they refuse a half-quantized group."""
        if not self.fuses:
            modules = {path: linears for path, linears in _modules(architecture).items() if len(linears) > 1}
            return {linear.name: path for path, linears in modules.items() for linear in linears}
        return {
            linear.name: f"{linear.name.rpartition('.')[0]}.{FUSED[linear.role]}"
            for linear in architecture.linears
            if linear.role in FUSED
        }

    def refuses(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> list[str]:
        """See formats.base."""
        if architecture.dimensions.experts:
            return [f"mixture-of-experts models are planned but not written to {self.name} yet"]
        if any(linear.view.transposed or not linear.view.tensor.endswith(".weight") for linear in architecture.linears):
            return ["a matrix that is stored transposed or not as a module's weight is not written yet"]
        reasons = []
        for linear in architecture.linears:
            decision = plan.decisions[linear.name]
            try:
                self._layout(self._variant(decision))
                if decision.input_activation is not None:
                    self.scheme.inputs(decision.input_activation)
            except UnsupportedError as error:
                reasons.append(f"{linear.name}: {error}")
            reasons += refuse_corrections(decision, self.name)
        for path, linears in _modules(architecture).items():
            decisions = [plan.decisions[linear.name] for linear in linears]
            if len({decision.grid for decision in decisions}) > 1:
                reasons.append(f"{path} is one module and cannot lie on several grids")
            elif len({decision.input_activation for decision in decisions}) > 1:
                reasons.append(f"{path} is one module; its inputs are rounded or not")
            if reasons:
                continue
            shape = (sum(linear.view.rows for linear in linears), linears[0].view.columns)
            multiple = math.lcm(*(one.per for one in self._layout(self._variant(decisions[0])).tensors(*shape)))
            if any(linear.view.start % multiple for linear in linears):
                reasons.append(f"{path}: its matrices do not begin at multiples of {multiple} rows, which share words")
        for item in architecture.carried:
            dtype = checkpoint.spec(item.tensor).dtype
            if dtype not in FLOAT_GRIDS or plan.carried[item.name] not in ("", dtype):
                reasons.append(f"{item.name}: norms and biases stay in the type of the source, F32, F16 or BF16")
        if plan.kv_cache is not None:
            reasons.append(cannot_tell(plan.kv_cache))
        return reasons or self.scheme.refuses(architecture, plan, self._planned(architecture, plan))

    def layout(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> Layout:
        """Shards of tensors with the names of their modules, and small files that are prefixes without parts."""
        units: list[Unit] = []
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        modules = self._planned(architecture, plan)
        for module in modules:
            dtype = checkpoint.spec(module.linears[0].view.tensor).dtype
            floats = own_type(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype")), dtype)
            unit, stored = self._unit(module, floats)
            inputs = () if module.activation is None else self.scheme.inputs(module.activation)
            units.append(unit)
            tensors += [(name, one.dtype, one.shape) for name, one in zip(unit.parts, stored, strict=True)]
            tensors += [(name, "F32", one.shape) for name, one in zip(unit.inputs, inputs, strict=True)]
        for name, items in _carried(architecture).items():
            dtype = checkpoint.spec(name).dtype
            units += [Unit(item.name, (), (item.name,), FLOAT_GRIDS[dtype], (name,)) for item in items]
            tensors.append((name, dtype, (sum(item.length for item in items),)))
        facts = self.scheme.metadata(modules, [name for name, *_ in tensors])
        weights = _weight_files(tensors, self.shard_bytes, {"format": self.framework, **facts})
        settings = self.scheme.config(architecture, plan, modules)
        small = {CONFIG: model_config(checkpoint.config, plan.config_patch, settings)}
        small |= self.scheme.files(architecture, plan, modules)
        for name in COMPANIONS:
            data = checkpoint.text_file(name)
            if data is not None:
                small.setdefault(name, data)
        files = [TargetFile(name, data, (), len(data)) for name, data in small.items()]
        return Layout((*weights, *files), tuple(units))

    def stamp(self, file: TargetFile, certificate: Certificate) -> bytes | None:
        """See formats.base: config.json has it."""
        return stamp_config(file.prefix, certificate) if file.path == CONFIG else None

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        """See formats.base."""
        rows = without_masks(rows, linear)
        data = self._layout(unit.variant).pack(rows, self._shape(unit, architecture))
        data = [
            narrowed(raw, unit.floats, f"{linear}, {one.suffix}") if one.dtype == OWN else raw
            for raw, one in zip(data, self._tensors(unit, architecture), strict=True)
        ]
        places = self.slices(unit, architecture, linear, first_row, rows.shape[0])
        opens = first_row == 0 and linear == unit.linears[0]
        return [Chunk(place, raw) for place, raw in zip(places, data, strict=True) if opens or not place.shared]

    def slices(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int) -> list[Place]:
        """One place in each tensor of the module."""
        before = sum(architecture.by_name[name].view.rows for name in unit.linears[: unit.linears.index(linear)])
        stored = [one.typed(unit.floats) for one in self._tensors(unit, architecture)]
        return [one.place(part, before + first_row, rows) for one, part in zip(stored, unit.parts, strict=True)]

    def unpack(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int, parts: Mapping[str, Bytes]
    ) -> QTensor:
        """See formats.base."""
        raw = [
            widened(parts[part], unit.floats) if one.dtype == OWN else parts[part]
            for part, one in zip(unit.parts, self._tensors(unit, architecture), strict=True)
        ]
        return self._layout(unit.variant).unpack(raw, rows, self._shape(unit, architecture))

    def inputs(self, unit: Unit, architecture: Architecture, plan: Plan, maxima: Mapping[str, float]) -> list[Chunk]:
        """See formats.base. Linears of one tie group share what is static, as engines fuse them."""
        if not unit.inputs:
            return []
        decision = plan.decisions[unit.linears[0]]
        if decision.input_activation is None:
            raise AnyQuantError(f"{unit.name} has {unit.inputs[0]}, and nothing says that its input is rounded")
        tied = {other for name in unit.linears for other in plan.tied(name)}
        if missing := sorted(tied - maxima.keys()):
            raise AnyQuantError(f"{missing[0]}: no largest magnitude of its input is known; calibrate it")
        largest, found = max(maxima[name] for name in tied), []
        for part, one in zip(unit.inputs, self.scheme.inputs(decision.input_activation), strict=True):
            data = one.value(decision.input_activation, largest)
            found.append(Chunk(Place(part, 0, len(data), shared=True), data))
        return found

    def carry(self, unit: Unit, architecture: Architecture, values: Float32) -> list[Chunk]:
        """In the type of the source, which holds the values exactly."""
        dtype = FLOATS[unit.grid]
        item, size = architecture.carried_by_name[unit.carried[0]], DTYPES[dtype].size
        return [Chunk(Place(unit.parts[0], item.start * size, item.length * size), from_float32(values, dtype))]

    def parts(self, folder: Path) -> Mapping[str, Part]:
        """All tensors of all shards."""
        found: dict[str, Part] = {}
        for file in SafetensorsCheckpoint(folder).files:
            entries, _ = read_header(SourceFile.of(folder, file.name))
            found |= {one.name: Part(one.name, one.dtype, one.shape, one.offset, one.nbytes) for one in entries}
        return found

    def open(self, artifact: Path, architecture: Architecture) -> Checkpoint:
        """See formats.base; `artifact` is the folder."""
        found = self.read(SafetensorsCheckpoint(artifact))
        names = set(found.names())
        for path, linears in _modules(architecture).items():
            shape = (sum(linear.view.rows for linear in linears), linears[0].view.columns)
            name = f"{path}.weight"
            if name not in names or found.spec(name).shape != shape:
                raise BadInputError(
                    f"{found.location}: {name} of shape {list(shape)} is not there; was it made from another model?"
                )
        return found

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json says that a folder is of this format."""
        return self.scheme.claims(config)

    def read(self, stored: Checkpoint) -> QuantizedFolder:
        """A folder of this format as the model that it stands for."""
        return QuantizedFolder(stored, self.scheme)

    def _unit(self, module: Module, floats: str) -> tuple[Unit, Sequence[Stored]]:
        """The unit of a module, and its tensors with the types in which they are stored."""
        layout = self._layout(module.variant)
        stored = layout.tensors(*module.shape)
        inputs = () if module.activation is None else self.scheme.inputs(module.activation)
        unit = Unit(
            name=module.path,
            linears=tuple(linear.name for linear in module.linears),
            carried=(),
            grid=module.grid,
            parts=tuple(f"{module.path}.{one.suffix}" for one in stored),
            row_multiple=layout.row_multiple,
            variant=module.variant,
            inputs=tuple(f"{module.path}.{one.suffix}" for one in inputs),
            floats=floats if any(one.dtype == OWN for one in stored) else "",
        )
        return unit, [one.typed(floats) for one in stored]

    def _tensors(self, unit: Unit, architecture: Architecture) -> Sequence[Stored]:
        return self._layout(unit.variant).tensors(*self._shape(unit, architecture))

    def _shape(self, unit: Unit, architecture: Architecture) -> tuple[int, int]:
        linears = [architecture.by_name[name] for name in unit.linears]
        return sum(linear.view.rows for linear in linears), linears[0].view.columns

    def _layout(self, variant: str) -> ModuleLayout:
        return FloatLayout(FLOATS[variant]) if variant in FLOATS else self.scheme.layout(variant)

    def _variant(self, decision: Decision, kept: str = "") -> str:
        return decision.grid if decision.grid in FLOATS else self.scheme.variant_beside(decision, kept)

    def _planned(self, architecture: Architecture, plan: Plan) -> tuple[Module, ...]:
        """The modules of a plan, each as its first Linear is decided."""
        found = []
        embedding = next((one.name for one in architecture.linears if one.role is Role.EMBEDDING), None)
        kept = "" if embedding is None else plan.decisions[embedding].grid
        for path, linears in _modules(architecture).items():
            decision = plan.decisions[linears[0].name]
            shape = (sum(linear.view.rows for linear in linears), linears[0].view.columns)
            variant, activation = self._variant(decision, kept), decision.input_activation
            found.append(Module(path, tuple(linears), shape, decision.grid, variant, activation))
        return tuple(found)


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


def _weight_files(
    tensors: list[tuple[str, str, tuple[int, ...]]], most: int, facts: Mapping[str, str]
) -> list[TargetFile]:
    """One file, or shards of at most `most` bytes of tensors (a larger tensor has its own) with their index.

    Each has all of the `facts` in its metadata.
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor[2]) * DTYPES[tensor[1]].size
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        return [_weights_file(SINGLE, tensors, facts)]
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [_weights_file(name, shard, facts) for name, shard in zip(names, shards, strict=True)]
    total = sum(part.nbytes for file in files for part in file.parts)
    weight_map = {part.name: file.path for file in files for part in file.parts}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    return [*files, TargetFile(INDEX, index.encode() + b"\n", (), len(index.encode()) + 1)]


def _weights_file(name: str, tensors: list[tuple[str, str, tuple[int, ...]]], facts: Mapping[str, str]) -> TargetFile:
    prefix, offsets = write_safetensors_header(tensors, facts)
    parts = tuple(
        Part(tensor, dtype, shape, offset, math.prod(shape) * DTYPES[dtype].size)
        for (tensor, dtype, shape), offset in zip(tensors, offsets, strict=True)
    )
    return TargetFile(name, prefix, parts, len(prefix) + sum(part.nbytes for part in parts))
