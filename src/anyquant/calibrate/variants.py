"""The KL divergence that changed weights cause, measured: many variants of a model in one pass over its blocks.

No gradients: for hosts that have no memory for what a block leaves for the way back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.states import States
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.extras import require
from anyquant.core.linear import Linear, Role
from anyquant.core.progress import Progress, Silent
from anyquant.models.batches import Batch, group_documents
from anyquant.models.streaming import StreamedModel
from anyquant.store.system import writing

Changed = Callable[[Linear], Float32]  # -> the weights (out, in) that it has in its variant
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """The model with these Linears changed: all of one block, or the embedding, or the head."""

    name: str
    linears: tuple[Linear, ...]

    @property
    def block(self) -> int | None:
        return self.linears[0].block

    def has(self, role: Role) -> bool:
        return any(linear.role is role for linear in self.linears)


def share(variant: Variant, blocks: int) -> float:
    """What of the blocks a variant goes through, from its own to the last."""
    if variant.block is not None:
        return (blocks - variant.block) / blocks
    return 1.0 if variant.has(Role.EMBEDDING) else 0.0


def divergences(
    model: StreamedModel,
    documents: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    changed: Changed,
    folder: Path,
    progress: Progress | None = None,
) -> Mapping[str, Float64]:
    """Variant -> KL divergence of its next-token distributions from the model's, a sum for each document: (documents,).

    The states of all variants lie in nameless files in `folder`, which is made: 4 x tokens x hidden x (variants + 1)
    bytes at most. Raises UsageError without tokens, UnsupportedError for a model without a head, BadInputError for a
    divergence that is not finite, OutputError when the folder cannot be written.
    """
    if not documents or not all(len(document) for document in documents):
        raise UsageError("no tokens to measure on; give a longer text")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, documents, folder, changed)
    sink = progress or Silent()
    sink.start("sensitivity", float(model.blocks + 1), "blocks")
    run.begin([variant for variant in variants if variant.has(Role.EMBEDDING)])
    for index in range(model.blocks):
        run.advance(index, [variant for variant in variants if variant.block == index])
        sink.advance(1.0)
    found = run.compare(variants)
    sink.finish()
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise BadInputError(f"{model.checkpoint.location}: the divergence with {name} changed is not finite")
    return found


class _Run:
    def __init__(
        self, model: StreamedModel, documents: Sequence[Sequence[int]], folder: Path, changed: Changed
    ) -> None:
        self._torch = require("torch")
        self._model, self._documents, self._folder, self._changed = model, documents, folder, changed
        self._batches: list[Batch] = []
        self._float: States
        self._states: dict[str, States] = {}

    def begin(self, variants: Sequence[Variant]) -> None:
        """What enters block 0."""
        self._batches = list(self._model.embed_each(self._documents))
        self._float = self._allocate()
        for batch, view in zip(self._batches, self._float.views, strict=True):
            view.copy_(batch.states)
            batch.states = view
        for variant in variants:
            weights = self._changed(next(linear for linear in variant.linears if linear.role is Role.EMBEDDING))
            self._states[variant.name] = self._allocate()
            changed = self._model.embed_each(self._documents, lambda ids, weights=weights: weights[ids])  # type: ignore[misc]
            for batch, view in zip(changed, self._states[variant.name].views, strict=True):
                view.copy_(batch.states)

    def advance(self, index: int, variants: Sequence[Variant]) -> None:
        """All states through block `index`, where `variants` begin."""
        with self._model.block(index) as module, self._torch.no_grad():
            before = {**self._states}
            for variant in variants:
                weights = self._weights(index, variant)
                self._states[variant.name] = self._allocate()
                for number, batch in enumerate(self._batches):
                    output = self._model.apply(index, module, batch, self._float.views[number], weights)
                    self._states[variant.name].views[number].copy_(output)
            for states in (*before.values(), self._float):
                for batch, view in zip(self._batches, states.views, strict=True):
                    view.copy_(self._model.apply(index, module, batch, view))

    def compare(self, variants: Sequence[Variant]) -> dict[str, Float64]:
        """The divergences, after the last block."""
        found = {variant.name: np.zeros(len(self._documents)) for variant in variants}
        role = Role.EMBEDDING if self._model.architecture.tied else Role.HEAD
        heads = [variant for variant in variants if variant.has(role)]
        plain = [variant for variant in variants if variant not in heads]
        with self._model.torch_head() as head, self._torch.no_grad():
            module = self._model.module.get_submodule(self._model.head_module)
            for variant in [None, *heads]:
                original = module.weight
                with self._head_of(module, variant, role) as weight:
                    for document, rows in self._rows():
                        module.weight = original
                        reference = head(rows(self._float)).double().log_softmax(-1)
                        module.weight = weight
                        for one in plain if variant is None else [variant]:
                            states = self._states.get(one.name, self._float)
                            found[one.name][document] += _divergence(reference, head(rows(states)))
        return found

    @contextmanager
    def _head_of(self, module: Any, variant: Variant | None, role: Role) -> Iterator[Any]:
        original = module.weight
        try:
            if variant is None:
                yield original
            else:
                linear = next(one for one in variant.linears if one.role is role)
                yield self._torch.nn.Parameter(self._torch.from_numpy(self._changed(linear)), requires_grad=False)
        finally:
            module.weight = original

    def _rows(self) -> Iterator[tuple[int, Callable[[States], Any]]]:
        """(document, some of its states), in pieces whose logits fit."""
        step = max(1, self._model.logit_rows // 8)
        for number, batch in enumerate(self._batches):
            for place, document in enumerate(batch.documents):
                for start in range(0, batch.states.shape[1], step):
                    at = (place, slice(start, start + step))
                    yield document, lambda states, number=number, at=at: states.views[number][at]  # type: ignore[misc]

    def _weights(self, index: int, variant: Variant) -> dict[str, Any]:
        """The parameters of the block that are others in the variant, by their names below the block."""
        below = {name: short for short, name in self._model.parameters(index).items()}
        whole = dict(self._model.module.named_parameters(remove_duplicate=False))
        weights: dict[str, Any] = {}
        for linear in variant.linears:
            place = self._model.places[linear.name]
            short = below[place.parameter]
            if short not in weights:
                weights[short] = whole[place.parameter].detach().clone()
            place.of(weights[short]).copy_(self._torch.from_numpy(self._changed(linear)))
        return weights

    def _allocate(self) -> States:
        groups = group_documents(self._documents, self._model.batch_tokens)
        hidden = int(self._batches[0].states.shape[-1])
        return States([(len(group), len(self._documents[group[0]]), hidden) for group in groups], self._folder)


def _divergence(reference: Any, logits: Any) -> float:
    """KL in nats, summed over positions, from log probabilities and logits."""
    difference = reference - logits.double().log_softmax(-1)
    return float((reference.exp() * difference).sum())
