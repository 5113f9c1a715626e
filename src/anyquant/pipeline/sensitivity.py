"""What each part of a model loses on each grid that its target may store it on: one pass, saved and used again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
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
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, OutputError, UsageError
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress
from anyquant.grids import grid as find_grid
from anyquant.models.streaming import BATCH_TOKENS, StreamedModel
from anyquant.pipeline.portions import DRAWS, METHODS, Cell, Portion, Question, RoundingErrors, portions_of
from anyquant.pipeline.work import source_identity
from anyquant.store.strict_json import parse_json
from anyquant.store.system import reading, writing
from anyquant.transforms.checkpoint import layers

__all__ = [
    "FORWARDS",
    "METHODS",
    "Cell",
    "Portion",
    "Question",
    "Sensitivity",
    "ask",
    "load",
    "portions_of",
    "recall",
    "refuse",
    "save",
    "sensitivities",
]

FORWARDS = 2.0 + 2 * DRAWS  # of a pass by gradients, about
MOST_FORWARDS = 20.0
VERSION = 1


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

    def loss(self, choice: Choice) -> float:
        """The predicted KL of a whole plan: cross terms between parts are small beside the parts."""
        return sum(portion.cell(choice[portion.name]).loss for portion in self.portions)


def refuse(question: Question, saved: Path | None, shown: str | None = None) -> None:
    """Raise now what `sensitivities` would raise after the calibration: for the candidates, and the file `saved`.

    And for a grid that is to be `shown` and is no candidate.
    """
    if question.method not in METHODS:
        raise UsageError(f"unknown method {question.method!r}; known: {', '.join(METHODS)}")
    grids = dict.fromkeys(cell.grid for portion in portions_of(question) for cell in portion.cells)
    if shown is not None and shown not in grids:
        raise UsageError(f"--show {shown} is none of the candidates: {', '.join(grids)}")
    if saved is not None and not saved.parent.is_dir():
        raise OutputError(f"{saved}: there is no folder {saved.parent}; make it first")
    if saved is not None and saved.exists():
        load(saved)


def sensitivities(
    question: Question, folder: Path, threads: int, progress: Progress, saved: Path | None = None
) -> Sensitivity:
    """The answer, from the file `saved` when it is about the same question, else by one pass. Raises as these do."""
    return recall(question, saved, progress) or ask(question, folder, threads, progress, saved)


def recall(question: Question, saved: Path | None, progress: Progress) -> Sensitivity | None:
    """What the file `saved` holds, if it is there and about this question.

    Raises UsageError for unknown grids or methods and when nothing may be quantized, BadInputError for a damaged file.
    """
    refuse(question, saved)
    if saved is None or not saved.exists():
        return None
    found = load(saved)
    if found.identity != _identity(question, portions_of(question)):
        progress.say(f"{saved} is about another model, text or target: asked anew, and replaced")
        return None
    progress.say(f"sensitivities from {saved}")
    return found


def ask(question: Question, folder: Path, threads: int, progress: Progress, saved: Path | None = None) -> Sensitivity:
    """The answer by one pass; it is then kept in the file `saved`.

    Temporary files lie in `folder`. Raises OutputError, and as `inner_products` and `divergences`.
    """
    portions = portions_of(question)
    with TemporaryDirectory(dir=folder, prefix=".sensitivity-") as scratch:
        ask_by = _by_gradients if question.method == METHODS[0] else _by_forwards
        errors = RoundingErrors(question, portions, threads)
        found = ask_by(errors, _identity(question, portions), Path(scratch), progress)
    if found.unseen:
        progress.say(f"warning: no token reached {len(found.unseen)} expert matrices: their loss is that of the others")
    if saved is not None:
        save(saved, found)
    return found


def _streamed(question: Question) -> StreamedModel:
    architecture = question.model.architecture
    batch = 1 if architecture.dimensions.experts or any(one.expert is not None for one in architecture.linears) else 0
    return StreamedModel(
        question.model.checkpoint, architecture, batch_tokens=batch or BATCH_TOKENS, dtype=question.dtype
    )


def _by_gradients(errors: RoundingErrors, identity: str, folder: Path, progress: Progress) -> Sensitivity:
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


def _estimates(portion: Portion, errors: RoundingErrors, products: Products) -> dict[str, Estimate]:
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


def _by_forwards(errors: RoundingErrors, identity: str, folder: Path, progress: Progress) -> Sensitivity:
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
        error += read_view(question.model.checkpoint, linear.view, 0, linear.shape[0])
        weights: Float32 = error
        return weights

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
        "model": source_identity(model.source),
        "rewrites": [layer.digest() for layer in layers(model.checkpoint)],
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
