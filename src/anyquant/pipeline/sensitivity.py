"""What each part of a model loses on each grid that its target may store it on: one pass, saved and used again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from glob import escape
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from anyquant import __version__
from anyquant.calibrate.inner_products import Products, inner_products
from anyquant.calibrate.variants import Variant, divergences, share
from anyquant.contract.allocate import Candidate, Choice, Group
from anyquant.contract.sensitivity import Estimate, affordable, carried_over, from_documents, from_products
from anyquant.core.arithmetic import DTYPES
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress
from anyquant.formats.base import Rules
from anyquant.grids import grid as find_grid
from anyquant.models.streaming import BATCH_TOKENS, StreamedModel
from anyquant.pipeline.blocks import BLOCK_WEIGHTS, Block
from anyquant.pipeline.executors.threads import run_all
from anyquant.pipeline.planner import Job, Model, draft_job
from anyquant.pipeline.recipe import Recipe, Rule
from anyquant.pipeline.rows import Direct, Importance
from anyquant.pipeline.work import source_identity
from anyquant.store.strict_json import parse_json
from anyquant.store.system import reading, writing

METHODS = ("gradient", "forward")
DRAWS = 8  # 18 passes forward in all: 1, 1 again on the way back, 2 for each draw
MOST_FORWARDS = 20.0
VERSION = 1


@dataclass(frozen=True)
class Question:
    """`documents` are token ids, those of *select*; `statistics` steer the rounding. `candidates` are grid names, by
    default those of the target. `transforms` says what was done to the model's checkpoint, "" for nothing."""

    model: Model
    target: Rules
    documents: Sequence[Sequence[int]]
    statistics: Importance
    candidates: tuple[str, ...] = ()
    method: str = METHODS[0]
    draws: int = DRAWS
    seed: int = 0
    transforms: str = ""
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
    stored: str
    cells: tuple[Cell, ...]

    def cell(self, grid: str) -> Cell:
        return next(cell for cell in self.cells if cell.grid == grid)


@dataclass(frozen=True)
class Sensitivity:
    """`fixed` are the bytes of the artifact outside the portions; `forwards` what it cost in passes over the text.

    `unseen` names the Linears whose loss had to be assumed, as no token reached the expert.
    """

    identity: str
    method: str
    documents: int
    tokens: int
    forwards: float
    fixed: int
    portions: tuple[Portion, ...]
    unseen: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """For `contract.allocate`."""
        return tuple(
            Group(one.name, tuple(Candidate(cell.grid, cell.nbytes, cell.loss) for cell in one.cells))
            for one in self.portions
        )

    @property
    def grids(self) -> tuple[str, ...]:
        """All candidates, by their average size."""
        sizes: dict[str, list[float]] = {}
        for portion in self.portions:
            most = max(cell.nbytes for cell in portion.cells)
            for cell in portion.cells:
                sizes.setdefault(cell.grid, []).append(cell.nbytes / most)
        return tuple(sorted(sizes, key=lambda grid: sum(sizes[grid]) / len(sizes[grid])))

    @cached_property
    def by_name(self) -> Mapping[str, Portion]:
        return {portion.name: portion for portion in self.portions}

    def rules(self, choice: Choice) -> tuple[Rule, ...]:
        """The choice as rules of a recipe, one for each Linear."""
        return tuple(
            Rule(pattern=escape(linear), grid=choice[portion.name])
            for portion in self.portions
            for linear in portion.linears
        )

    def loss(self, choice: Choice) -> float:
        """The predicted KL of a whole plan: cross terms between parts are small beside the parts."""
        return sum(portion.cell(choice[portion.name]).loss for portion in self.portions)


def sensitivities(
    question: Question, folder: Path, threads: int, progress: Progress, saved: Path | None = None
) -> Sensitivity:
    """The answer, from the file `saved` when it is about the same question, else by one pass; it is then saved there.

    Temporary files lie in `folder`. Raises UsageError for unknown grids or methods and when nothing may be quantized,
    BadInputError for a damaged file, and as `inner_products` and `divergences`.
    """
    if question.method not in METHODS:
        raise UsageError(f"unknown method {question.method!r}; known: {', '.join(METHODS)}")
    portions = portions_of(question)
    identity = _identity(question, portions)
    if saved is not None and saved.exists():
        found = load(saved)
        if found.identity == identity:
            progress.say(f"sensitivities from {saved}")
            return found
    with TemporaryDirectory(dir=folder, prefix=".sensitivity-") as scratch:
        ask = _by_gradients if question.method == METHODS[0] else _by_forwards
        found = ask(_Errors(question, portions, threads), identity, Path(scratch), progress)
    if found.unseen:
        progress.say(f"warning: no token reached {len(found.unseen)} expert matrices: their loss is that of the others")
    if saved is not None:
        save(saved, found)
    return found


