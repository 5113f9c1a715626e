"""How the log-likelihood of each document answers to errors of the weights: inner products with its gradients.

To second order, an error d of all weights costs 1/2 E <g, d>^2 in KL divergence, summed over the tokens of a document;
g is the gradient of the sum over its positions t of log p(y_t), y drawn from the model: the empirical Fisher
information of whole documents, whose cross terms between positions vanish in expectation (Martens 2020, "New insights
and perspectives on the natural gradient method", section 5).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.roundtrip import Draw, Passed, RoundTrip, Sampler, pull
from anyquant.core.arithmetic import fast_products
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, BadInputError
from anyquant.core.extras import require
from anyquant.core.linear import Linear, Role
from anyquant.core.progress import Progress, Silent
from anyquant.models.architecture import Architecture
from anyquant.models.streaming import StreamedModel
from anyquant.store.system import writing

Errors = Callable[[Linear, int, int], Float32]  # Linear, first row, rows -> its errors (candidates, rows, in)
Float64 = npt.NDArray[np.float64]
ALIGNED = 128  # rows of a piece are a multiple of this, so that blocks of a grid with several rows lie in one
ROOM = 1 << 30  # bytes of errors in memory; those of a block that take more are kept in bfloat16


@dataclass(frozen=True)
class Products:
    """`values` by Linear name: <g, d> of every candidate, draw and document, float64 (candidates, draws, documents).

    `lengths` are the tokens of the documents, `forwards` what all took, in passes of the documents through the model.
    `unseen` names experts that no token was routed to: their products are 0 and mean nothing.
    """

    values: Mapping[str, Float64]
    lengths: tuple[int, ...]
    forwards: float
    unseen: tuple[str, ...]


def inner_products(
    model: StreamedModel,
    documents: Sequence[Sequence[int]],
    linears: Mapping[str, int],
    errors: Errors,
    folder: Path,
    draws: int = 8,
    progress: Progress | None = None,
    draw: Draw | None = None,
    seed: int = 0,
) -> Products:
    """Go forward once and back once for each of the `draws`; `errors` are asked for block by block, the last first.

    `linears` are the names of those that matter with their numbers of candidates; routers cannot be among them. A model
    with experts must have been opened with `batch_tokens` 1, so that every token that comes by is of one document.
    Memory: a block, what one batch leaves in it for the way back, the errors of a block (in bfloat16 beyond `ROOM`).
    Files in `folder`: see RoundTrip. Raises as `collect_output_statistics`.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trip = RoundTrip(model, documents, folder, progress or Silent(), draws)
    wanted = [one for one in model.architecture.linears if linears.get(one.name)]
    if any(one.expert is not None for one in wanted) and model.batch_tokens != 1:
        raise AnyQuantError("documents go through a model with experts one by one: open it with 1 batch token")
    if any(one.role is Role.ROUTER for one in wanted):
        raise AnyQuantError("there are no inner products of routers")
    run = _Run(trip, wanted, linears, errors)
    trip.forward()
    trip.turn(draw or Sampler(seed))
    passes = run.head()
    for block in reversed(range(model.blocks)):
        run.block(block)
    run.embedding()
    trip.progress.finish()
    for name, values in run.values.items():
        if not np.isfinite(values).all():
            raise BadInputError(f"{model.checkpoint.location}: the gradient at {name} is not finite")
    lengths = tuple(map(len, trip.documents))
    forwards = _forwards(model.architecture, draws, passes)
    unseen = [one.name for one in wanted if one.expert is not None and one.name not in run.seen]
    return Products(run.values, lengths, forwards, tuple(unseen))


def _forwards(architecture: Architecture, draws: int, passes: int) -> float:
    """Products of weights and tokens done, over those of one pass forward: in the blocks 1 forward, 1 again on the way
    back, and 2 for each draw; at the head 1, 1 for each time it was run again, and 2 for each draw."""
    inside = sum(linear.weights for linear in architecture.linears if linear.block is not None)
    head = architecture.dimensions.vocabulary * architecture.dimensions.hidden
    return ((2 + 2 * draws) * inside + (1 + passes + 2 * draws) * head) / (inside + head)


