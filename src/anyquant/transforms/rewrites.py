"""Rewrites: which operations change which rows of which stored tensors. Pure data, with a hash and a stored form."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.linear import Carried, Linear
from anyquant.core.plan import EMPTY
from anyquant.transforms.moments import map_moments
from anyquant.transforms.operations import Operation, from_arrays, to_arrays

STRIPE = 256  # rows, or columns, that an operation is applied to at once


class Axis(StrEnum):
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class Rewrite:
    """The stored rows [start, stop) of a tensor, as a matrix M (stop - start, row length): T M for ROWS, for COLUMNS
    each row m becomes T m. A 1-D tensor is one column: its elements are rows.
    """

    operation: Operation
    axis: Axis
    start: int
    stop: int

    @property
    def mixes_rows(self) -> bool:
        """Whether the rows can only be computed together."""
        return self.axis is Axis.ROWS and self.operation.mixes

    def change(self, rows: Float32, first: int) -> None:
        """Rewrite in place `rows` (count, row length), contiguous, which are stored rows [first, first + count).

        When rows are mixed, all of [start, stop) must be there.
        """
        begin, end = max(self.start, first), min(self.stop, first + len(rows))
        if begin >= end:
            return
        part = rows[begin - first : end - first]
        if self.axis is Axis.COLUMNS:
            for start in range(0, len(part), STRIPE):
                part[start : start + STRIPE] = self.operation.apply(part[start : start + STRIPE])
            return
        if self.mixes_rows and (begin, end) != (self.start, self.stop):
            raise AnyQuantError(f"rows {self.start} to {self.stop} can only be rewritten together")
        whole = (begin, end) == (self.start, self.stop)
        operation = self.operation if whole else self.operation.part(begin - self.start, end - self.start)
        for start in range(0, part.shape[1], STRIPE):
            part[:, start : start + STRIPE] = operation.apply_down(part[:, start : start + STRIPE])


@dataclass(frozen=True)
class Rewrites:
    """Everything that a transform changes.

    `tensors`: tensor name to its rewrites, applied in order. `copies`: added tensor to the tensor of the checkpoint
    that it starts as, before any rewrite. `config_patch` changes config.json. `inputs`: input group to what was
    applied to the activation, for transforms of a block, so that statistics need not be collected again.
    `notes`: one line for each thing that a person asked for and that was decided here.
    """

    tensors: Mapping[str, tuple[Rewrite, ...]] = field(default_factory=lambda: EMPTY)
    copies: Mapping[str, str] = field(default_factory=lambda: EMPTY)
    config_patch: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    inputs: Mapping[str, tuple[Operation, ...]] = field(default_factory=lambda: EMPTY)
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing changes (there may be notes that say why)."""
        return not (self.tensors or self.copies or self.config_patch)

    def then(self, later: "Rewrites") -> "Rewrites":
        """These, followed by `later`, which was made for the checkpoint that these give."""
        tensors = dict(self.tensors)
        copies = dict(self.copies)
        for added, source in later.copies.items():
            copies[added] = self.copies.get(source, source)
            tensors[added] = self.tensors.get(source, ())
        for name, rewrites in later.tensors.items():
            tensors[name] = (*tensors.get(name, ()), *rewrites)
        inputs = dict(self.inputs)
        for group, operations in later.inputs.items():
            inputs[group] = (*inputs.get(group, ()), *operations)
        patch = {**self.config_patch, **later.config_patch}
        return Rewrites(tensors, copies, patch, inputs, (*self.notes, *later.notes))

    def map_moments(self, group: str, moments: Moments) -> Moments:
        """Statistics of the activation `group` after these rewrites, from those before."""
        for operation in self.inputs.get(group, ()):
            moments = map_moments(moments, operation)
        return moments

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """(description for JSON, arrays by name); an operation used many times is stored once."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        described: list[dict[str, Any]] = []
        places: dict[int, int] = {}

        def place(operation: Operation) -> int:
            if id(operation) not in places:
                description, array = to_arrays(operation)
                places[id(operation)] = len(described)
                arrays[f"operation.{len(described)}"] = array
                described.append(description)
            return places[id(operation)]

        tensors = {
            name: [[place(r.operation), r.axis.value, r.start, r.stop] for r in rewrites]
            for name, rewrites in self.tensors.items()
        }
        inputs = {group: [place(operation) for operation in found] for group, found in self.inputs.items()}
        description = {
            "operations": described,
            "tensors": tensors,
            "copies": dict(self.copies),
            "config_patch": dict(self.config_patch),
            "inputs": inputs,
            "notes": list(self.notes),
        }
        return description, arrays

    @classmethod
    def from_arrays(cls, description: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> "Rewrites":
        """What `to_arrays` described."""
        operations = [
            from_arrays(described, arrays[f"operation.{index}"])
            for index, described in enumerate(description["operations"])
        ]
        tensors = {
            name: tuple(Rewrite(operations[place], Axis(axis), start, stop) for place, axis, start, stop in rewrites)
            for name, rewrites in description["tensors"].items()
        }
        inputs = {group: tuple(operations[place] for place in found) for group, found in description["inputs"].items()}
        return cls(tensors, description["copies"], description["config_patch"], inputs, tuple(description["notes"]))

    def digest(self) -> str:
        """sha256 over everything: equal rewrites have equal digests."""
        description, arrays = self.to_arrays()
        total = hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            total.update(f"{name}:{array.dtype.str}:{array.shape}:".encode())
            total.update(array.tobytes())
        return total.hexdigest()


Place = tuple[str, Rewrite]


def gather(places: Iterable[Place]) -> dict[str, tuple[Rewrite, ...]]:
    """Rewrites by tensor name, in the order given."""
    tensors: dict[str, tuple[Rewrite, ...]] = {}
    for name, rewrite in places:
        tensors[name] = (*tensors.get(name, ()), rewrite)
    return tensors


def chain(all_rewrites: Sequence[Rewrites]) -> Rewrites:
    """All of them, in order."""
    total = Rewrites()
    for rewrites in all_rewrites:
        total = total.then(rewrites)
    return total


def on_input(linear: Linear, dual: Operation) -> Place:
    """Let each row w of the matrix become `dual` w: what a matrix needs whose input is changed by T, dual = T.dual.

    It is handed over and not formed here, so that all readers of one activation share the object.
    """
    view = linear.view
    axis = Axis.ROWS if view.transposed else Axis.COLUMNS
    return view.tensor, Rewrite(dual, axis, view.start, view.start + _stored_rows(linear))


def on_output(linear: Linear, operation: Operation) -> Place:
    """Let the matrix W become `operation` W: its output is changed by `operation`."""
    view = linear.view
    axis = Axis.COLUMNS if view.transposed else Axis.ROWS
    return view.tensor, Rewrite(operation, axis, view.start, view.start + _stored_rows(linear))


def on_vector(carried: Carried, operation: Operation) -> Place:
    """Let a bias or a gain change as the activation does that it is part of."""
    return carried.tensor, Rewrite(operation, Axis.ROWS, carried.start, carried.start + carried.length)


def _stored_rows(linear: Linear) -> int:
    return linear.view.columns if linear.view.transposed else linear.view.rows
