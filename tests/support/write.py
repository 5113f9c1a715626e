"""The shortest way from a checkpoint to an artifact: what the pipeline does, without threads, stages and checks."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from anyquant.core.checkpoint import Checkpoint, read_tensor, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Params
from anyquant.core.linear import Carried, Linear
from anyquant.core.plan import EMPTY, Activation, Chunk, Decision, Layout, Plan, Unit
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS
from anyquant.formats.base import Format
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture

# changes the values of a tensor on their way: how the tests make wrong artifacts
Change = Callable[[Linear | Carried, Float32], Float32]


def make_plan(target: Format, architecture: Architecture, chosen: Mapping[str, str], label: str, carried: str) -> Plan:
    """A plan with the grid `chosen` for each Linear name."""
    ties = target.ties(architecture)
    return Plan(
        family=architecture.family,
        decisions={
            linear.name: Decision(
                linear.name, chosen[linear.name], chosen[linear.name], "test", tie_group=ties.get(linear.name)
            )
            for linear in architecture.linears
        },
        carried={item.name: carried for item in architecture.carried},
        label=label,
    )


def write(
    checkpoint: Checkpoint,
    architecture: Architecture,
    folder: Path,
    chosen: str | Mapping[str, str],
    target: str | Format = "gguf",
    change: Change | None = None,
    plan: Plan | None = None,
    maxima: Mapping[str, float] = EMPTY,
    inputs: Mapping[str, Activation | None] | None = None,
) -> Layout:
    """Write an artifact into `folder`, with one grid for every Linear or one for each, or a whole `plan`.

    Returns its layout. `maxima`: what enters Linears at most, where inputs have a static scale. `inputs` says
    by Linear how what enters it is rounded.
    """
    form = FORMATS.get(target) if isinstance(target, str) else target
    grids = {linear.name: chosen for linear in architecture.linears} if isinstance(chosen, str) else chosen
    label = chosen if isinstance(chosen, str) else "mixed"
    plan = plan or make_plan(form, architecture, grids, label, form.default_carried)
    if inputs is not None:
        decisions = {name: replace(one, input_activation=inputs.get(name)) for name, one in plan.decisions.items()}
        plan = replace(plan, decisions=decisions)
    reasons = form.refuses(architecture, plan, checkpoint)
    if reasons:
        raise ValueError("; ".join(reasons))
    layout = form.layout(architecture, plan, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    for file in layout.files:
        with (folder / file.path).open("wb") as stream:
            stream.write(file.prefix)
            stream.truncate(file.nbytes)
    inputs = [chunk for unit in layout.units for chunk in form.inputs(unit, architecture, plan, maxima)]
    for chunk in [*_chunks(form, layout, checkpoint, architecture, change), *inputs]:
        place, data = chunk.place, memoryview(chunk.data).cast("B")
        file, part = layout.locate()[place.part]
        with (folder / file.path).open("r+b") as stream:
            for run in range(place.runs):
                stream.seek(part.offset + place.offset + run * place.pitch)
                stream.write(data[run * place.nbytes : (run + 1) * place.nbytes])
    return layout


def _shared(unit: Unit, checkpoint: Checkpoint, architecture: Architecture) -> Params | None:
    """Tensor-wide parameters, one for all Linears of a unit."""
    grid = find_grid(unit.grid)
    if not grid.tensor_wide:
        return None
    views = [architecture.by_name[name].view for name in unit.linears]
    return grid.prepare(max(float(np.abs(read_view(checkpoint, view, 0, view.rows)).max()) for view in views))


def _chunks(
    form: Format, layout: Layout, checkpoint: Checkpoint, architecture: Architecture, change: Change | None
) -> list[Chunk]:
    chunks: list[Chunk] = []
    for unit in layout.units:
        for name in unit.carried:
            item = architecture.carried_by_name[name]
            values = read_tensor(checkpoint, item.tensor).reshape(-1)[item.start : item.start + item.length]
            chunks += form.carry(unit, architecture, change(item, values) if change else values)
        for name in unit.linears:
            linear = architecture.by_name[name]
            # two blocks, so that a wrong offset shows
            half = linear.view.rows // 2 // unit.row_multiple * unit.row_multiple
            for first, last in ((0, half), (half, linear.view.rows)):
                if first == last:
                    continue
                weights = read_view(checkpoint, linear.view, first, last)
                weights = change(linear, weights) if change else weights
                grid = find_grid(unit.grid)
                params, codes = grid.quantize(weights, None, _shared(unit, checkpoint, architecture))
                rows = QTensor(grid, (last - first, linear.view.columns), codes, params)
                chunks += form.pack(unit, architecture, name, first, rows)
    return chunks
