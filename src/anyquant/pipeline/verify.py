"""Reopen what was written, decode every tensor, and compare it with the plan and with the source."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anyquant.core.dtypes import Bytes
from anyquant.core.errors import AnyQuantError
from anyquant.core.plan import Place
from anyquant.core.progress import Progress
from anyquant.core.qtensor import QTensor
from anyquant.pipeline.blocks import Block, blocks, read_block, read_carried
from anyquant.pipeline.executors.threads import run_all
from anyquant.pipeline.planner import Job, writable
from anyquant.pipeline.rows import Importance
from anyquant.pipeline.run import Written, content_digest, squared_error

HASH_BYTES = 1 << 22


@dataclass(frozen=True)
class Verified:
    """`errors`: relative weighted squared error of every Linear, computed from the bytes on disk.

    `hashes`: sha256 of every file.
    """

    errors: Mapping[str, float]
    hashes: Mapping[str, str]


class _Reader:
    """The bytes of parts, read back from the files on disk; usable from any thread."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._start = {name: (file.path, part.offset) for name, (file, part) in job.layout.locate().items()}
        self._fds = {file.path: os.open(folder / file.path, os.O_RDONLY) for file in job.layout.files}

    def read(self, place: Place) -> Bytes:
        """The bytes of all runs, one after the other."""
        path, start = self._start[place.part]
        found = b"".join(
            os.pread(self._fds[path], place.nbytes, start + place.offset + run * place.pitch)
            for run in range(place.runs)
        )
        if len(found) != place.total:
            raise AnyQuantError(f"verify: {path}: {place.part} ends early, {len(found)} of {place.total} bytes")
        return np.frombuffer(found, dtype=np.uint8)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


def _check_structure(job: Job, folder: Path) -> None:
    """The format's own bounded reader must find every planned part, no other, where the plan put it."""
    planned = {name: part for name, (_, part) in job.layout.locate().items()}
    found = writable(job).parts(folder)
    if set(planned) != set(found):
        odd = sorted(set(planned) ^ set(found))
        raise AnyQuantError(f"verify: planned and written tensors differ: {', '.join(odd[:5])}")
    for name, part in planned.items():
        if found[name] != part:
            raise AnyQuantError(f"verify: {name} was planned as {part} and reads back as {found[name]}")
    for file in job.layout.files:
        size = (folder / file.path).stat().st_size
        if size != file.nbytes:
            raise AnyQuantError(f"verify: {file.path} has {size} bytes, planned were {file.nbytes}")


def _check_around(job: Job, folder: Path) -> None:
    """All bytes that belong to no part: the header as planned, zeros between the parts and behind them."""
    for file in job.layout.files:
        with (folder / file.path).open("rb") as stream:
            if stream.read(len(file.prefix)) != file.prefix:
                raise AnyQuantError(f"verify: the header of {file.path} differs from what was planned")
            at = len(file.prefix)
            ends = [(part.offset, part.offset + part.nbytes) for part in file.parts]
            for start, stop in sorted([*ends, (file.nbytes, file.nbytes)]):
                stream.seek(at)
                if any(stream.read(max(start - at, 0))):
                    raise AnyQuantError(f"verify: {file.path} has bytes other than zero between its tensors, at {at}")
                at = max(at, stop)


def _check_digests(written: Written, reader: _Reader, threads: int) -> None:
    def check(item: tuple[Place, bytes]) -> None:
        place, digest = item
        if hashlib.sha256(reader.read(place).data).digest() != digest:
            raise AnyQuantError(f"verify: {place.part} at {place.offset} differs from what was written")

    run_all(check, written.digests.items(), threads, lambda item, result: None)


def _check_carried(job: Job, reader: _Reader) -> None:
    """Norms and biases on disk are those of the source."""
    for unit in job.layout.units:
        for name in unit.carried:
            for chunk in writable(job).carry(unit, job.architecture, read_carried(job, name)):
                wanted = memoryview(chunk.data).cast("B")
                if reader.read(chunk.place).data != wanted:
                    raise AnyQuantError(f"verify: {name} on disk differs from the source")


def file_hash(path: Path) -> str:
    """sha256 of a file, hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def verify(
    job: Job, folder: Path, written: Written, statistics: Importance, threads: int, progress: Progress
) -> Verified:
    """Compare the artifact in `folder` with the plan and the source.

    Names, types, shapes and offsets through the format's reader; the header; sha256 of every chunk; every tensor
    unpacked and decoded from the bytes on disk and compared with the source weights. Raises AnyQuantError at the first
    difference.
    """
    target = writable(job)
    _check_structure(job, folder)
    _check_around(job, folder)
    reader = _Reader(job, folder)

    def stored(block: Block) -> QTensor:
        name = block.linear.name
        places = job.format.slices(block.unit, job.architecture, name, block.first, block.rows)
        raw = {place.part: reader.read(place) for place in places}
        rows = target.unpack(block.unit, job.architecture, name, block.first, block.rows, raw)
        if content_digest(rows) != written.contents.get(block.key):
            raise AnyQuantError(f"verify: {name}, rows from {block.first}: codes or parameters differ from the planned")
        return rows

    with ThreadPoolExecutor(1) as beside:  # a hash is one thread's work
        hashes = beside.submit(lambda: {file.path: file_hash(folder / file.path) for file in job.layout.files})
        try:
            _check_digests(written, reader, threads)
            _check_carried(job, reader)
            errors = relative_errors(job, stored, statistics, threads, progress)
        finally:
            reader.close()
        return Verified(errors, hashes.result())


def relative_errors(
    job: Job, stored: Callable[[Block], QTensor], statistics: Importance, threads: int, progress: Progress
) -> Mapping[str, float]:
    """Relative weighted squared error of every Linear: the rows that `stored` reads back against the source's."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def work(block: Block) -> tuple[float, float]:
        rows = stored(block)
        return squared_error(read_block(job, block), rows.decode(), rows.grid, statistics.importance(block.linear))

    def done(block: Block, error: tuple[float, float]) -> None:
        sums[block.linear.name][0] += error[0]
        sums[block.linear.name][1] += error[1]
        progress.advance(block.weights)

    progress.start("verify", job.weights, "w")
    run_all(work, blocks(job), threads, done)
    progress.finish()
    return {name: noise / energy if energy else 0.0 for name, (noise, energy) in sums.items()}
