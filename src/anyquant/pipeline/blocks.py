"""Row blocks: the pieces in which every tensor is read, quantized, packed and verified, so that memory stays flat."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

import numpy as np

from anyquant.core.checkpoint import read_tensor, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError
from anyquant.core.linear import Linear
from anyquant.core.plan import Unit
from anyquant.grids import grid as find_grid
from anyquant.pipeline.planner import Job

# 2 MB of float32: block, result and temporaries of one thread stay in the second-level cache
BLOCK_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Block:
    """Rows [first, first + rows) of one Linear of a unit."""

    unit: Unit
    linear: Linear
    first: int
    rows: int

    @property
    def weights(self) -> int:
        return self.rows * self.linear.view.columns

    @property
    def key(self) -> tuple[str, int]:
        return self.linear.name, self.first


def blocks(job: Job) -> Iterator[Block]:
    """Every row of every Linear once, in file order."""
    for unit in job.layout.units:
        for name in unit.linears:
            linear = job.architecture.by_name[name]
            total, columns = linear.shape
            together = lcm(unit.row_multiple, find_grid(unit.grid).block[0])
            step = max(BLOCK_WEIGHTS // columns // together, 1) * together
            if linear.view.transposed:  # its rows are columns of the file: any part of it costs all of it
                step = total
            for first in range(0, total, step):
                yield Block(unit, linear, first, min(step, total - first))


def read_block(job: Job, block: Block) -> Float32:
    """The source weights of a block, float32. Raises BadInputError when a value is not finite."""
    weights = read_view(job.checkpoint, block.linear.view, block.first, block.first + block.rows)
    check_finite(weights, f"tensor {block.linear.view.tensor} ({block.linear.name})", block.first)
    return weights


def read_carried(job: Job, name: str) -> Float32:
    """The source values of a carried tensor, flat float32. Raises BadInputError when a value is not finite."""
    carried = job.architecture.carried_by_name[name]
    values = read_tensor(job.checkpoint, carried.tensor).reshape(-1)[carried.start : carried.start + carried.length]
    check_finite(values, f"tensor {carried.tensor} ({name})")
    return values


def check_finite(values: Float32, where: str, first_row: int = 0) -> None:
    """Raise BadInputError with the count and the first place of a value that is NaN or infinite."""
    # one sum is cheaper than a mask: it is finite only where all values are, and rarely not where they are
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(values.sum()):
            return
    bad = np.argwhere(~np.isfinite(values))
    if len(bad) == 0:
        return
    place = tuple(int(i) for i in bad[0])
    value = values[place]
    shown = (place[0] + first_row, *place[1:])
    raise BadInputError(f"{where}: {len(bad)} values are not finite, the first is {value} at {shown}")
