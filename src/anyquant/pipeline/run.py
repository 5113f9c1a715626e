"""Execute a plan: take a quantized row block, pack it, write it to its place. Nothing is kept."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.grid import Grid
from anyquant.core.plan import EMPTY, Chunk, Layout, Place, Unit
from anyquant.core.progress import Progress
from anyquant.core.qtensor import QTensor
from anyquant.pipeline.blocks import Block, blocks, read_carried
from anyquant.pipeline.executors.threads import run_all
from anyquant.pipeline.planner import Job, writable
from anyquant.pipeline.rows import Rows


class Sink(Protocol):
    """Where files of a layout are written: a `store.publish.Stage`."""

    def create_sized(self, relative: str, nbytes: int) -> int: ...

    def write_at(self, descriptor: int, offset: int, data: Any) -> None: ...

    def finish(self, descriptor: int) -> None: ...


@dataclass(frozen=True)
class Written:
    """What `verify` compares with, as sha256: packed bytes by place, codes and parameters by block."""

    digests: Mapping[Place, bytes]
    contents: Mapping[tuple[str, int], bytes]


def content_digest(rows: QTensor) -> bytes:
    """sha256 over codes and parameters: what packing must not change."""
    digest = hashlib.sha256(np.ascontiguousarray(rows.codes).data)
    for parameter in rows.grid.parameters:
        digest.update(np.ascontiguousarray(rows.params[parameter.name]).data)
    return digest.digest()


def squared_error(weights: Float32, decoded: Float32, grid: Grid, importance: Float32 | None) -> tuple[float, float]:
    """(sum w (x - q)^2, sum w x^2) with the grid's own weighting; rows are summed in float64."""
    steer = grid.weighting(weights, importance)

    def energy(values: Float32) -> float:
        steered = values * steer if any(steer.strides) else values  # one weight for all is 1
        return float(np.vecdot(steered, values).sum(dtype=np.float64))

    return energy(weights - decoded), energy(weights)


class _Files:
    """The open files of a layout; chunks go to their place from any thread."""

    def __init__(self, layout: Layout, sink: Sink) -> None:
        self._sink = sink
        self._start = {part.name: (file.path, part.offset) for file in layout.files for part in file.parts}
        self._open: dict[str, int] = {}
        for file in layout.files:
            self._open[file.path] = sink.create_sized(file.path, file.nbytes)
            sink.write_at(self._open[file.path], 0, file.prefix)

    def write(self, chunk: Chunk) -> bytes:
        """Write a chunk and return its sha256."""
        place = chunk.place
        path, start = self._start[place.part]
        data = memoryview(chunk.data).cast("B")
        if len(data) != place.total:
            raise AnyQuantError(f"{place.part}: {len(data)} bytes were packed for {place}")
        for run in range(place.runs):
            piece = data[run * place.nbytes : (run + 1) * place.nbytes]
            self._sink.write_at(self._open[path], start + place.offset + run * place.pitch, piece)
        return hashlib.sha256(data).digest()

    def finish(self) -> None:
        for descriptor in self._open.values():
            self._sink.finish(descriptor)


def _carry(job: Job, unit: Unit, files: _Files) -> dict[Place, bytes]:
    digests = {}
    for name in unit.carried:
        for chunk in writable(job).carry(unit, job.architecture, read_carried(job, name)):
            digests[chunk.place] = files.write(chunk)
    return digests


def execute(
    job: Job,
    source: Rows,
    sink: Sink,
    threads: int,
    progress: Progress,
    maxima: Mapping[str, float] = EMPTY,
) -> Written:
    """Write every file of the job's layout into `sink`; `source` gives the quantized rows.

    `maxima`: the largest magnitude that enters a Linear, for static activation scales.

    Peak memory is a few row blocks per thread, whatever the size of the model or of its largest tensor.
    Raises BadInputError for weights that are not finite, OutputError when the disk fails.
    """
    target = writable(job)
    files = _Files(job.layout, sink)
    digests: dict[Place, bytes] = {}
    contents: dict[tuple[str, int], bytes] = {}
    for unit in job.layout.units:
        digests.update(_carry(job, unit, files))
        for chunk in target.inputs(unit, job.architecture, job.plan, maxima):
            digests[chunk.place] = files.write(chunk)

    def work(block: Block) -> tuple[dict[Place, bytes], bytes]:
        rows = source.rows(block)
        chunks = target.pack(block.unit, job.architecture, block.linear.name, block.first, rows)
        return {chunk.place: files.write(chunk) for chunk in chunks}, content_digest(rows)

    def done(block: Block, result: tuple[dict[Place, bytes], bytes]) -> None:
        written, contents[block.key] = result
        digests.update(written)
        progress.advance(block.weights)

    progress.start("quantize", job.weights, "w")
    run_all(work, blocks(job), threads, done)
    files.finish()
    progress.finish()
    return Written(digests, contents)
