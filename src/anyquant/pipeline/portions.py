"""The parts of a model that a target decides on, their candidates with exact bytes, and the errors of rounding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anyquant.core.arithmetic import DTYPES
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.linear import Linear
from anyquant.formats.base import Rules
from anyquant.grids import grid as find_grid
from anyquant.pipeline.blocks import BLOCK_WEIGHTS, Block
from anyquant.pipeline.choice import Wanted, rules_of
from anyquant.pipeline.executors.threads import run_all
from anyquant.pipeline.planner import Job, Model, draft_job, refuse_unknown
from anyquant.pipeline.recipe import Recipe
from anyquant.pipeline.rows import Direct, Importance

METHODS = ("gradient", "forward")
DRAWS = 4  # 10 passes forward in all: 1, 1 again on the way back, 2 for each draw


@dataclass(frozen=True)
class Question:
    """`documents` are token ids, those of *select*; `statistics` steer the rounding. `candidates` are grid names, by
    default those of the target."""

    model: Model
    target: Rules
    documents: Sequence[Sequence[int]]
    statistics: Importance
    candidates: tuple[str, ...] = ()
    method: str = METHODS[0]
    draws: int = DRAWS
    seed: int = 0
    dtype: str = DTYPES[0]


@dataclass(frozen=True)
class Cell:
    """One way to store a part: the grid, bytes in the artifact, the loss in nats per token and its standard error."""

    grid: str
    nbytes: int
    loss: float
    error: float


@dataclass(frozen=True)
class Portion:
    """What is decided together; `stored` is the grid that holds it as it is. Cells by size."""

    name: str
    role: str
    block: int | None
    expert: int | None
    linears: tuple[str, ...]
    weights: int
    stored: str
    cells: tuple[Cell, ...]

    def cell(self, grid: str) -> Cell:
        return next(cell for cell in self.cells if cell.grid == grid)


def portions_of(question: Question) -> tuple[Portion, ...]:
    """All parts with their candidates and exact bytes; losses are not known yet (NaN)."""
    model, target = question.model, question.target
    refuse_unknown(question.candidates, target, model.architecture)
    ties = target.ties(model.architecture)
    together: dict[str, list[Linear]] = {}
    for linear in model.architecture.linears:
        if target.candidates(linear):
            together.setdefault(ties.get(linear.name, linear.name), []).append(linear)
    options: dict[str, tuple[str, ...]] = {}
    for name, linears in together.items():
        own = [_fitting(question, linear) for linear in linears]
        shared = [grid for grid in own[0] if all(grid in other for other in own)]
        if len(shared) > 1:
            options[name] = tuple(shared)
    if not options:
        raise UsageError(f"{target.name}: nothing of this model fits {', '.join(question.candidates) or 'its grids'}")
    sizes = _sizes(question, together, options)
    return tuple(_portion(question, name, together[name], options[name], sizes) for name in options)


def _portion(
    question: Question,
    name: str,
    linears: Sequence[Linear],
    grids: Sequence[str],
    sizes: Mapping[tuple[str, str], int],
) -> Portion:
    cells = [Cell(grid, sizes[name, grid], float("nan"), 0.0) for grid in grids]
    first = linears[0]
    return Portion(
        name=name,
        role="+".join(dict.fromkeys(linear.role.value for linear in linears)),
        block=first.block,
        expert=first.expert,
        linears=tuple(linear.name for linear in linears),
        weights=sum(linear.weights for linear in linears),
        stored=question.model.stored_grid(first),
        cells=tuple(sorted(cells, key=lambda cell: cell.nbytes)),
    )


def _fitting(question: Question, linear: Linear) -> list[str]:
    """Candidates that hold the Linear, or what the target takes in their place, and the type it is stored in."""
    found: dict[str, None] = {}
    for name in (*(question.candidates or question.target.candidates(linear)), question.model.stored_grid(linear)):
        fits: str | None = name
        while fits is not None and find_grid(fits).refuses(linear.shape) is not None:
            fits = question.target.fallback(fits, linear)
        if fits is not None:
            found.setdefault(fits)
    return list(found)


def _sizes(
    question: Question, together: Mapping[str, Sequence[Linear]], options: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], int]:
    """(portion, grid) -> bytes from the start of its tensors to what follows them, in plans that use the grid."""
    found: dict[tuple[str, str], int] = {}
    for grid in dict.fromkeys(grid for grids in options.values() for grid in grids):
        choice = {name: grid for name, grids in options.items() if grid in grids}
        spans = _spans(_job(question, together, choice))
        for name in choice:
            found[name, grid] = sum(spans[linear.name] for linear in together[name])
    return found


def _job(question: Question, together: Mapping[str, Sequence[Linear]], choice: Mapping[str, str]) -> Job:
    """The chosen portions on their grids, all else as stored. Raises UnsupportedError when the target cannot hold that,
    unless it cannot hold this model at all yet."""
    wanted = {one.name: Wanted(grid) for name, grid in choice.items() for one in together[name]}
    rules = rules_of(question.model.architecture, wanted)
    job, refusal = draft_job(question.model, question.target, Recipe(rules=rules), True)
    if refusal and not draft_job(question.model, question.target, Recipe(), True)[1]:
        raise UnsupportedError(refusal)
    return job


def _spans(job: Job) -> dict[str, int]:
    """Linear name -> bytes of its parts with the padding behind them; a tensor of several is counted at the first."""
    after: dict[str, int] = {}
    for file in job.layout.files:
        starts = sorted(file.parts, key=lambda part: part.offset)
        ends = [*(part.offset for part in starts[1:]), file.nbytes]
        after |= {part.name: end - part.offset for part, end in zip(starts, ends, strict=False)}
    spans = {}
    for unit in job.layout.units:
        for place, linear in enumerate(unit.linears):
            spans[linear] = 0 if place else sum(after[part] for part in unit.parts)
    return spans


class RoundingErrors:
    """The errors of Linears on their candidates: those that rounding really makes, with the importance given."""

    def __init__(self, question: Question, portions: Sequence[Portion], threads: int) -> None:
        self.question, self.portions, self._threads = question, portions, threads
        self._architecture = question.model.architecture
        self.grids = {
            linear: tuple(cell.grid for cell in one.cells if cell.grid != one.stored)
            for one in portions
            for linear in one.linears
        }
        together = {one.name: [self._architecture.by_name[linear] for linear in one.linears] for one in portions}
        self._jobs: dict[str, Job] = {}
        for grid in dict.fromkeys(grid for grids in self.grids.values() for grid in grids):
            choice = {one.name: grid for one in portions if any(cell.grid == grid for cell in one.cells)}
            self._jobs[grid] = _job(question, together, choice)
        self._rows = {grid: Direct(job, question.statistics) for grid, job in self._jobs.items()}
        self._units = {
            grid: {linear: unit for unit in job.layout.units for linear in unit.linears}
            for grid, job in self._jobs.items()
        }
        any_job = next(iter(self._jobs.values()))
        portion_bytes = sum(_spans(any_job)[linear] for linear in self.grids)
        self.fixed = any_job.layout.nbytes - portion_bytes

    def __call__(self, linear: Linear, first: int, rows: int) -> Float32:
        """(candidates, rows, in)."""
        return self.of(linear, first, rows, self.grids[linear.name])

    def of(self, linear: Linear, first: int, rows: int, grids: Sequence[str]) -> Float32:
        """On some grids."""
        weights = read_view(self.question.model.checkpoint, linear.view, first, first + rows)
        found = np.empty((len(grids), *weights.shape), dtype=np.float32)

        def fill(piece: tuple[int, int, int]) -> None:
            index, start, count = piece
            unit = self._units[grids[index]][linear.name]
            quantized = self._rows[grids[index]].rows(Block(unit, linear, first + start, count))
            at = slice(start, start + count)
            np.subtract(quantized.decode(), weights[at], out=found[index, at])

        run_all(fill, self._blocks(linear, grids, rows), self._threads, lambda piece, result: None)
        return found

    def _blocks(self, linear: Linear, grids: Sequence[str], rows: int) -> Iterator[tuple[int, int, int]]:
        for index, grid in enumerate(grids):
            high = find_grid(grid).block[0]
            step = rows if linear.view.transposed else max(1, BLOCK_WEIGHTS // linear.shape[1] // high) * high
            for start in range(0, rows, step):
                yield index, start, min(step, rows - start)

    def squares(self, linear: Linear) -> dict[str, float]:
        """The weighted squared error on each candidate: each channel counts as its mean squared activation."""
        importance = self.question.statistics.importance(linear)
        weight = np.ones(linear.shape[1], np.float32) if importance is None else importance
        grids, total = self.grids[linear.name], np.zeros(len(self.grids[linear.name]))
        step = max(1, BLOCK_WEIGHTS // linear.shape[1] // 128) * 128
        for first in range(0, linear.shape[0], step):
            errors = self(linear, first, min(step, linear.shape[0] - first))
            total += np.einsum("crk,crk,k->c", errors, errors, weight, optimize=True)
        return dict(zip(grids, total.tolist(), strict=True))
