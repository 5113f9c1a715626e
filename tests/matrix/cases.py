"""The product of algorithms and grids: what is run on what, and the small matrices that it is run on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from algorithms.slow_feedback import correlated, moments
from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid, Params, Scope
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid

ROWS, COLUMNS = 8, 256

# one or two of each family and width
GRIDS = (
    *("f32", "f16", "bf16"),
    *("q8_0", "q4_0", "q5_1"),
    *("q2_k", "q3_k", "q4_k", "q6_k"),
    *("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s"),
    *("int2-g16", "int4-g128", "int3-g64-asym", "int4-channel", "int8-channel-asym", "int4-tensor", "int8-tensor-asym"),
    *("int4-g64-asym-f16", "int4-g128-f16"),
    *("affine2-g64", "affine4-g32", "affine8-g128"),
    *("fp8_e4m3-tensor", "fp8_e5m2-channel", "fp8_e4m3-block", "fp8_e4m3-g128"),
    *("mxfp4", "mxfp6_e2m3", "mxfp8_e5m2", "nvfp4", "nvfp4-bare"),
    *("nf4-g64", "nf4-g64-double", "fp4-g128-double"),
    *("codebook2", "codebook4"),
)


def applies(algorithm: str, grid_name: str) -> bool:
    """Values are learned only where they are parameters of the grid; all else goes with all else."""
    return algorithm != "codebook" or find_grid(grid_name).family == "codebook"


# every algorithm that quantizes, with options that make it quick
ALGORITHM_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {},
    "hqq": {"iterations": 4},
    "gptq": {},
    "autoround": {"iterations": 12, "start": "rtn", "rate": 0.01},  # from where a few steps gain
    "codebook": {"rounds": 1},
}
PAIRS = [(algorithm, name) for algorithm in ALGORITHM_OPTIONS for name in GRIDS if applies(algorithm, name)]


@dataclass(frozen=True)
class Linear:
    """A block that is one torch Linear: `algorithms.base.TunedBlock`. `states` (documents, length, in)."""

    matrices: Mapping[str, Task]
    states: Any
    module: Any = field(default=None)
    batches: int = 2

    def call(self, batch: int, weights: Mapping[str, Any]) -> Any:
        named = {"weight": weights["matrix"]}
        return torch.func.functional_call(self.module, named, self.states[batch::2])

    def target(self, batch: int) -> Any:
        with torch.no_grad():
            return self.module(self.states[batch::2])

    def worked(self, share: float) -> None:
        return


def quantize(algorithm: str, task: Task) -> QTensor:
    """What the algorithm makes of the task; a tuner sees a block that is this matrix alone."""
    found = ALGORITHMS.get(algorithm)
    task = replace(task, options={**ALGORITHM_OPTIONS[algorithm], **task.options})
    if found.quantize is not None:
        return found.quantize(task)
    assert found.tune is not None
    rows, columns = task.shape
    module = torch.nn.Linear(columns, rows, bias=False)
    module.weight.data = torch.from_numpy(task.weights.copy())
    states = torch.from_numpy(inputs_of(columns)).view(8, -1, columns)
    return found.tune(Linear({"matrix": task}, states, module))["matrix"]


@cache
def inputs_of(columns: int) -> Float32:
    """Vectors (tokens, columns) whose channels differ in size and go together."""
    found = correlated(1, columns)[1]
    return found[: len(found) // 8 * 8]


@cache
def task_of(grid_name: str, kind: str = "usual", rows: int = ROWS, columns: int = COLUMNS) -> Task:
    """One of WEIGHTS on a grid, with the statistics of `inputs_of`."""
    grid = find_grid(grid_name)
    weights = WEIGHTS[kind](correlated(rows, columns)[0])
    return Task(weights, grid, statistics_of(columns), shared=shared_of(grid, weights), place=kind)


@cache
def statistics_of(columns: int) -> Moments:
    """Those of `inputs_of`."""
    return moments(inputs_of(columns))


def shared_of(grid: Grid, weights: Float32) -> Params | None:
    return grid.prepare(float(np.abs(weights).max())) or None


def _uneven(weights: Float32) -> Float32:
    """One row huge, one tiny."""
    return weights * np.array([1e4, 1e-7] + [1.0] * (len(weights) - 2), dtype=np.float32)[:, None]


WEIGHTS: Mapping[str, Callable[[Float32], Float32]] = {
    "usual": lambda weights: weights,
    "zero": np.zeros_like,
    "constant": lambda weights: np.full_like(weights, 0.03),
    "uneven": _uneven,
}


@cache
def result_of(algorithm: str, grid_name: str) -> QTensor:
    """The usual matrix; computed once for all tests."""
    return quantize(algorithm, task_of(grid_name))


def keep_of(shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """A mask that prunes about half, one whole row, and one whole group of most grids."""
    keep = np.random.default_rng(5).random(shape) > 0.5
    keep[1] = False
    keep[2, :128] = False
    return keep


def row_step(grid: Grid) -> int:
    """Slices of rows begin at multiples of this."""
    owners = [parameter.rows for parameter in grid.parameters if parameter.scope is Scope.BLOCK]
    return int(np.lcm.reduce([grid.block[0], *owners]))


def cut(whole: QTensor, start: int, stop: int) -> QTensor:
    """Rows [start, stop) of it."""
    params = {p.name: whole.params[p.name][p.slice(start, stop - start)] for p in whole.grid.parameters}
    corrections = tuple(correction.rows(start, stop) for correction in whole.corrections)
    shape = (stop - start, whole.shape[1])
    return QTensor(whole.grid, shape, whole.codes[start:stop], params, whole.column_groups, corrections)


def same(one: QTensor, other: QTensor) -> bool:
    """Equal to the last bit, corrections included."""
    if one.shape != other.shape or one.params.keys() != other.params.keys():
        return False
    pairs = [(one.codes, other.codes), *((one.params[name], other.params[name]) for name in one.params)]
    for mine, yours in zip(one.corrections, other.corrections, strict=True):
        pairs += [(mine.arrays()[name], yours.arrays()[name]) for name in mine.arrays()]
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
