"""Quantizing block by block: each block sees the activations that the quantized blocks before it make.

For algorithms that need more than the second moments of the unquantized model, and for transforms that are found from
activations. Every stage (a block; at last embedding and head) is recorded when it is done: a killed run resumes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anyquant.algorithms import ALGORITHMS
from anyquant.calibrate.chain import Chain
from anyquant.calibrate.gradients import OutputStatistics, collect_output_statistics
from anyquant.calibrate.live import LiveBlock
from anyquant.calibrate.stats import Moments, Statistics
from anyquant.calibrate.text import Document
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.linear import Linear
from anyquant.core.plan import Decision
from anyquant.core.progress import Progress
from anyquant.models.families import HEAD_INPUT
from anyquant.models.streaming import StreamedModel
from anyquant.pipeline.activations import needs_maximum
from anyquant.pipeline.matrix import Matrices, output_needed, statistics_needed
from anyquant.pipeline.planner import Job
from anyquant.pipeline.scene import Rewriting
from anyquant.pipeline.steps import rows_apart
from anyquant.pipeline.verify import file_hash
from anyquant.pipeline.work import Record, Work

MOMENTS, MAXIMA = "moments/", "maxima/"
UNROUTED = "no token reached this expert; what enters it was assumed to be what enters the others"
OUTPUTS = "outputs"  # folder of the gradients, in that of the run


@dataclass(frozen=True)
class Staged:
    """The quantized Linears as entries of the work folder, keys by name. `job` has the rewritten checkpoint.

    `notes` say what did not go as usual (raised dampening, experts that no token reached), for the report.
    """

    job: Job
    entries: Mapping[str, str]
    statistics: Statistics
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Room:
    """What a run may take: bytes of memory for activations (None: all of them); the rest lies beside `out`."""

    memory: int | None
    out: Path


def is_staged(job: Job) -> bool:
    """Whether the job must go block by block through the quantized model."""
    decisions = job.plan.decisions.values()
    static = any(needs_maximum(decision.input_activation) for decision in decisions)
    apart = all(rows_apart(decision) for decision in decisions)
    return static or not apart or Rewriting.calibrated(job.plan.transforms)


class Stages:
    """One staged run of a job."""

    def __init__(self, job: Job, documents: Sequence[Document], work: Work, room: Room, progress: Progress) -> None:
        self.job, self.work, self.progress = job, work, progress
        self._entries: dict[str, str] = {}
        self._moments: dict[str, Moments] = {}
        self._notes: list[str] = []
        self._states = ""
        decisions = list(job.plan.decisions.values())
        tuned = any(ALGORITHMS.get(decision.algorithm).tune is not None for decision in decisions)
        both = tuned or "cross" in statistics_needed(decisions)
        self.model = StreamedModel(job.checkpoint, job.architecture, dtype=job.recipe.calibration.dtype)
        tokens = [document.tokens for document in documents]
        self._warn(sum(map(len, tokens)))
        self.outputs = self._gradients(tokens) if output_needed(decisions) else None
        self.chain = Chain(self.model, tokens, both, work.folder, room.memory)
        self.rewriting = Rewriting(job)

    def run(self) -> Staged:
        """All stages, from the first that is not recorded. Raises as the algorithms do."""
        linears = self.job.architecture.linears
        first = self._resume()
        left = sum(linear.weights for linear in linears if linear.name not in self._entries)
        self.progress.start("quantize", float(left), "w")
        for index in range(first, self.model.blocks):
            self.progress.place(f"block {index + 1} of {self.model.blocks}")
            with self.chain.block(index) as live:
                record = self._block(live)
            self._states = self.chain.save(self.work.states(index))
            self.work.record(index, replace(record, states=self._states))
        if first <= self.model.blocks:
            self.progress.place("embedding and head")
            self.work.record(self.model.blocks, self._edges())
        self.progress.finish()
        job = replace(self.job, checkpoint=self.rewriting.checkpoint)
        return Staged(job, self._entries, Statistics(self._moments), tuple(self._notes))

    def _warn(self, tokens: int) -> None:
        """Of fewer tokens than an input has channels no full Hessian can be had: what to do, before hours are spent."""
        decisions = self.job.plan.decisions
        widths = [one.shape[1] for one in self.job.architecture.linears if _by_hessian(decisions[one.name])]
        if max(widths, default=0) > tokens:
            self._notes.append(
                f"{tokens} tokens of calibration for inputs of up to {max(widths)} channels: their Hessians are filled "
                "up by dampening"
            )
            self.progress.say(f"warning: {self._notes[-1]}; a longer text or more --tokens lose less")

    def _gradients(self, documents: Sequence[Sequence[int]]) -> OutputStatistics:
        """Those of an earlier run that is resumed, or collected now: through the float model, once."""
        if Rewriting.calibrated(self.job.plan.transforms):
            raise UsageError(
                "gptq with two sides needs the gradients of the model as it is quantized, which transforms found from "
                "activations change; leave out the transform, or say sides = 1"
            )
        folder = self.work.folder / OUTPUTS
        if OutputStatistics.complete(folder):
            return OutputStatistics(folder)
        return collect_output_statistics(self.model, documents, folder, self.progress)

    def _one_sided(self) -> list[str]:
        """A note on matrices that were to be quantized with two sides, but have no gradients at their outputs."""
        if self.outputs is None:
            return []
        linears, decisions = self.job.architecture.by_name, self.job.plan.decisions
        wanting = [name for name in linears if output_needed([decisions[name]])]
        lacking = [name for name in wanting if not self.outputs.digest(linears[name])]
        if not lacking:
            return []
        return [f"{len(lacking)} matrices with one side, as gradients are not collected there, {lacking[0]} among them"]

    def _resume(self) -> int:
        """Take over what is recorded; the stage to go on with."""
        records = self.work.finished()[: self.model.blocks + 1]
        while records and len(records) <= self.model.blocks and not self._restored(len(records), records[-1].states):
            records.pop()
        for record in records:
            self._take(record)
            self.rewriting.take(record.arrays)
        if records:
            self._states = records[-1].states
            self.progress.say(f"going on after {len(records)} of {self.model.blocks + 1} stages of an earlier run")
        return len(records)

    def _restored(self, index: int, digest: str) -> bool:
        path = self.work.states(index - 1)
        try:
            # looked at first: states that are not those of the record would leave a chain that cannot begin anew
            return path.exists() and file_hash(path) == digest and self.chain.restore(index, path) == digest
        except (BadInputError, OSError):
            return False

    def _take(self, record: Record) -> None:
        self._entries |= record.entries
        self._notes += record.notes
        for name, array in record.arrays.items():
            if name.startswith(MOMENTS):
                group = name.removeprefix(MOMENTS)
                self._moments[group] = Moments(
                    array[1:].astype(np.float32), int(array[0]), record.arrays.get(MAXIMA + group)
                )

    def _block(self, live: LiveBlock) -> Record:
        """Rewrite, quantize and advance one block."""
        notes: list[str] = []
        rewrites = self.rewriting.block(live, notes)
        matrices = Matrices(
            self.job, self.rewriting.checkpoint, self.work, self._states, notes, self.progress, self.outputs
        )
        entries, moments = matrices.quantize_block(live)
        notes += [f"{name}: {UNROUTED}" for name in live.unrouted]
        live.advance()
        record = Record(entries, {**rewrites, **_kept(moments)}, tuple(notes))
        self._take(record)
        return record

    def _edges(self) -> Record:
        """Embedding and head, whose input, if any, is the output of the last block."""
        edges = [linear for linear in self.job.architecture.linears if linear.block is None]
        needs = statistics_needed([self.job.plan.decisions[linear.name] for linear in edges])
        moments = {HEAD_INPUT: self.chain.head(needs)} if any(_has_input(linear) for linear in edges) else {}
        notes = self._one_sided()
        matrices = Matrices(self.job, self.rewriting.checkpoint, self.work, self._states, notes, self.progress)
        entries = {linear.name: matrices.quantize_edge(linear, moments.get(linear.input_group)) for linear in edges}
        record = Record(entries, _kept(moments), tuple(notes))
        self._take(record)
        return record


def _by_hessian(decision: Decision) -> bool:
    return "hessian" in statistics_needed([decision])


def _has_input(linear: Linear) -> bool:
    return linear.input_group == HEAD_INPUT


def _kept(moments: Mapping[str, Moments]) -> dict[str, np.ndarray]:
    """What is kept of the statistics: count and second moment, and the largest magnitudes where they were taken."""
    arrays = {
        MOMENTS + group: np.append(np.float64(found.count), found.second_moment) for group, found in moments.items()
    }
    for group, found in moments.items():
        if found.absolute_maximum is not None:
            arrays[MAXIMA + group] = found.absolute_maximum
    return arrays
