"""Roundings and scales of a matrix while they are learned by signed gradients (SignRound, arXiv 2309.05516).

A weight w is rounded to the level nearest to w + V * step, V in [-1/2, 1/2], so that either neighbour can be had. The
gradient of the loss for the value is taken for that of w + V * step (straight through), and only its sign is used.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anyquant.algorithms.base import Task
from anyquant.algorithms.on_grid import lattice_of, parameter_span
from anyquant.core.corrections import Mask
from anyquant.core.dtypes import Float32
from anyquant.core.extras import require
from anyquant.core.grid import Codes, Grid, Lattice, Params, Scope
from anyquant.core.qtensor import QTensor

INNER = 0.9  # how near to the edge of what is rounded to its start value a weight may begin that would not be
WIDEST, NARROWEST = 1.5, 0.5  # bounds of the factors of scales


class Offsets(Protocol):
    """A matrix that is being learned; everything but its result is torch."""

    def values(self) -> Any:
        """The weights (rows, in) that it stands for now."""
        ...

    def step(self, gradient: Any, rate: float) -> None:
        """Move against the signs of the loss's gradient (rows, in) for what `values` gave last."""
        ...

    def result(self) -> QTensor:
        """The matrix as it is now."""
        ...


@dataclass(frozen=True)
class Learned:
    """What is learned of a matrix; scales only where they are free."""

    roundings: bool
    scales: bool


def offsets_of(task: Task, start: QTensor, learned: Learned) -> Offsets:
    """What learns roundings of `task` from `start`, and a factor for each scale."""
    lattice = lattice_of(task.grid, start.params, task.shape[0])
    if lattice is not None:
        scales = learned.scales and scales_free(task.grid, task.shared, lattice)
        return LatticeOffsets(task, start, lattice, Learned(learned.roundings, scales))
    return VectorOffsets(task, start) if task.grid.vector > 1 and learned.roundings else Fixed(start)


def scales_free(grid: Grid, shared: Params | None, lattice: Lattice) -> bool:
    """Whether scales belong to one row each, and levels to none: what a factor per row and block can change."""
    free = [p for p in grid.parameters if p.name not in (shared or {})]
    single = all(p.rows == 1 and p.values == 1 and p.scope is not Scope.TENSOR for p in free)
    return bool(free) and single and lattice.levels.ndim == 1


class Fixed:
    """A matrix on a grid without steps to choose between, such as float16."""

    def __init__(self, start: QTensor) -> None:
        self._start = start
        self._values = require("torch").from_numpy(start.decode())

    def values(self) -> Any:
        return self._values

    def step(self, gradient: Any, rate: float) -> None:
        """There is nothing to learn."""

    def result(self) -> QTensor:
        return self._start


