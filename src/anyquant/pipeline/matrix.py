"""The matrices of one stage: pruned, quantized, corrected, and kept as entries of the state."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.calibrate.live import LiveBlock
from anyquant.calibrate.stats import Moments
from anyquant.core.checkpoint import Checkpoint, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.linear import Linear
from anyquant.core.plan import Decision, Step
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid
from anyquant.pipeline.blocks import check_finite
from anyquant.pipeline.planner import Job
from anyquant.pipeline.rows import SharedParameters
from anyquant.pipeline.work import Work
from anyquant.store.state import entry_key

CODE_VERSION = "3"  # changes whenever the same input may give other codes
CHUNK_WEIGHTS = 1 << 24  # rows that are quantized at once: 64 MB of float32


def steps_of(decision: Decision) -> list[Step]:
    """Pruner, algorithm and corrector of a decision."""
    return [step for step in (decision.prune, Step(decision.algorithm, decision.options), decision.correct) if step]


@dataclass(frozen=True)
class _Tuned:
    """`algorithms.base.TunedBlock` over a live block."""

    live: LiveBlock
    matrices: Mapping[str, Task]

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


class Matrices:
    """Quantizes the matrices of a stage. `states`: sha256 of the activations that enter it; `notes` is added to."""

    def __init__(self, job: Job, checkpoint: Checkpoint, work: Work, states: str, notes: list[str]) -> None:
        self._job, self._checkpoint, self._work, self._states, self._notes = job, checkpoint, work, states, notes
        self._shared = SharedParameters(job, checkpoint)

    def quantize_block(self, live: LiveBlock, moments: Mapping[str, Moments]) -> dict[str, str]:
        """Every Linear of the block; the decoded weights take the place of the float ones. Linear name to entry key.

        Matrices that are tuned together come last: they see the others as they were quantized.
        """
        entries: dict[str, str] = {}
        tuned: dict[str, list[Linear]] = {}
        for linear in live.linears:
            decision = self._job.plan.decisions[linear.name]
            if ALGORITHMS.get(decision.algorithm).tune is not None:
                tuned.setdefault(decision.algorithm, []).append(linear)
                continue
            weights = live.weights(linear)
            check_finite(weights, f"tensor {linear.view.tensor} ({linear.name})")
            key = self._key(linear, [weights], moments[linear.input_group])
            if not self._work.entries.has(key, find_grid):
                self._quantize(linear, weights, moments[linear.input_group], key)
            live.assign(linear, self._work.entry(key).load().decode())
            entries[linear.name] = key
        for algorithm, linears in tuned.items():
            entries |= self._tune(algorithm, linears, live, moments)
        return entries

    def quantize_edge(self, linear: Linear, moments: Moments | None) -> str:
        """Embedding or head, by pieces of rows from the checkpoint; its entry key."""
        decision = self._job.plan.decisions[linear.name]
        step = max(1, CHUNK_WEIGHTS // linear.view.columns)
        pieces = [(first, min(step, linear.view.rows - first)) for first in range(0, linear.view.rows, step)]

        def read() -> Iterator[Float32]:
            for first, rows in pieces:
                yield read_view(self._checkpoint, linear.view, first, first + rows)

        key = self._key(linear, read(), moments)
        if self._work.entries.has(key, find_grid):
            return key
        if decision.prune is not None or decision.correct is not None:
            self._quantize(linear, np.concatenate(list(read())), moments, key)
            return key
        with self._work.entries.begin(key, find_grid(decision.grid), linear.shape) as entry:
            for (first, _), weights in zip(pieces, read(), strict=True):
                check_finite(weights, f"tensor {linear.view.tensor} ({linear.name})", first)
                entry.write(first, self._apply(linear, self._task(linear, weights, moments)))
        return key

    def _quantize(self, linear: Linear, weights: Float32, moments: Moments | None, key: str) -> None:
        result = self._apply(linear, self._task(linear, weights, moments))
        with self._work.entries.begin(key, result.grid, result.shape) as entry:
            entry.write(0, result)

    def _task(self, linear: Linear, weights: Float32, moments: Moments | None) -> Task:
        decision = self._job.plan.decisions[linear.name]
        grid = find_grid(decision.grid)
        return Task(weights, grid, moments, decision.options, self._shared.of(linear), place=linear.name)

    def _pruned(self, linear: Linear, task: Task) -> Task:
        step = self._job.plan.decisions[linear.name].prune
        if step is None:
            return task
        prune = ALGORITHMS.get(step.name).prune
        if prune is None:
            raise AnyQuantError(f"{step.name} does not prune")
        return replace(task, keep=prune(replace(task, options=step.options)))

    def _apply(self, linear: Linear, task: Task) -> QTensor:
        """Prune, quantize, correct."""
        quantize = ALGORITHMS.get(self._job.plan.decisions[linear.name].algorithm).quantize
        if quantize is None:
            raise AnyQuantError(f"{linear.name}: {self._job.plan.decisions[linear.name].algorithm} does not quantize")
        pruned = self._pruned(linear, task)
        return self._corrected(linear, task, quantize(pruned))

    def _corrected(self, linear: Linear, task: Task, result: QTensor) -> QTensor:
        step = self._job.plan.decisions[linear.name].correct
        if step is None:
            return result
        correct = ALGORITHMS.get(step.name).correct
        if correct is None:
            raise AnyQuantError(f"{step.name} does not correct")
        return correct(replace(task, options=step.options), result)

    def _tune(
        self, name: str, linears: list[Linear], live: LiveBlock, moments: Mapping[str, Moments]
    ) -> dict[str, str]:
        """Matrices that are tuned together, by one algorithm."""
        tasks, keys = {}, {}
        for linear in linears:
            weights, found = live.weights(linear), moments[linear.input_group]
            check_finite(weights, f"tensor {linear.view.tensor} ({linear.name})")
            keys[linear.name] = self._key(linear, [weights], found)
            tasks[linear.name] = self._pruned(linear, self._task(linear, weights, found))
        if not all(self._work.entries.has(key, find_grid) for key in keys.values()):
            tune = ALGORITHMS.get(name).tune
            if tune is None:
                raise AnyQuantError(f"{name} does not tune")
            for linear_name, result in tune(_Tuned(live, tasks)).items():
                linear = self._job.architecture.by_name[linear_name]
                final = self._corrected(linear, tasks[linear_name], result)
                with self._work.entries.begin(keys[linear_name], final.grid, final.shape) as entry:
                    entry.write(0, final)
        for linear in linears:
            live.assign(linear, self._work.entry(keys[linear.name]).load().decode())
        return keys

    def _key(self, linear: Linear, pieces: Any, moments: Moments | None) -> str:
        """The hash of all that determines the entry: weights, steps, statistics; for tuned matrices also the states."""
        decision = self._job.plan.decisions[linear.name]
        source = sha256(repr(linear.shape).encode())
        for piece in pieces:
            source.update(np.ascontiguousarray(piece).data)
        steps = [asdict(step) for step in steps_of(decision)]
        shared = {name: array.tolist() for name, array in (self._shared.of(linear) or {}).items()}
        tuned = ALGORITHMS.get(decision.algorithm).tune is not None
        steering = {"grid": decision.grid, "steps": steps, "shared": shared, "states": self._states if tuned else ""}
        return entry_key(source.hexdigest(), steering, "" if moments is None else _digest(moments), CODE_VERSION)


def _digest(moments: Moments) -> str:
    total = sha256(str(moments.count).encode())
    for name in ("second_moment", "absolute_maximum", "mean", "hessian", "cross"):
        array = getattr(moments, name)
        if array is not None:
            total.update(f"{name}{array.shape}".encode())
            total.update(np.ascontiguousarray(array, dtype="<f4").data)
    return total.hexdigest()