class _Run:
    def __init__(
        self, trip: RoundTrip, linears: Sequence[Linear], candidates: Mapping[str, int], errors: Errors
    ) -> None:
        self._torch = require("torch")
        self._trip, self._model = trip, trip.model
        self._linears, self._errors = linears, errors
        shape = (trip.draws, len(trip.documents))
        self.values: dict[str, Float64] = {one.name: np.zeros((candidates[one.name], *shape)) for one in linears}
        self.seen: set[str] = set()

    def block(self, index: int) -> None:
        """The Linears of a block; the gradients go on to what enters it."""
        linears = [one for one in self._linears if one.block == index]
        half = sum(4 * len(self.values[one.name]) * one.weights for one in linears) > ROOM
        kept = {one.name: self._kept(one, half) for one in linears}

        def arrive(passed: Passed) -> None:
            self.seen.add(passed.linear.name)
            documents = passed.batch.documents
            inputs = passed.inputs.view(len(documents), -1, passed.inputs.shape[-1])
            gradients = passed.gradients.reshape(len(documents), -1, passed.gradients.shape[-1])
            for place, document in enumerate(documents):
                found = self._products(kept[passed.linear.name], gradients[place].float().T @ inputs[place])
                self.values[passed.linear.name][:, passed.draw, document] += found

        self._trip.back(index, linears, arrive)

    def head(self) -> int:
        """The head, or the embedding in its place; returns how often all logits were computed."""
        role = Role.EMBEDDING if self._model.architecture.tied else Role.HEAD
        passes = 0
        for linear in (one for one in self._linears if one.role is role):
            for first, errors in self._pieces(linear):
                passes += 1
                rows = slice(first, first + errors.shape[1])
                for document, draw, entering, gradients in self._logit_gradients():
                    found = self._products(errors, gradients[:, rows].T @ entering)
                    self.values[linear.name][:, draw, document] += found
        return passes

    def _logit_gradients(self) -> Iterator[tuple[int, int, Any, Any]]:
        """(document, draw, what enters the head, the gradient at its output), by pieces of a document's tokens."""
        torch, trip = self._torch, self._trip
        module, step = self._model.module.get_submodule(self._model.head_module), max(1, self._model.logit_rows // 4)
        caught: list[Any] = []

        def catch(module: Any, arguments: Any, output: Any) -> Any:
            leaf = output.detach().requires_grad_()
            caught[:] = [arguments[0].detach().reshape(-1, arguments[0].shape[-1]), leaf]
            return leaf

        handle = module.register_forward_hook(catch)
        try:
            with self._model.torch_head() as head, torch.enable_grad(), fast_products():
                for batch, states, answers in zip(trip.batches, trip.last.views, trip.answers, strict=True):
                    length = states.shape[1]
                    for place, document in enumerate(batch.documents):
                        for start in range(0, length, step):
                            logits = head(states[place, start : start + step])
                            entering, leaf = caught
                            chances = logits.detach().softmax(-1)
                            at = slice(place * length + start, place * length + start + len(logits))
                            for draw in range(trip.draws):
                                leaf.grad = None
                                logits.backward(pull(chances, answers[draw, at]), retain_graph=True)
                                yield document, draw, entering, leaf.grad.reshape(-1, leaf.shape[-1])
        finally:
            handle.remove()

    def embedding(self) -> None:
        """The embedding where tokens are looked up, after all blocks."""
        for linear in (one for one in self._linears if one.role is Role.EMBEDDING):
            for first, errors in self._pieces(linear):
                for document, draw, ids, gradients in self._row_gradients():
                    own = (ids >= first) & (ids < first + errors.shape[1])
                    rows = self._torch.from_numpy(ids[own] - first)
                    found = [float((one[rows] * gradients[own]).sum(dtype=self._torch.float64)) for one in errors]
                    self.values[linear.name][:, draw, document] += found

    def _row_gradients(self) -> Iterator[tuple[int, int, Any, Any]]:
        """(document, draw, ids that occur in it, the gradients at their rows of the embedding)."""
        for number, batch in enumerate(self._trip.batches):
            for place, document in enumerate(batch.documents):
                several = [one.views[number][place : place + 1] for one in self._trip.gradients]
                ids, found = self._model.embedding_gradients(self._trip.documents[document], several)
                for draw, gradients in enumerate(found):
                    yield document, draw, ids, gradients

    def _pieces(self, linear: Linear) -> Iterator[tuple[int, Any]]:
        """Errors of rows that fit into memory: (first row, (candidates, rows, in))."""
        total, columns = linear.shape
        step = max(1, ROOM // (4 * columns * len(self.values[linear.name])) // ALIGNED) * ALIGNED
        for first in range(0, total, step):
            yield first, self._torch.from_numpy(self._errors(linear, first, min(step, total - first)))

    def _kept(self, linear: Linear, half: bool) -> Any:
        errors = self._torch.from_numpy(self._errors(linear, 0, linear.shape[0]))
        return errors.bfloat16() if half else errors

    def _products(self, errors: Any, gradient: Any) -> Float64:
        flat = gradient.reshape(-1)
        found: Float64 = self._torch.stack([self._torch.dot(one.float().view(-1), flat) for one in errors]).numpy()
        return found
