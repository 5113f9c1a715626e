"""The neutral quantized state: written entry by entry, read back, decoded, judged by running the decoded weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from os import SEEK_END
from pathlib import Path

import numpy as np

from anyquant.core.dtypes import Bytes, Float32, from_float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress
from anyquant.core.qtensor import QTensor
from anyquant.formats.state import CARRIED, carried_dtype
from anyquant.grids import grid as find_grid
from anyquant.pipeline.blocks import Block, blocks, read_block, read_carried
from anyquant.pipeline.executors.threads import run_all
from anyquant.pipeline.planner import Job
from anyquant.pipeline.rows import Importance, Rows
from anyquant.pipeline.run import Sink
from anyquant.pipeline.steps import steps_of
from anyquant.pipeline.verify import relative_errors
from anyquant.store.publish import Stage
from anyquant.store.state import EntryWriter, StateReader, StateWriter, entry_key

CODE_VERSION = "3"  # changes whenever the same input may give other codes


def source_hash(job: Job, linear: Linear, pieces: Sequence[Block]) -> str:
    """sha256 of a Linear's shape and float32 values; `pieces` are its row blocks, in order."""
    digest = sha256(repr(linear.shape).encode())
    for block in pieces:
        digest.update(read_block(job, block).data)
    return digest.hexdigest()


def _importance_hash(statistics: Importance, linear: Linear) -> str:
    """sha256 of the importance of a Linear's own inputs: equal weights with other inputs are rounded otherwise."""
    found = statistics.importance(linear)
    return "" if found is None else sha256(np.ascontiguousarray(found, dtype="<f4").data).hexdigest()


def write_state(
    job: Job, source: Rows, statistics: Importance, stage: Stage, threads: int, progress: Progress
) -> Mapping[str, str]:
    """Fill `stage` with the entries of the job, what is carried, and plan.json. Returns Linear name to key.

    `source` gives the quantized rows. One entry is open per Linear at work, written by blocks of rows.
    """
    keys = {}
    progress.start("quantize", job.weights, "w")
    with StateWriter(stage.folder) as state:
        by_linear: dict[str, list[Block]] = {}
        for block in blocks(job):
            by_linear.setdefault(block.linear.name, []).append(block)
        for name, pieces in by_linear.items():
            linear, decision = job.architecture.by_name[name], job.plan.decisions[name]
            steering = {"grid": decision.grid, "steps": [asdict(step) for step in steps_of(decision)]}
            importance = _importance_hash(statistics, linear)
            keys[name] = entry_key(source_hash(job, linear, pieces), steering, importance, CODE_VERSION)
            if not state.has(keys[name], find_grid):
                with state.begin(keys[name], find_grid(decision.grid), linear.shape) as entry:
                    _fill(entry, pieces, source, threads)
            progress.advance(linear.weights)
        _write_carried(job, stage)
        state.write_plan(_plain_plan(job, {}), keys)
    progress.finish()
    return keys


def copy_state(job: Job, folder: Path, keys: Mapping[str, str], maxima: Mapping[str, float], stage: Stage) -> None:
    """Fill `stage` with the entries `keys` (Linear name to key) of the state in `folder`, and the rest of the job.

    `maxima` are the largest magnitudes that enter Linears whose inputs are rounded with a static scale.
    """
    with StateWriter(stage.folder) as state:
        for key in keys.values():
            state.adopt(folder, key)
        _write_carried(job, stage)
        state.write_plan(_plain_plan(job, maxima), keys)


def _fill(entry: EntryWriter, pieces: list[Block], source: Rows, threads: int) -> None:
    def work(block: Block) -> None:
        entry.write(block.first, source.rows(block))

    run_all(work, pieces, threads, lambda block, nothing: None)


def _write_carried(job: Job, sink: Sink) -> None:
    for file in job.layout.files:
        if file.path == CARRIED:
            descriptor = sink.create_sized(file.path, file.nbytes)
            sink.write_at(descriptor, 0, file.prefix)
            for part in file.parts:
                sink.write_at(descriptor, part.offset, _carried_bytes(job, part.name))
            sink.finish(descriptor)
        elif not file.parts:
            descriptor = sink.create_sized(file.path, file.nbytes)
            sink.write_at(descriptor, 0, file.prefix)
            sink.finish(descriptor)


def _verify_carried(job: Job, folder: Path) -> None:
    """What is carried must be on disk as the source and the plan have it, and so must the small files."""
    for file in job.layout.files:
        if file.path != CARRIED and file.parts:
            continue
        with (folder / file.path).open("rb") as stream:
            same = stream.read(len(file.prefix)) == file.prefix
            for part in file.parts:
                stream.seek(part.offset)
                same = same and stream.read(part.nbytes) == _carried_bytes(job, part.name).tobytes()
            if not same or stream.seek(0, SEEK_END) != file.nbytes:
                raise AnyQuantError(f"verify: {file.path} is not what was planned")


def _carried_bytes(job: Job, name: str) -> Bytes:
    tensor = job.architecture.carried_by_name[name].tensor
    return from_float32(read_carried(job, name), carried_dtype(job.plan, job.checkpoint, name, tensor))


def _plain_plan(job: Job, maxima: Mapping[str, float]) -> dict[str, object]:
    """The plan as JSON: what a format needs to be written from the state, and the recipe it came from."""
    facts = {
        "family": job.plan.family,
        "decisions": {name: asdict(decision) for name, decision in job.plan.decisions.items()},
        "transforms": [asdict(step) for step in job.plan.transforms],
        "activation_maxima": dict(maxima),
        "recipe": job.recipe.as_dict(),
    }
    plain: dict[str, object] = json.loads(json.dumps(facts))
    return plain


def verify_state(
    job: Job, folder: Path, statistics: Importance, threads: int, progress: Progress
) -> Mapping[str, float]:
    """Read every entry back, check its hash, decode it and compare with the source: relative error by Linear.

    Raises AnyQuantError when an entry, or what is carried beside them, is not what the plan says.
    """
    reader = StateReader(folder, find_grid)
    if set(reader.names()) != set(job.plan.decisions):
        raise AnyQuantError(f"verify: {folder}: the state does not hold the planned Linears")
    entries = {name: reader.entry(name) for name in reader.names()}
    for name, entry in entries.items():
        entry.verify()
        if entry.grid.name != job.plan.decisions[name].grid or entry.shape != job.architecture.by_name[name].shape:
            raise AnyQuantError(f"verify: {name} is {entry.grid.name} {entry.shape}, not what was planned")
    _verify_carried(job, folder)

    def stored(block: Block) -> QTensor:
        return entries[block.linear.name].rows(block.first, block.first + block.rows)

    return relative_errors(job, stored, statistics, threads, progress)


def activation_maxima(folder: Path) -> Mapping[str, float]:
    """The largest magnitudes that enter Linears whose inputs are rounded with a static scale."""
    maxima: Mapping[str, float] = StateReader(folder, find_grid).plan["activation_maxima"]
    return maxima


def decoder(folder: Path) -> Callable[[str], Float32]:
    """A function from the name of a Linear to its decoded weights; the plan of the state is read once."""
    reader = StateReader(folder, find_grid)
    return lambda linear: reader.entry(linear).load().decode()
