"""Transforms that are found from activations, block by block, while the model is quantized."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.live import LiveBlock
from anyquant.calibrate.stats import Moments
from anyquant.calibrate.watch import first_of_groups
from anyquant.core.checkpoint import Checkpoint, read_tensor, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid
from anyquant.core.linear import Carried, Linear
from anyquant.core.plan import Step
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.pipeline.planner import Job
from anyquant.transforms import TRANSFORMS
from anyquant.transforms.base import Transform
from anyquant.transforms.checkpoint import RewrittenCheckpoint
from anyquant.transforms.rewrites import Rewrites

HESSIAN_BYTES = 1 << 30  # that are only used, not needed, by a transform; without them it goes by the diagonal
DESCRIPTION, ARRAYS = "rewrites", "rewrites/"
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class LiveScene:
    """What a transform sees of the block it is about to rewrite."""

    architecture: Architecture
    block: int
    live: LiveBlock
    checkpoint: Checkpoint
    found: Mapping[str, Moments]
    grids: Mapping[str, str]

    def weights(self, linear: str) -> Float32:
        return self.live.weights(self.architecture.by_name[linear])

    def carried(self, name: str) -> Float32:
        return _carried(self.checkpoint, self.architecture.carried_by_name[name])

    def moments(self, group: str) -> Moments | None:
        return self.found.get(group)

    def grid(self, linear: str) -> Grid | None:
        found = find_grid(self.grids[linear])
        return None if found.family == "floating" else found


class Rewriting:
    """The rewrites found so far; `checkpoint` is the job's with all of them."""

    def __init__(self, job: Job) -> None:
        self.checkpoint: Checkpoint = job.checkpoint
        self._job = job
        self._found = Rewrites()
        self._steps = [step for step in job.plan.transforms if TRANSFORMS.get(step.name).block is not None]

    @staticmethod
    def calibrated(transforms: Sequence[Step]) -> bool:
        """Whether one of them is found from activations."""
        return any(TRANSFORMS.get(step.name).block is not None for step in transforms)

    def block(self, live: LiveBlock, notes: list[str]) -> Arrays:
        """Rewrite a block of float weights, in the checkpoint and in the live module. Returns what `take` needs."""
        total = Rewrites()
        for step in self._steps:
            total = total.then(self._found_by(step, live, notes))
        if total.empty:
            return {}
        live.accept()
        description, arrays = total.to_arrays()
        text = np.frombuffer(json.dumps(description).encode(), dtype=np.uint8)
        return {DESCRIPTION: text, **{ARRAYS + name: array for name, array in arrays.items()}}

    def _found_by(self, step: Step, live: LiveBlock, notes: list[str]) -> Rewrites:
        transform = TRANSFORMS.get(step.name)
        if transform.block is None:
            return Rewrites()
        grids = {linear.name: self._job.plan.decisions[linear.name].grid for linear in live.linears}
        found, without = _observed(live, transform)
        if without:
            notes.append(f"{step.name}: block {live.index}: no room for the Hessians of {without} inputs")
        scene = LiveScene(self._job.architecture, live.index, live, self.checkpoint, found, grids)
        rewrites = transform.block(scene, step.options)
        notes += [f"{step.name}: {note}" for note in rewrites.notes]
        self._add(rewrites)
        self._assign(live, rewrites)
        return rewrites

    def take(self, arrays: Arrays) -> None:
        """Take over the rewrites of a block from an earlier run."""
        if DESCRIPTION in arrays:
            description = json.loads(arrays[DESCRIPTION].tobytes())
            named = {name.removeprefix(ARRAYS): array for name, array in arrays.items() if name.startswith(ARRAYS)}
            self._add(Rewrites.from_arrays(description, named))

    def _add(self, rewrites: Rewrites) -> None:
        self._found = self._found.then(rewrites)
        if not self._found.empty:
            self.checkpoint = RewrittenCheckpoint(self._job.checkpoint, self._found)

    def _assign(self, live: LiveBlock, rewrites: Rewrites) -> None:
        for linear in live.linears:
            if linear.view.tensor in rewrites.tensors:
                live.assign(linear, read_view(self.checkpoint, linear.view, 0, linear.view.rows))
        for carried in self._job.architecture.carried:
            if carried.block == live.index and carried.tensor in rewrites.tensors:
                live.assign_carried(carried, _carried(self.checkpoint, carried))


def _observed(live: LiveBlock, transform: Transform) -> tuple[dict[str, Moments], int]:
    """What the transform needs, and what it uses; of that, Hessians of as many inputs as there is room for.

    And the number of those for whose Hessians there is none.
    """
    needs, uses = transform.needs, transform.needs | transform.uses
    small: list[Linear] = []
    large: list[Linear] = []
    room = HESSIAN_BYTES
    for group in first_of_groups(live.linears).values():
        size = 4 * group.shape[1] ** 2 if "hessian" in uses - needs else 0
        (small if size <= room else large).append(group)
        room -= size if size <= room else 0
    found = live.observe(uses, small) if small else {}
    return found | (live.observe(uses - {"hessian"}, large) if large else {}), len(large)


def _carried(checkpoint: Checkpoint, carried: Carried) -> Float32:
    flat = read_tensor(checkpoint, carried.tensor).reshape(-1)
    return flat[carried.start : carried.start + carried.length]
