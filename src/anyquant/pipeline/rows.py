"""Where quantized rows come from: computed when asked for, or read from the entries of a state."""

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Protocol

import numpy as np

from anyquant.algorithms.base import Task
from anyquant.calibrate.stats import Moments
from anyquant.core.checkpoint import Checkpoint, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Params
from anyquant.core.linear import Linear
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid
from anyquant.pipeline.blocks import BLOCK_WEIGHTS, Block, read_block
from anyquant.pipeline.planner import Job
from anyquant.pipeline.steps import apply_steps, rows_apart
from anyquant.store.state import EntryReader

KEPT = 2  # whole matrices: threads may be at work on the end of one and the beginning of the next


class Importance(Protocol):
    """What is known of the input of a Linear; None where nothing is."""

    def moment(self, linear: Linear) -> Moments | None: ...

    def importance(self, linear: Linear) -> Float32 | None:
        """Its mean squared activation of each channel."""
        ...


class Unweighted:
    """No calibration: every channel counts the same."""

    def moment(self, linear: Linear) -> Moments | None:
        return None

    def importance(self, linear: Linear) -> Float32 | None:
        return None


class Rows(Protocol):
    """The quantized rows of a job."""

    def rows(self, block: Block) -> QTensor:
        """Those of a block. Raises BadInputError for weights that are not finite."""
        ...


class Direct:
    """Rows quantized when asked for, each block for itself; those of steps that look at a whole matrix by matrix.

    Nothing is known but `statistics`: for decisions that need no more.
    """

    def __init__(self, job: Job, statistics: Importance) -> None:
        self._job, self._statistics = job, statistics
        self._shared = SharedParameters(job)
        self._lock = Lock()
        self._whole: OrderedDict[str, QTensor] = OrderedDict()

    def rows(self, block: Block) -> QTensor:
        if rows_apart(self._job.plan.decisions[block.linear.name]):
            return self._quantized(block)
        with self._lock:
            if block.linear.name not in self._whole:
                while len(self._whole) >= KEPT:
                    self._whole.popitem(last=False)
                whole = Block(block.unit, block.linear, 0, block.linear.shape[0])
                self._whole[block.linear.name] = self._quantized(whole)
            self._whole.move_to_end(block.linear.name)
            return self._whole[block.linear.name].rows(block.first, block.first + block.rows)

    def _quantized(self, block: Block) -> QTensor:
        linear, decision = block.linear, self._job.plan.decisions[block.linear.name]
        weights, moments = read_block(self._job, block), self._statistics.moment(linear)
        shared = self._shared.of(linear)
        task = Task(weights, find_grid(decision.grid), moments, decision.options, shared, place=linear.name)
        return apply_steps(decision, task)


class Stored:
    """Rows read from entries, by Linear name."""

    def __init__(self, entries: Mapping[str, EntryReader]) -> None:
        self._entries = entries

    def rows(self, block: Block) -> QTensor:
        return self._entries[block.linear.name].rows(block.first, block.first + block.rows)


class SharedParameters:
    """Tensor-wide parameters of Linears, from the largest magnitudes of their tie group; each is read once.

    `checkpoint` takes the place of the job's.
    """

    def __init__(self, job: Job, checkpoint: Checkpoint | None = None) -> None:
        self._job = job
        self._checkpoint = job.checkpoint if checkpoint is None else checkpoint
        self._largest: dict[str, float] = {}

    def of(self, linear: Linear) -> Params | None:
        """For a grid with tensor-wide parameters, else None.

        Linears of one tie group share them: an engine stores the group as one tensor.
        """
        decision = self._job.plan.decisions[linear.name]
        grid = find_grid(decision.grid)
        if not grid.tensor_wide:
            return None
        largest = tuple(self._find(name) for name in self._job.plan.tied(linear.name))
        return grid.prepare(self._find(linear.name), largest)

    def _find(self, name: str) -> float:
        if name not in self._largest:
            view, most = self._job.architecture.by_name[name].view, 0.0
            step = max(1, BLOCK_WEIGHTS // view.columns)
            for first in range(0, view.rows, step):
                values = read_view(self._checkpoint, view, first, min(view.rows, first + step))
                most = max(most, float(np.abs(values).max(initial=0)))
            self._largest[name] = most
        return self._largest[name]