class LatticeOffsets:
    """On a scalar grid. `latent` are the weights before rounding and `offset` is V, (rows, in); in units of levels.

    `factor` (rows, blocks) multiplies scale and shift. What comes of that is rounded to parameters that the grid
    stores, by fitting them to the values wanted, before anything is made of it.
    """

    def __init__(self, task: Task, start: QTensor, lattice: Lattice, learned: Learned) -> None:
        torch = self._torch = require("torch")
        self._task, self._start, self._lattice, self._learned = task, start, lattice, learned
        self._width = min(lattice.width, task.shape[1])
        blocks = -(-task.shape[1] // self._width)
        self._scale, self._shift = (
            self._spread(torch.tensor(np.broadcast_to(array[: task.shape[0]], (task.shape[0], blocks))))
            for array in (lattice.scale, lattice.shift)
        )
        self._levels = torch.from_numpy(np.ascontiguousarray(lattice.levels))
        self._middles = (self._levels[..., 1:] + self._levels[..., :-1]) / 2
        self._keep = None if task.keep is None else torch.from_numpy(task.keep)
        self._sign = self._scale.sign()
        self.latent, self._gap = self._begin()
        self.offset = torch.zeros(task.shape, dtype=torch.float32)
        self.factor = torch.ones((task.shape[0], blocks), dtype=torch.float32)
        self._last = self._inside = None

    def values(self) -> Any:
        place = self._places(self._shifted())
        values = self._at(self._levels, place) * self._scale + self._shift
        if self._learned.scales and bool((self.factor != 1).any()):
            params, codes = self._projected(values * self._spread(self.factor))
            values = self._torch.from_numpy(self._task.grid.decode(codes, params))
        self._last = values if self._keep is None else values * self._keep
        return self._last

    def step(self, gradient: Any, rate: float) -> None:
        torch, levels = self._torch, self._levels
        if self._learned.roundings:
            wanted = self._shifted()
            # beyond the levels by half a step and more, the value does not depend on what is rounded
            lowest, highest = 1.5 * levels[..., :1] - 0.5 * levels[..., 1:2], 1.5 * levels[..., -1:]
            inside = (wanted >= lowest) & (wanted <= highest - 0.5 * levels[..., -2:-1])
            self.offset.sub_(torch.sign(gradient * self._sign) * inside, alpha=rate).clamp_(-0.5, 0.5)
        if self._learned.scales:
            # with the codes as they are, a value is proportional to the factor
            pull = self._sums(gradient * self._last)
            self.factor.sub_(torch.sign(pull), alpha=rate).clamp_(NARROWEST, WIDEST)

    def result(self) -> QTensor:
        task, place = self._task, self._places(self._shifted())
        params, codes = self._start.params, self._lattice.codes[place.numpy()]
        if self._learned.scales and bool((self.factor != 1).any()):
            values = self._at(self._levels, place) * self._scale + self._shift
            params, codes = self._projected(values * self._spread(self.factor))
        return quantized(task, codes, params)

    def _begin(self) -> tuple[Any, Any]:
        """Weights in units of levels, where they are not rounded as in `start` moved to where they are; and the
        distance of the levels around them, (rows, in) or 1."""
        torch, task = self._torch, self._task
        weights = torch.from_numpy(task.weights)
        scale = torch.where(self._scale == 0, torch.ones_like(self._scale), self._scale)
        latent, taken = (
            torch.where(self._scale == 0, torch.zeros_like(weights), (given - self._shift) / scale)
            for given in (weights, torch.from_numpy(task.grid.decode(self._start.codes, self._start.params)))
        )
        place = self._places(taken)
        level = self._at(self._levels, place)
        endless = torch.full_like(self._levels[..., :1], torch.inf)
        below = self._at(torch.cat([-endless, self._middles], dim=-1), place)
        above = self._at(torch.cat([self._middles, endless], dim=-1), place)
        inner = torch.maximum(torch.minimum(latent, level + INNER * (above - level)), level - INNER * (level - below))
        latent = torch.where(self._places(latent) == place, latent, inner)
        if self._lattice.uniform:
            return latent, 1.0
        lower = (self._search(self._levels, latent) - 1).clamp(0, self._levels.shape[-1] - 2)
        return latent, self._at(self._levels, lower + 1) - self._at(self._levels, lower)

    def _shifted(self) -> Any:
        return self.latent + self.offset * self._gap

    def _places(self, wanted: Any) -> Any:
        """Which levels are nearest; between consecutive integers, ties go to the even one, as grids have it."""
        if self._lattice.uniform:
            lowest, highest = float(self._levels[0]), float(self._levels[-1])
            return (wanted.round().clamp(lowest, highest) - lowest).long()
        return self._search(self._middles, wanted)

    def _search(self, edges: Any, wanted: Any) -> Any:
        return self._torch.searchsorted(edges, wanted.contiguous())

    def _at(self, table: Any, place: Any) -> Any:
        return table[place] if table.ndim == 1 else table.gather(1, place)

    def _spread(self, blocks: Any) -> Any:
        """(rows, blocks) to (rows, in), or what broadcasts to it."""
        if blocks.shape[1] == 1:
            return blocks
        return blocks.repeat_interleave(self._width, dim=1)[:, : self._task.shape[1]]

    def _sums(self, weights: Any) -> Any:
        """(rows, in) to the sums of each block, (rows, blocks)."""
        rows, columns = weights.shape
        short = -columns % self._width
        return self._torch.nn.functional.pad(weights, (0, short)).view(rows, -1, self._width).sum(dim=2)

    def _projected(self, wanted: Any) -> tuple[Params, Codes]:
        """The stored parameters that come nearest to the values wanted, and codes."""
        task, values = self._task, np.ascontiguousarray(wanted.numpy())
        params = task.grid.fit(values, task.importance, task.shared)
        return params, task.grid.encode(values, params)


class VectorOffsets:
    """On a grid of codes for several weights, whose parameters stay. A step is what rounding errors would be spread
    over evenly, sqrt(12) times their root mean square, in each span of columns that has its own parameters."""

    def __init__(self, task: Task, start: QTensor) -> None:
        torch = self._torch = require("torch")
        self._task, self._start = task, start
        grid, vector = task.grid, task.grid.vector
        nearest = grid.encode(task.weights, start.params)
        moved = np.repeat(nearest != start.codes, vector, axis=1)
        base = np.where(moved, grid.decode(start.codes, start.params), task.weights)
        self._base = torch.from_numpy(base)
        error = task.weights - grid.decode(nearest, start.params)
        width = parameter_span(grid, task.shape[1])
        starts = np.arange(0, task.shape[1], width)
        squares = np.add.reduceat(error**2, starts, axis=1) / np.diff(np.append(starts, task.shape[1]))
        steps = np.repeat(np.sqrt(12 * squares), width, axis=1)[:, : task.shape[1]]
        self._steps = torch.from_numpy(steps.astype(np.float32))
        self.offset = torch.zeros(task.shape, dtype=torch.float32)

    def values(self) -> Any:
        values: Float32 = self._task.grid.decode(self._codes(), self._start.params)
        if self._task.keep is not None:
            values = np.where(self._task.keep, values, np.float32(0))
        return self._torch.from_numpy(values)

    def step(self, gradient: Any, rate: float) -> None:
        self.offset.sub_(self._torch.sign(gradient), alpha=rate).clamp_(-0.5, 0.5)

    def result(self) -> QTensor:
        return quantized(self._task, self._codes(), self._start.params)

    def _codes(self) -> Codes:
        wanted = self._base + self.offset * self._steps
        return self._task.grid.encode(np.ascontiguousarray(wanted.numpy()), self._start.params)


def quantized(task: Task, codes: npt.NDArray[Any], params: Params) -> QTensor:
    """With the mask, where weights were pruned."""
    corrections = () if task.keep is None else (Mask(task.keep),)
    typed = codes.astype(task.grid.code_dtype, copy=False)
    return QTensor(task.grid, task.shape, typed, params, corrections=corrections)