def portions_of(question: Question) -> tuple[Portion, ...]:
    """All parts with their candidates and exact bytes; losses are not known yet (NaN)."""
    model, target = question.model, question.target
    for name in question.candidates:
        find_grid(name)
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
    return tuple(
        Portion(
            name,
            "+".join(dict.fromkeys(linear.role.value for linear in together[name])),
            together[name][0].block,
            together[name][0].expert,
            tuple(linear.name for linear in together[name]),
            model.stored_grid(together[name][0]),
            tuple(
                sorted(
                    (Cell(grid, sizes[name, grid], float("nan"), 0.0) for grid in grids),
                    key=lambda cell: cell.nbytes,
                )
            ),
        )
        for name, grids in options.items()
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
        spans = _spans(uniform_job(question, together, choice))
        for name in choice:
            found[name, grid] = sum(spans[linear.name] for linear in together[name])
    return found


def uniform_job(question: Question, together: Mapping[str, Sequence[Linear]], choice: Mapping[str, str]) -> Job:
    """A job with the chosen portions on their grids, all else as stored."""
    rules = tuple(Rule(pattern=escape(one.name), grid=grid) for name, grid in choice.items() for one in together[name])
    return draft_job(question.model, question.target, Recipe(rules=rules), True)[0]


def _spans(job: Job) -> dict[str, int]:
    """Linear name -> bytes of its parts with the padding behind them; a tensor of several is counted at the first."""
    after: dict[str, int] = {}
    for file in job.layout.files:
        starts = sorted(file.parts, key=lambda part: part.offset)
        ends = [*(part.offset for part in starts[1:]), file.nbytes]
        after |= {part.name: end - part.offset for part, end in zip(starts, ends, strict=True)}
    spans = {}
    for unit in job.layout.units:
        for place, linear in enumerate(unit.linears):
            spans[linear] = 0 if place else sum(after[part] for part in unit.parts)
    return spans


class _Errors:
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
            self._jobs[grid] = uniform_job(question, together, choice)
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


def _streamed(question: Question) -> StreamedModel:
    architecture = question.model.architecture
    batch = 1 if architecture.dimensions.experts or any(one.expert is not None for one in architecture.linears) else 0
    return StreamedModel(
        question.model.checkpoint, architecture, batch_tokens=batch or BATCH_TOKENS, dtype=question.dtype
    )


def _by_gradients(errors: _Errors, identity: str, folder: Path, progress: Progress) -> Sensitivity:
    question = errors.question
    products = inner_products(
        _streamed(question),
        question.documents,
        {name: len(grids) for name, grids in errors.grids.items()},
        errors,
        folder,
        question.draws,
        progress,
        seed=question.seed,
    )
    portions = tuple(_filled(portion, _estimates(portion, errors, products)) for portion in errors.portions)
    portions = _assume(portions, products.unseen)
    return _answer(
        question, identity, portions, products.forwards, errors.fixed, len(products.lengths), products.unseen
    )


def _estimates(portion: Portion, errors: _Errors, products: Products) -> dict[str, Estimate]:
    found = {}
    for cell in portion.cells:
        if cell.grid != portion.stored:
            several = [products.values[one][errors.grids[one].index(cell.grid)] for one in portion.linears]
            found[cell.grid] = from_products(np.sum(several, axis=0), products.lengths)
    return found


def _filled(portion: Portion, estimates: Mapping[str, Estimate]) -> Portion:
    """What is stored as it is loses nothing."""
    nothing = Estimate(0.0, 0.0)
    cells = tuple(
        replace(cell, loss=(found := estimates.get(cell.grid, nothing)).loss, error=found.error)
        for cell in portion.cells
    )
    return replace(portion, cells=cells)


def _assume(portions: tuple[Portion, ...], unseen: Sequence[str]) -> tuple[Portion, ...]:
    """Experts that no token reached lose what the others of their block and role lose on average."""
    if not unseen:
        return portions
    result = []
    for portion in portions:
        if not set(portion.linears) <= set(unseen):
            result.append(portion)
            continue
        others = [
            one
            for one in portions
            if (one.block, one.role) == (portion.block, portion.role) and not set(one.linears) & set(unseen)
        ] or [one for one in portions if one.role == portion.role and not set(one.linears) & set(unseen)]
        estimates = {
            cell.grid: Estimate(float(np.mean([one.cell(cell.grid).loss for one in others])), cell.error)
            for cell in portion.cells
            if others
        }
        result.append(_filled(portion, estimates))
    return tuple(result)


def _by_forwards(errors: _Errors, identity: str, folder: Path, progress: Progress) -> Sensitivity:
    question, architecture = errors.question, errors.question.model.architecture
    model = _streamed(question)
    variants: dict[str, list[Portion]] = {}
    for portion in errors.portions:  # the experts of a block are measured together
        name = portion.name if portion.expert is None else f"blocks.{portion.block}.experts.{portion.role}"
        variants.setdefault(name, []).append(portion)
    asked = [
        Variant(name, tuple(architecture.by_name[linear] for one in members for linear in one.linears))
        for name, members in variants.items()
    ]
    shares = [max(share(variant, model.blocks), 1 / (4 * model.blocks)) for variant in asked]
    count = affordable(shares, len(question.documents), MOST_FORWARDS - 1)
    documents = question.documents[:count]
    probes = {
        linear: _probe(portion, architecture.by_name[linear].shape)
        for portion in errors.portions
        for linear in portion.linears
    }

    def changed(linear: Linear) -> Float32:
        error = errors.of(linear, 0, linear.shape[0], (probes[linear.name],))[0]
        return np.add(error, read_view(question.model.checkpoint, linear.view, 0, linear.shape[0]), out=error)

    found = divergences(model, documents, asked, changed, folder, progress)
    lengths = [len(document) for document in documents]
    portions: list[Portion] = []
    for name, members in variants.items():
        sums = [_summed([errors.squares(architecture.by_name[one]) for one in member.linears]) for member in members]
        together = sum(own[probes[member.linears[0]]] for own, member in zip(sums, members, strict=True))
        measured = from_documents(found[name], lengths)
        portions += [
            _filled(member, carried_over(measured, own, together)) for own, member in zip(sums, members, strict=True)
        ]
    forwards = (1 + sum(shares)) * count / len(question.documents)
    return _answer(question, identity, tuple(portions), forwards, errors.fixed, count, ())


def _summed(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {grid: sum(one[grid] for one in several) for grid in several[0]}


def _probe(portion: Portion, shape: tuple[int, int]) -> str:
    """The candidate that is measured: the smallest with 3 bits or more, where the loss is still a square of the error,
    and yet above the noise."""
    grids = [cell.grid for cell in portion.cells if cell.grid != portion.stored]
    high = [grid for grid in grids if find_grid(grid).bits(shape) >= 3 * shape[0] * shape[1]]
    return (high or grids[-1:])[0]


def _answer(
    question: Question,
    identity: str,
    portions: tuple[Portion, ...],
    forwards: float,
    fixed: int,
    documents: int,
    unseen: tuple[str, ...],
) -> Sensitivity:
    tokens = sum(len(document) for document in question.documents[:documents])
    return Sensitivity(identity, question.method, documents, tokens, round(forwards, 2), fixed, portions, unseen)


def _identity(question: Question, portions: Sequence[Portion]) -> str:
    """sha256 of all that the answer depends on; a model's files by name, size and time of the last change."""
    digest, model = sha256(), question.model
    asked = {
        "version": [VERSION, __version__],
        "model": source_identity(model.source.location),
        "transforms": question.transforms,
        "target": question.target.name,
        "portions": [
            [one.name, *one.linears, *(f"{cell.grid} {cell.nbytes}" for cell in one.cells)] for one in portions
        ],
        "how": [question.method, question.draws, question.seed, question.dtype],
    }
    digest.update(json.dumps(asked, sort_keys=True).encode())
    for document in question.documents:
        digest.update(np.asarray([len(document), *document], dtype="<i8").data)
    for linear in model.architecture.linears:
        importance = question.statistics.importance(linear)
        if importance is not None:
            digest.update(np.ascontiguousarray(importance, dtype="<f4").data)
    return digest.hexdigest()


def save(path: Path, found: Sensitivity) -> None:
    """As JSON. Raises OutputError."""
    text = json.dumps({"version": VERSION, **asdict(found)}, indent=1, ensure_ascii=False)
    with writing(path):
        path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> Sensitivity:
    """What `save` wrote. Raises BadInputError."""
    with reading(path):
        content = path.read_bytes()
    try:
        table: dict[str, Any] = parse_json(content, str(path))
        if table.pop("version") != VERSION:
            raise ValueError
        portions = tuple(
            Portion(
                **{
                    **row,
                    "linears": tuple(row["linears"]),
                    "cells": tuple(Cell(**cell) for cell in row["cells"]),
                }
            )
            for row in table.pop("portions")
        )
        return Sensitivity(**{**table, "portions": portions, "unseen": tuple(table["unseen"])})
    except (TypeError, ValueError, KeyError, AttributeError):
        raise BadInputError(f"{path}: is no saved sensitivity of this version; name another file") from None
