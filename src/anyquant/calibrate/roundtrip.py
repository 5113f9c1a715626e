"""Documents through the float model and back, block by block: what enters each Linear, and the gradient at its output.

The gradient is that of the log-likelihood of tokens that are drawn from the model's own distribution at every position.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.calibrate.states import States
from anyquant.calibrate.watch import first_of_groups, rows_of
from anyquant.core.arithmetic import fast_products
from anyquant.core.errors import UsageError
from anyquant.core.extras import require
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress
from anyquant.models.batches import Batch, group_documents
from anyquant.models.products import watch_products
from anyquant.models.streaming import StreamedModel

SEED = 0
Draw = Callable[[Any], Any]  # logits (tokens, vocabulary) -> one token id for each, (tokens,); torch tensors


@dataclass(frozen=True)
class Passed:
    """What came by a Linear on the way back: `inputs` (tokens, in) and `gradients` at its output (tokens, out).

    All tokens of the batch in their order; of an expert those that were routed to it.
    """

    linear: Linear
    batch: Batch
    draw: int
    inputs: Any
    gradients: Any


Sink = Callable[[Passed], None]


class Sampler:
    """Draws from softmax(logits) by the inverse of the distribution function, in the order of the positions."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._torch = require("torch")

    def __call__(self, logits: Any) -> Any:
        total = logits.double().softmax(-1).cumsum_(-1)
        chance = self._torch.from_numpy(self._generator.random((len(logits), 1)))
        return self._torch.searchsorted(total, chance * total[:, -1:], right=True)[:, 0].clamp_(max=total.shape[1] - 1)


