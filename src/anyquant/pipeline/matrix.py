"""The matrices of one stage: pruned, quantized, corrected, and kept as entries of the state."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.calibrate.gradients import OutputStatistics
from anyquant.calibrate.live import LiveBlock
from anyquant.calibrate.stats import Moments
from anyquant.core.checkpoint import Checkpoint, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.linear import Linear
from anyquant.core.plan import Decision
from anyquant.core.progress import Progress
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid
from anyquant.pipeline.activations import needs_maximum
from anyquant.pipeline.blocks import check_finite
from anyquant.pipeline.planner import Job
from anyquant.pipeline.rows import SharedParameters
from anyquant.pipeline.steps import corrected, pruned, quantized, steps_of
from anyquant.pipeline.work import Work
from anyquant.store.state import entry_key

CODE_VERSION = "4"  # changes whenever the same input may give other codes
CHUNK_WEIGHTS = 1 << 24  # rows of embedding or head that are quantized at once: 64 MB of float32
HESSIAN_BYTES = 1 << 29  # of experts that are observed in one pass
MATRICES = frozenset({"hessian", "cross", "residual"})
OUTPUT = "output"  # the one need that is not about inputs


def statistics_needed(decisions: Sequence[Decision]) -> frozenset[str]:
    """What has to be known of the inputs of these Linears."""
    return _all_needed(decisions) - {OUTPUT}


def output_needed(decisions: Sequence[Decision]) -> bool:
    """Whether the gradients at the outputs of these Linears have to be known."""
    return OUTPUT in _all_needed(decisions)


def _all_needed(decisions: Sequence[Decision]) -> frozenset[str]:
    found: set[str] = set()
    for decision in decisions:
        for step in steps_of(decision):
            algorithm = ALGORITHMS.get(step.name)
            found |= algorithm.needed(step.options) | algorithm.uses
        if needs_maximum(decision.input_activation):
            found.add("absolute_maximum")
    return frozenset(found)


@dataclass
class _Tuned:
    """`algorithms.base.TunedBlock` over a live block; `left` is the share of the work that is not reported yet."""

    live: LiveBlock
    matrices: Mapping[str, Task]
    progress: Progress
    left: float = 1.0

    @property
    def module(self) -> Any:
        return self.live.module

    @property
    def batches(self) -> int:
        return self.live.batches

    def call(self, batch: int, weights: Mapping[str, Any]) -> Any:
        return self.live.call(batch, weights)

    def target(self, batch: int) -> Any:
        return self.live.target(batch)

    def worked(self, share: float) -> None:
        self.left -= share
        self.progress.advance(share * sum(task.weights.size for task in self.matrices.values()))


class Matrices:
    """Quantizes the matrices of a stage. `states`: sha256 of the activations that enter it; `notes` is added to.

    `progress` counts weights. `outputs` are the gradients at the outputs of Linears, where they were collected.
    """

    def __init__(
        self,
        job: Job,
        checkpoint: Checkpoint,
        work: Work,
        states: str,
        notes: list[str],
        progress: Progress,
        outputs: OutputStatistics | None = None,
    ) -> None:
        self._job, self._checkpoint, self._work, self._states, self._notes = job, checkpoint, work, states, notes
        self._progress = progress
        self._outputs = outputs
        self._shared = SharedParameters(job, checkpoint)

    def quantize_block(self, live: LiveBlock) -> tuple[dict[str, str], dict[str, Moments]]:
        """Every Linear of the block; the decoded weights take the place of the float ones.

        Linear name to entry key, and the statistics by input group. Matrices with error feedback see what the quantized
        matrices before them in the block make; those that are tuned together come last, and see all others quantized.
        """
        entries: dict[str, str] = {}
        moments: dict[str, Moments] = {}
        *steps, tuned = self._steps(live.linears)
        for linears in steps:
            found = live.observe(self._needed(linears), linears, last=linears is steps[-1] and not tuned)
            for linear in linears:
                entries[linear.name] = self._one(linear, live, found[linear.input_group])
            moments |= {group: _without_matrices(one, moments.get(group)) for group, one in found.items()}
        if tuned:
            found = live.observe(self._needed(tuned), tuned)
            for algorithm in dict.fromkeys(self._decision(linear).algorithm for linear in tuned):
                together = [linear for linear in tuned if self._decision(linear).algorithm == algorithm]
                entries |= self._tune(algorithm, together, live, found, entries)
            moments |= {group: _without_matrices(one, moments.get(group)) for group, one in found.items()}
        return entries, moments

    def _steps(self, linears: Sequence[Linear]) -> list[list[Linear]]:
        """Linears that are observed in one pass, in order; the last list holds those that are tuned.

        Those with error feedback go input by input, experts in as large parts as their Hessians leave room for.
        """
        apart: dict[str, list[Linear]] = {}
        tuned: list[Linear] = []
        for linear in linears:
            algorithm = ALGORITHMS.get(self._decision(linear).algorithm)
            if algorithm.tune is not None:
                tuned.append(linear)
                continue
            needs = self._needed([linear]) & MATRICES
            place = _alike(linear) if needs else ""
            apart.setdefault(place, []).append(linear)
        steps = []
        for alike in apart.values():
            step: list[Linear] = []
            for linear in alike:
                groups = {one.input_group: one for one in (*step, linear)}
                size = sum(4 * one.shape[1] ** 2 * len(self._needed([one]) & MATRICES) for one in groups.values())
                further = step and linear.input_group != step[-1].input_group
                if further and linear.expert is not None and size > HESSIAN_BYTES:
                    steps.append(step)
                    step = []
                step.append(linear)
            steps.append(step)
        return [*steps, tuned]

    def _decision(self, linear: Linear) -> Decision:
        return self._job.plan.decisions[linear.name]

    def _needed(self, linears: Sequence[Linear]) -> frozenset[str]:
        return statistics_needed([self._decision(linear) for linear in linears])

    def _one(self, linear: Linear, live: LiveBlock, moments: Moments) -> str:
        weights = live.weights(linear)
        check_finite(weights, f"tensor {linear.view.tensor} ({linear.name})")
        key = self._key(linear, [weights], moments)
        if self._work.entries.has(key, find_grid):
            self._say(linear, pruned(self._decision(linear), self._task(linear, weights, moments)))
        else:
            self._quantize(linear, weights, moments, key)
        live.settle(linear, self._work.entry(key).load().decode())
        self._progress.advance(float(weights.size))
        return key

    def quantize_edge(self, linear: Linear, moments: Moments | None) -> str:
        """Embedding or head, by pieces of rows from the checkpoint; its entry key."""
        decision = self._decision(linear)
        high = find_grid(decision.grid).block[0]
        step = max(1, CHUNK_WEIGHTS // linear.view.columns // high) * high
        pieces = [(first, min(step, linear.view.rows - first)) for first in range(0, linear.view.rows, step)]

        def read() -> Iterator[Float32]:
            for first, rows in pieces:
                yield read_view(self._checkpoint, linear.view, first, first + rows)

        key = self._key(linear, read(), moments)
        fresh = not self._work.entries.has(key, find_grid)
        if fresh and decision.prune is None and decision.correct is None:
            self._quantize_pieces(linear, zip((first for first, _ in pieces), read(), strict=True), moments, key)
            return key
        if fresh:
            self._quantize(linear, np.concatenate(list(read())), moments, key)
        self._progress.advance(float(linear.weights))
        return key

    def _quantize_pieces(
        self, linear: Linear, pieces: Iterable[tuple[int, Float32]], moments: Moments | None, key: str
    ) -> None:
        """By pieces of rows: (first row, weights)."""
        with self._work.entries.begin(key, find_grid(self._decision(linear).grid), linear.shape) as entry:
            for first, weights in pieces:
                check_finite(weights, f"tensor {linear.view.tensor} ({linear.name})", first)
                entry.write(first, self._apply(linear, self._task(linear, weights, moments)))
                self._progress.advance(float(weights.size))

    def _quantize(self, linear: Linear, weights: Float32, moments: Moments | None, key: str) -> None:
        result = self._apply(linear, self._task(linear, weights, moments))
        with self._work.entries.begin(key, result.grid, result.shape) as entry:
            entry.write(0, result)

    def _task(self, linear: Linear, weights: Float32, moments: Moments | None) -> Task:
        decision = self._decision(linear)
        grid = find_grid(decision.grid)
        output = self._outputs.of(linear) if self._outputs and output_needed([decision]) else None
        shared = self._shared.of(linear)
        return Task(weights, grid, moments, decision.options, shared, place=linear.name, output_hessian=output)

    def _apply(self, linear: Linear, task: Task) -> QTensor:
        """Prune, quantize, correct."""
        decision = self._decision(linear)
        ready = pruned(decision, task)
        self._say(linear, ready)
        return corrected(decision, task, quantized(decision, ready))

    def _say(self, linear: Linear, task: Task) -> None:
        """Note what does not go as usual; for an entry of a run that was killed before its notes were kept, again."""
        notes = ALGORITHMS.get(self._decision(linear).algorithm).notes
        said = [] if notes is None else [f"{linear.name}: {note}" for note in notes(task)]
        self._notes += [note for note in said if note not in self._notes]

    def _tune(
        self,
        name: str,
        linears: list[Linear],
        live: LiveBlock,
        moments: Mapping[str, Moments],
        before: Mapping[str, str],
    ) -> dict[str, str]:
        """Matrices that are tuned together, by one algorithm, when those of `before` (their entries) are quantized."""
        tasks, keys = {}, {}
        for linear in linears:
            weights, found = live.weights(linear), moments[linear.input_group]
            check_finite(weights, f"tensor {linear.view.tensor} ({linear.name})")
            keys[linear.name] = self._key(linear, [weights], found)
            tasks[linear.name] = pruned(self._decision(linear), self._task(linear, weights, found))
        beside = {"matrices": keys, "before": before}  # each depends on all
        keys = {linear: entry_key(key, beside, "", CODE_VERSION) for linear, key in keys.items()}
        tuned = _Tuned(live, tasks, self._progress)
        if not all(self._work.entries.has(key, find_grid) for key in keys.values()):
            tune = ALGORITHMS.get(name).tune
            if tune is None:
                raise AnyQuantError(f"{name} does not tune")
            for linear_name, result in tune(tuned).items():
                linear = self._job.architecture.by_name[linear_name]
                final = corrected(self._decision(linear), tasks[linear_name], result)
                with self._work.entries.begin(keys[linear_name], final.grid, final.shape) as entry:
                    entry.write(0, final)
        tuned.worked(tuned.left)
        for linear in linears:
            live.assign(linear, self._work.entry(keys[linear.name]).load().decode())
        return keys

    def _key(self, linear: Linear, pieces: Any, moments: Moments | None) -> str:
        """The hash of all that determines the entry: weights, steps, statistics; for tuned matrices also the states."""
        decision = self._decision(linear)
        source = sha256(repr(linear.shape).encode())
        for piece in pieces:
            source.update(np.ascontiguousarray(piece).data)
        steps = [asdict(step) for step in steps_of(decision)]
        shared = {name: array.tolist() for name, array in (self._shared.of(linear) or {}).items()}
        tuned = ALGORITHMS.get(decision.algorithm).tune is not None
        steering = {"grid": decision.grid, "steps": steps, "shared": shared, "states": self._states if tuned else ""}
        if self._outputs and output_needed([decision]):
            steering["output"] = self._outputs.digest(linear)
        # matrices with one input share its statistics, whose products may be large
        found = "" if moments is None else moments.once("digest", lambda: _digest(moments))
        return entry_key(source.hexdigest(), steering, found, CODE_VERSION)


def _alike(linear: Linear) -> str:
    """The input group, the same for all experts of a block."""
    if linear.expert is None:
        return linear.input_group
    before, _, after = linear.input_group.rpartition(f".{linear.expert}.")
    return f"{before}.*.{after}"


def _without_matrices(moments: Moments, before: Moments | None) -> Moments:
    """The part of the statistics that is small enough to be kept.

    `before`: what was found for another matrix with this input, which may have asked for its largest magnitudes.
    """
    largest = moments.absolute_maximum
    if largest is None and before is not None:
        largest = before.absolute_maximum
    return Moments(moments.second_moment, moments.count, largest, moments.mean)


def _digest(moments: Moments) -> str:
    total = sha256(str(moments.count).encode())
    for name in ("second_moment", "absolute_maximum", "mean", "hessian", "cross", "residual"):
        array = getattr(moments, name)
        if array is not None:
            total.update(f"{name}{array.shape}".encode())
            total.update(np.ascontiguousarray(array, dtype="<f4").data)
    return total.hexdigest()
