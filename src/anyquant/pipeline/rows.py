"""Where quantized rows come from: computed when asked for, or read from the entries of a state."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.calibrate.stats import Moments
from anyquant.core.checkpoint import Checkpoint, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.grid import Params
from anyquant.core.linear import Linear
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid
from anyquant.pipeline.blocks import BLOCK_WEIGHTS, Block, read_block
from anyquant.pipeline.planner import Job
from anyquant.store.state import EntryReader


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
    """Rows quantized when asked for, each block for itself. For algorithms that take rows apart."""

    def __init__(self, job: Job, statistics: Importance) -> None:
        self._job, self._statistics = job, statistics
        self._shared = SharedParameters(job)

    def rows(self, block: Block) -> QTensor:
        linear, decision = block.linear, self._job.plan.decisions[block.linear.name]
        algorithm, grid = ALGORITHMS.get(decision.algorithm), find_grid(decision.grid)
        if algorithm.quantize is None or not algorithm.rows_apart or decision.correct is not None:
            raise AnyQuantError(f"{linear.name}: {decision.chain} does not quantize rows apart")
        weights, moments = read_block(self._job, block), self._statistics.moment(linear)
        task = Task(weights, grid, moments, decision.options, self._shared.of(linear), place=linear.name)
        return algorithm.quantize(task)


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
        tied = [
            name
            for name, other in self._job.plan.decisions.items()
            if decision.tie_group is not None and other.tie_group == decision.tie_group
        ]
        largest = tuple(self._find(name) for name in tied)
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