class RoundTrip:
    """`forward`, then `turn`, then `back` for each block from the last to the first.

    The states before every block and after the last, and the gradients of each of the `draws`, lie in nameless files
    in `folder`: 4 x tokens x hidden x (blocks + 1 + draws) bytes. `batches` are the documents by length, `last` the
    states after the last block, `gradients` those at what the blocks from some one on get, one States per draw;
    `answers` the drawn tokens, (draws, tokens) of each batch.
    Progress counts tokens. Raises UsageError without tokens, OutputError when the folder cannot be written.
    """

    def __init__(
        self,
        model: StreamedModel,
        documents: Sequence[Sequence[int]],
        folder: Path,
        progress: Progress,
        draws: int = 1,
    ) -> None:
        self.documents = [document for document in documents if len(document)]
        if not self.documents:
            raise UsageError("no tokens to calibrate with; give a longer text")
        self.model, self.progress, self.draws = model, progress, draws
        self.batches: list[Batch] = []
        self.gradients: list[States] = []
        self.last: States
        self.answers: list[Any] = []
        self.tokens = sum(map(len, self.documents))
        self._torch = require("torch")
        self._folder = folder
        self._states: list[States] = []
        progress.start("gradients", float(self.tokens), "tokens")

    def forward(self) -> None:
        """States before block 0, block 1, ..., and after the last."""
        for batch in self.model.embed_each(self.documents):
            if not self._states:
                self._states.append(self._allocate(int(batch.states.shape[-1])))
            self._states[0].views[len(self.batches)].copy_(batch.states)
            batch.states = self._states[0].views[len(self.batches)]
            self.batches.append(batch)
        hidden = int(self._states[0].views[0].shape[-1])
        for index in range(self.model.blocks):
            self._states.append(self._allocate(hidden))
            with self.model.block(index) as module, self._torch.no_grad(), fast_products():
                for number, batch in enumerate(self.batches):
                    output = self.model.apply(index, module, batch, self._states[index].views[number])
                    self._states[index + 1].views[number].copy_(output)
                    self._moved(batch)

        self.last = self._states.pop()

    def turn(self, draw: Draw) -> None:
        """From the states after the last block to the gradients of log p(y) there."""
        torch, last = self._torch, self.last
        hidden = int(last.views[0].shape[-1])
        self.gradients = [self._allocate(hidden) for _ in range(self.draws)]
        rows = max(1, self.model.logit_rows // 8)
        with self.model.torch_head() as head:
            for number, view in enumerate(last.views):
                flat = [one.views[number].view(-1, hidden) for one in self.gradients]
                answers = torch.empty((self.draws, len(flat[0])), dtype=torch.long)
                for start in range(0, len(flat[0]), rows):
                    states = view.view(-1, hidden)[start : start + rows].clone().requires_grad_()
                    with torch.enable_grad(), fast_products():
                        logits = head(states)
                        chances = logits.detach().softmax(-1)
                        for index, target in enumerate(flat):
                            chosen = draw(logits.detach())
                            answers[index, start : start + rows] = chosen
                            states.grad = None
                            logits.backward(pull(chances, chosen), retain_graph=index + 1 < self.draws)
                            target[start : start + rows].copy_(states.grad)
                self.answers.append(answers)

    def back(self, index: int, linears: Sequence[Linear], sink: Sink) -> None:
        """`sink` is called with what comes by the `linears` of block `index`, which is the last that is left.

        The gradients are then those at what enters it. Only where no expert is among the `linears` is every token of
        a batch seen.
        """
        entering = self._states.pop()
        with self.model.block(index) as module:
            for number, batch in enumerate(self.batches):
                states = entering.views[number].clone().requires_grad_()
                seen = _Seen(self.model, batch, sink)
                with self._torch.enable_grad(), fast_products():
                    with seen.watching(linears):
                        output = self.model.apply(index, module, batch, states)
                    for draw, gradients in enumerate(self.gradients):
                        seen.draw, states.grad = draw, None
                        output.backward(gradients.views[number], retain_graph=draw + 1 < self.draws)
                        gradients.views[number].copy_(states.grad)
                self._moved(batch)

    def _allocate(self, hidden: int) -> States:
        groups = group_documents(self.documents, self.model.batch_tokens)
        shapes = [(len(group), len(self.documents[group[0]]), hidden) for group in groups]
        return States(shapes, self._folder)

    def _moved(self, batch: Batch) -> None:
        self.progress.advance(batch.tokens / (2 * self.model.blocks))


def pull(chances: Any, chosen: Any) -> Any:
    """The gradient of log p(chosen) at the logits, from p (tokens, vocabulary)."""
    gradient = -chances
    gradient[require("torch").arange(len(chances)), chosen] += 1
    return gradient


class _Seen:
    """Hooks on one pass of a batch through a block; `draw` is the number of the gradient that comes back next."""

    def __init__(self, model: StreamedModel, batch: Batch, sink: Sink) -> None:
        self.draw = 0
        self._model, self._batch, self._sink = model, batch, sink

    @contextmanager
    def watching(self, linears: Sequence[Linear]) -> Iterator[None]:
        """While active, outputs of the Linears will hand their gradient, and what entered, to the sink."""
        by_module: dict[str, list[Linear]] = {}
        for linear in linears:
            if linear.expert is None:
                by_module.setdefault(linear.module, []).append(linear)
        with ExitStack() as stack:
            for path, own in by_module.items():
                module = self._model.module.get_submodule(path)
                stack.callback(module.register_forward_hook(self._hook(own), with_kwargs=True).remove)
            experts = [linear for linear in linears if linear.expert is not None]
            if experts:
                stack.enter_context(self._watch_experts(experts))
            yield

    def _hook(self, linears: list[Linear]) -> Callable[[Any, Any, Mapping[str, Any], Any], None]:
        def forward(module: Any, arguments: Any, keywords: Mapping[str, Any], output: Any) -> None:
            self._expect(linears, arguments[0] if arguments else next(iter(keywords.values())), output)

        return forward

    def _watch_experts(self, experts: Sequence[Linear]) -> Any:
        groups: dict[str, list[Linear]] = {}
        for linear in experts:
            groups.setdefault(linear.input_group, []).append(linear)
        parameters = dict(self._model.module.named_parameters(remove_duplicate=False))
        addresses = {}
        for group, linear in first_of_groups(experts).items():
            place = self._model.places[linear.name]
            addresses[place.of(parameters[place.parameter]).data_ptr()] = group
        return watch_products(addresses, None, lambda group, given, output: self._expect(groups[group], given, output))

    def _expect(self, linears: list[Linear], inputs: Any, output: Any) -> None:
        if not output.requires_grad:
            return
        given = inputs.detach()

        def arrive(gradient: Any) -> None:
            rows, entering = gradient.detach().reshape(-1, gradient.shape[-1]), rows_of(given)
            for linear in linears:
                place = self._model.places[linear.name]
                own = rows[:, place.start : place.start + place.rows]
                self._sink(Passed(linear, self._batch, self.draw, entering, own))

        output.register_hook(arrive)
