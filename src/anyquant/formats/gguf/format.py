"""GGUF as a Format: one file, written straight from the source checkpoint, in llama.cpp's names and row orders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import Chunk, Layout, Part, Place, Plan, TargetFile, Unit
from anyquant.core.qtensor import QTensor
from anyquant.formats.certificate import BLANK, Certificate, stamp_gguf
from anyquant.formats.decoded import DecodedArtifact
from anyquant.formats.gguf.layouts import layout, layout_of_type
from anyquant.formats.gguf.metadata import CONSTANTS, add_certificate, add_metadata, constants, refuse_scaling
from anyquant.formats.gguf.names import PAIRED, Target, family_of, paired_rows, targets
from anyquant.formats.gguf.presets import beside, fallback, resolve, tables
from anyquant.formats.gguf.tokenizer import add_tokenizer, read_tokenizer
from anyquant.formats.gguf.writer import TensorInfo, header, new_writer, place
from anyquant.formats.masks import refuse_corrections, without_masks
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.runtimes.kv_cache import CacheTypes
from anyquant.store.gguf import GGUFFile
from anyquant.store.open import ARTIFACT

FLOAT_TYPE = "F32"  # of norms and biases: llama.cpp adds and multiplies them in float32 only


@dataclass(frozen=True)
class GGUFFormat:
    name: str = "gguf"
    default_carried: str = FLOAT_TYPE
    entry: str = ARTIFACT

    def part_names(self, architecture: Architecture) -> Mapping[str, str]:
        """Linear name to the name of the tensor that holds it."""
        return {linear.name: target.name for target in targets(architecture) for linear in target.linears}

    def preset(self, preset: str, architecture: Architecture, importance: bool) -> Mapping[str, tuple[str, str]]:
        """llama.cpp's named mixtures; see formats.base."""
        return resolve(preset, architecture, importance)

    def default_grid(self, linear: Linear, architecture: Architecture, grid: str, source: str) -> tuple[str, str]:
        """What llama.cpp's mixture on the same base grid gives it; as stored when there is no such mixture."""
        if linear.role is Role.ROUTER:
            return tables().router, "routers stay in float"
        for preset in tables().presets.values():
            if preset.grid == grid:
                return resolve(preset.name, architecture, False)[linear.name]
        return beside(grid, linear, architecture) or (source, f"no mixture is based on {grid}: kept as stored")

    def own_grid(self, grid: str) -> str:
        return grid

    def fallback(self, grid: str, linear: Linear) -> str | None:
        """The grid that llama.cpp takes for rows that are no multiple of the block."""
        return fallback(grid, linear.view.columns)

    def holds(self, grid: str) -> bool:
        """llama.cpp's own."""
        try:
            layout(grid)
        except UnsupportedError:
            return False
        return True

    def candidates(self, linear: Linear) -> tuple[str, ...]:
        """Those of presets.toml; routers stay in float."""
        return () if linear.role is Role.ROUTER else tables().candidates

    def ties(self, architecture: Architecture) -> Mapping[str, str]:
        """Linears of one fused tensor (Phi-3's qkv, and its gate and up)."""
        if architecture.dimensions.experts:
            return {}
        return {
            linear.name: target.name
            for target in targets(architecture)
            if len(target.linears) > 1
            for linear in target.linears
        }

    def refuses(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> list[str]:
        """See formats.base. Raises BadInputError when a small file beside the weights is damaged."""
        if architecture.dimensions.experts:
            return ["mixture-of-experts models are planned but not written to GGUF yet"]
        try:
            family_of(architecture)
            named = targets(architecture)
        except UnsupportedError as error:
            return [str(error)]
        reasons = [*_refuse_shape(architecture), *refuse_scaling(architecture), *_refuse_plan(plan, named)]
        if plan.kv_cache is not None:
            reasons += CacheTypes.parse(plan.kv_cache).refuses(architecture.dimensions.head_dim)
        try:
            read_tokenizer(checkpoint, architecture.dimensions.vocabulary)
        except UnsupportedError as error:
            reasons.append(str(error))
        return reasons

    def layout(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> Layout:
        """One file; its prefix is the header with the tokenizer and the tensors that follow from the config."""
        named = targets(architecture)
        units = tuple(_unit(target, architecture, _common_grid(target, plan)) for target in named)
        infos = [_info(target, unit) for target, unit in zip(named, units, strict=True)]
        writer = new_writer(family_of(architecture).arch)
        add_certificate(writer)
        add_metadata(writer, architecture, plan, checkpoint)
        add_tokenizer(writer, read_tokenizer(checkpoint, architecture.dimensions.vocabulary))
        prefix = stamp_gguf(header(writer, constants(architecture), infos), BLANK)
        offsets, size = place(len(prefix), infos)
        parts = tuple(
            Part(info.name, info.ggml_type, info.shape, offset, info.nbytes)
            for info, offset in zip(infos, offsets, strict=True)
        )
        return Layout((TargetFile(ARTIFACT, prefix, parts, size),), units)

    def activations(self, preset: str) -> str | None:
        """None: llama.cpp rounds them as its kernels do."""
        return None

    def inputs(self, unit: Unit, architecture: Architecture, plan: Plan, maxima: Mapping[str, float]) -> list[Chunk]:
        """None: see `activations`."""
        return []

    def stamp(self, file: TargetFile, certificate: Certificate) -> bytes | None:
        """See formats.base."""
        return stamp_gguf(file.prefix, certificate)

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        """See formats.base. Raises UnsupportedError for column groups, and corrections other than masks of zeros."""
        if rows.column_groups is not None:
            raise UnsupportedError(f"{linear}: GGUF cannot hold reordered columns")
        rows = without_masks(rows, linear)
        raw = layout(rows.grid.name).pack(rows.codes, rows.params)
        if unit.permutation == PAIRED:
            raw = raw[paired_rows(len(raw), architecture.dimensions.head_dim)]
        (place,) = self.slices(unit, architecture, linear, first_row, len(raw))
        return [Chunk(place, np.ascontiguousarray(raw))]

    def slices(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int) -> list[Place]:
        """One slice: rows of a Linear are neighbours in its tensor."""
        before = 0
        for name in unit.linears:
            if name == linear:
                break
            before += architecture.by_name[name].view.rows
        row_bytes = layout(unit.grid).row_bytes(architecture.by_name[linear].view.columns)
        return [Place(unit.parts[0], (before + first_row) * row_bytes, rows * row_bytes)]

    def unpack(
        self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int, parts: Mapping[str, Bytes]
    ) -> QTensor:
        """See formats.base."""
        raw = parts[unit.parts[0]].reshape(rows, -1)
        if unit.permutation == PAIRED:
            stored = raw
            raw = np.empty_like(stored)
            raw[paired_rows(rows, architecture.dimensions.head_dim)] = stored
        params, codes = layout(unit.grid).unpack(np.ascontiguousarray(raw))
        columns = architecture.by_name[linear].view.columns
        return QTensor(find_grid(unit.grid), (rows, columns), codes, params)

    def carry(self, unit: Unit, architecture: Architecture, values: Float32) -> list[Chunk]:
        """Float32, biases of permuted rows permuted alike."""
        if unit.permutation == PAIRED:
            values = values[paired_rows(len(values), architecture.dimensions.head_dim)]
        place = Place(unit.parts[0], 0, 4 * len(values))
        return [Chunk(place, np.ascontiguousarray(values, dtype="<f4").view(np.uint8))]

    def parts(self, folder: Path) -> Mapping[str, Part]:
        """Tensors of the file but those that follow from the config, which belong to the prefix."""
        file = GGUFFile(folder / ARTIFACT)
        return {
            tensor.name: Part(tensor.name, tensor.type, tensor.shape, tensor.offset, tensor.nbytes)
            for tensor in file.tensors.values()
            if tensor.name not in CONSTANTS
        }

    def open(self, artifact: Path, architecture: Architecture) -> Checkpoint:
        """See formats.base; `artifact` is the file or the folder that holds model.gguf."""
        file = GGUFFile(artifact / ARTIFACT if artifact.is_dir() else artifact)
        units = tuple(_found(target, architecture, file) for target in targets(architecture))

        def read(place: Place) -> Bytes:
            spec = file.spec(place.part)
            row_bytes = spec.nbytes // spec.rows
            buffer = np.empty(place.nbytes, dtype=np.uint8)
            file.read_into(place.part, place.offset // row_bytes, (place.offset + place.nbytes) // row_bytes, buffer)
            return buffer

        def carried(unit: Unit) -> Float32:
            stored = read(Place(unit.parts[0], 0, file.spec(unit.parts[0]).nbytes)).view("<f4")
            if unit.permutation != PAIRED:
                return stored
            values = np.empty_like(stored)
            values[paired_rows(len(stored), architecture.dimensions.head_dim)] = stored
            return values

        return DecodedArtifact(file.location, architecture, units, self, read, carried, metadata=file.metadata)


def _refuse_shape(architecture: Architecture) -> list[str]:
    family, sizes, reasons = family_of(architecture), architecture.dimensions, []
    if family.square and sizes.heads * sizes.head_dim != sizes.hidden:
        reasons.append(
            f"{sizes.heads} heads of {sizes.head_dim} do not make the hidden size {sizes.hidden}, which llama.cpp's "
            f"{architecture.family} needs"
        )
    if family.paired and (sizes.rope_dim != sizes.head_dim or sizes.head_dim % 2):
        reasons.append(f"a head of {sizes.head_dim} with {sizes.rope_dim} rotated dimensions cannot be reordered")
    biases = {item.role for item in architecture.carried if item.role.endswith("_bias")} - family.biases
    if biases:
        reasons.append(f"llama.cpp's {architecture.family} has no {', '.join(sorted(biases))}")
    return reasons


def _refuse_plan(plan: Plan, named: tuple[Target, ...]) -> list[str]:
    reasons = [
        f"{name} as {dtype}: GGUF norms and biases are {FLOAT_TYPE}"
        for name, dtype in plan.carried.items()
        if dtype != FLOAT_TYPE
    ]
    for target in named:
        for linear in target.linears:
            decision = plan.decisions[linear.name]
            try:
                layout(decision.grid)
            except UnsupportedError as error:
                reasons.append(f"{linear.name}: {error}")
            reasons += refuse_corrections(decision, "GGUF")
            if decision.input_activation:
                reasons.append(f"{linear.name}: GGUF does not describe quantized activations")
        if len({plan.decisions[linear.name].grid for linear in target.linears}) > 1:
            reasons.append(f"{target.name} is one tensor and cannot lie on several grids")
    return reasons


def _common_grid(target: Target, plan: Plan) -> str:
    return plan.decisions[target.linears[0].name].grid if target.linears else ""


def _unit(target: Target, architecture: Architecture, grid: str) -> Unit:
    return Unit(
        name=target.name,
        linears=tuple(linear.name for linear in target.linears),
        carried=(target.carried.name,) if target.carried is not None else (),
        grid=grid,
        parts=(target.name,),
        row_multiple=architecture.dimensions.head_dim if target.paired and target.linears else 1,
        permutation=PAIRED if target.paired else "",
    )


def _info(target: Target, unit: Unit) -> TensorInfo:
    if target.carried is not None:
        return TensorInfo(target.name, FLOAT_TYPE, target.shape, 4 * target.carried.length)
    rows, columns = target.shape
    kind = layout(unit.grid)
    return TensorInfo(target.name, kind.ggml_type, target.shape, rows * kind.row_bytes(columns))


def _found(target: Target, architecture: Architecture, file: GGUFFile) -> Unit:
    """The unit of a target as an existing file stores it."""
    spec = file.spec(target.name)
    if spec.shape != target.shape or (target.carried is not None and spec.dtype != FLOAT_TYPE):
        raise BadInputError(
            f"{file.location}: {target.name} is {spec.dtype} {list(spec.shape)}, the model has {list(target.shape)}; "
            "was it made from another model?"
        )
    grid = layout_of_type(spec.dtype).grid if target.linears else ""
    return _unit(target, architecture, grid)


FORMAT = GGUFFormat()
