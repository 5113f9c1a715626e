"""Rotations that are learned: descent among the orthogonal matrices on the error of rounding what they turn.

SpinQuant (arXiv 2405.16406) on the weights alone, with the retraction of Li, Fuxin and Todorovic (arXiv 2002.01113):
no activations are needed, and the gradient is that of the actual grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import lcm

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError
from anyquant.core.grid import Grid, Scope
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress
from anyquant.transforms.operations import Operation

BATCH = 6  # matrices looked at in a step
SAMPLE = 2048  # rows, or columns, of each of them
JUDGED = 48  # matrices at most by which start and result are compared
MOMENTUM = 0.9


@dataclass(frozen=True)
class Turned:
    """A matrix that the rotation turns: from the right where it reads what is rotated, that is each of its rows, run by
    run; from the left, run by run of its rows, where it `writes` that. `rows` reads rows [start, stop).
    """

    linear: Linear
    writes: bool
    rows: Callable[[int, int], Float32]

    def extent(self, grid: Grid) -> tuple[int, int]:
        """(how many rows, or columns where it writes; how many of them belong together on the grid)."""
        if not self.writes:
            return self.linear.shape[0], grid.block[0]
        if any(parameter.scope is Scope.ROW for parameter in grid.parameters):
            return self.linear.shape[1], self.linear.shape[1]
        blocks = [parameter.columns for parameter in grid.parameters if parameter.scope is Scope.BLOCK]
        return self.linear.shape[1], lcm(grid.block[1], *blocks)

    def pieces(self, grid: Grid) -> list[tuple[int, int]]:
        """Where they are cut so that about SAMPLE are looked at at once: each as likely as another."""
        length, together = self.extent(grid)
        count = -(-length // max(SAMPLE, together))
        cuts = [length // together * index // count * together for index in range(count)] + [length]
        return list(pairwise(cuts))

    def read(self, start: int, stop: int) -> Float32:
        """Rows, or columns where it writes, [start, stop)."""
        if not self.writes:
            return self.rows(start, stop)
        height = self.linear.shape[0]
        part: Float32 = np.empty((height, stop - start), dtype=np.float32)
        for first in range(0, height, SAMPLE):
            last = min(first + SAMPLE, height)
            part[first:last] = self.rows(first, last)[:, start:stop]
        return part


@dataclass(frozen=True)
class Problem:
    """The rotation that `start` is to become, and the matrices that it turns.

    `grid` stands for those that they will lie on. `steps` of descent, drawn from `seed`. `rate`: radians by which a
    channel turns in the first of them, root mean square; it falls to 0 linearly.
    """

    start: Operation
    turned: Sequence[Turned]
    grid: Grid
    steps: int
    rate: float
    seed: tuple[int, ...]

    @property
    def order(self) -> int:
        return self.start.size

    @cached_property
    def weights(self) -> float:
        """About how many are looked at in a step."""
        sizes = [one.linear.weights / len(one.pieces(self.grid)) for one in self.turned]
        return min(BATCH, len(sizes)) * float(np.mean(sizes)) if sizes else 0.0


@dataclass(frozen=True)
class Learned:
    """An orthogonal matrix, float32, and the cost of rounding under it as a part of that under the start."""

    matrix: Float32
    ratio: float


@dataclass(frozen=True)
class _Sample:
    """One of `count` pieces of a matrix: rows, or columns, [start, stop)."""

    turned: Turned
    start: int
    stop: int
    count: int


def learn(problem: Problem, progress: Progress) -> Learned:
    """A rotation under which rounding costs less; the start, with ratio 1, where none was found.

    The cost is the sum over all weights of the squared error of rounding, relative to the mean square of the matrix.
    Memory: a few samples of a matrix, ten matrices (order, order). The same for the same seed. In each step `progress`
    is advanced by `problem.weights`. Raises BadInputError when a weight is not finite.
    """
    start = problem.start.apply_down(np.eye(problem.order, dtype=np.float32))
    if not problem.turned:
        return Learned(start, 1.0)
    rng = np.random.default_rng(problem.seed)
    judged = _draw(problem, JUDGED, rng)
    before = sum(_cost(problem, sample, start)[0] for sample in judged)
    learned = _signs(problem, rng) * orthogonal(_descend(problem, start, rng, progress))
    after = sum(_cost(problem, sample, learned)[0] for sample in judged)
    return Learned(learned, after / before) if after < before else Learned(start, 1.0)


def _draw(problem: Problem, count: int, rng: np.random.Generator) -> list[_Sample]:
    """A piece of each of `count` different matrices, or of all when there are fewer."""
    samples, there = [], len(problem.turned)
    for index in np.sort(rng.choice(there, min(count, there), replace=False)):
        turned = problem.turned[index]
        pieces = turned.pieces(problem.grid)
        start, stop = pieces[rng.integers(len(pieces))]
        samples.append(_Sample(turned, start, stop, len(pieces)))
    return samples


def _descend(problem: Problem, rotation: Float32, rng: np.random.Generator, progress: Progress) -> Float32:
    """Gradient descent with momentum. A step is a Cayley transform (I - A / 2)^-1 (I + A / 2) of a skew matrix A.

    Each step sees the turned channels with other signs. Grids have one level more below zero than above, so that the
    mean error is not zero; a rotation that made use of it would lay the strongest direction of the activations on
    (1, 1, ..., 1), along which these errors add up (seen: 9 times the loss of a Hadamard matrix at 2 bits).
    """
    order = problem.order
    identity, momentum = np.eye(order, dtype=np.float32), np.zeros((order, order), dtype=np.float32)
    for step in range(problem.steps):
        gradient = np.zeros((order, order), dtype=np.float32)
        signs = _signs(problem, rng)
        for sample in _draw(problem, BATCH, rng):
            gradient += signs * _cost(problem, sample, signs * rotation)[1]
        progress.advance(problem.weights)
        uphill = gradient @ rotation.T
        # in these coordinates the gradient does not change with the point: momentum needs no transport
        momentum *= np.float32(MOMENTUM)
        momentum += np.float32(1 - MOMENTUM) * (uphill - uphill.T)
        size = float(np.sqrt(np.square(momentum, dtype=np.float64).sum() / order))
        if size == 0:
            continue
        half = np.float32(-problem.rate * (1 - step / problem.steps) / size / 2) * momentum
        rotation = np.linalg.solve(identity - half, (identity + half) @ rotation)
    return rotation


def _signs(problem: Problem, rng: np.random.Generator) -> Float32:
    """+1 or -1 for each channel, (order, 1)."""
    return (2 * rng.integers(0, 2, (problem.order, 1)) - 1).astype(np.float32)


def _cost(problem: Problem, sample: _Sample, rotation: Float32) -> tuple[float, Float32]:
    """|Q - M|^2 / mean square, M the turned sample and Q its rounding; and its gradient by the rotation.

    Q minimises the error over scales and codes, so that its own change adds nothing to the gradient, which is
    2 (M - Q): no straight-through estimate is needed.
    """
    turned, order = sample.turned, problem.order
    weights = turned.read(sample.start, sample.stop)
    power = float(np.square(weights, dtype=np.float64).mean())
    if not np.isfinite(power):
        raise BadInputError(f"{turned.linear.name}: a weight is not finite; the model is damaged")
    # runs of `order` channels, which are columns (size, order, any) where it writes and rows (any, order) where not
    runs = weights.reshape(-1, order, weights.shape[1] if turned.writes else 1)
    mixed = np.matmul(rotation, runs) if turned.writes else runs[:, :, 0] @ rotation.T
    error = rounding_error(mixed.reshape(weights.shape), problem.grid).reshape(runs.shape)
    if turned.writes:
        gradient = np.matmul(error, runs.transpose(0, 2, 1)).sum(axis=0)
    else:
        gradient = error[:, :, 0].T @ runs[:, :, 0]
    scale = sample.count / max(power, 1e-30)
    return scale * float(np.square(error, dtype=np.float64).sum()), np.float32(2 * scale) * gradient


def rounding_error(weights: Float32, grid: Grid) -> Float32:
    """What rounding takes away: weights minus what the grid makes of them."""
    shared = grid.prepare(float(np.abs(weights).max(initial=0.0))) if grid.tensor_wide else None
    params, codes = grid.quantize(weights, None, shared)
    error: Float32 = weights - grid.decode(codes, params)
    return error


def orthogonal(matrix: Float32) -> Float32:
    """The orthogonal matrix nearest to one that is nearly orthogonal: Newton's iteration, in float64."""
    found: npt.NDArray[np.float64] = matrix.astype(np.float64)
    for _ in range(3):
        found = 1.5 * found - 0.5 * found @ (found.T @ found)
    nearest: Float32 = found.astype(np.float32)
    return nearest
