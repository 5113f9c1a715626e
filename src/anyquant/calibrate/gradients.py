"""How much the model's answer depends on the output of each Linear: second moments of gradients of its log-likelihood.

With y drawn from the model's own distribution, the second moment of the gradient of log p(y) at the output of a Linear
is the output side of the Kronecker-factored Fisher information of its weights, O (x) H: to second order, tr(O D H D^T)
is what an error D of the weights costs in KL divergence (Martens & Grosse 2015, arXiv 1503.05671; for rounding: YAQA,
arXiv 2505.22988).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.calibrate.states import States
from anyquant.core.arithmetic import fast_products
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UsageError
from anyquant.core.extras import require
from anyquant.core.linear import Linear, Role
from anyquant.core.progress import Progress, Silent
from anyquant.models.batches import Batch, group_documents
from anyquant.models.streaming import StreamedModel
from anyquant.store.journal import Journal
from anyquant.store.system import writing

INDEX = "outputs.json"  # written last: what it names is whole
MOST_OUTPUTS = 4096
WHOLE = 128  # outputs that are not parted, so that grids with blocks of rows are not either
SEED = 0
Draw = Callable[[Any], Any]  # logits (tokens, vocabulary) -> one token id for each, (tokens,); torch tensors


class OutputStatistics:
    """The output sides that lie in `folder`; each is read when it is asked for.

    Raises BadInputError when the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = Journal(folder).read(INDEX) if folder.is_dir() else None
        try:
            self._index: dict[str, dict[str, Any]] = json.loads(found or b"")
        except ValueError:
            raise BadInputError(f"{folder}: the gradients at the outputs are not all there; start again") from None

    @staticmethod
    def complete(folder: Path) -> bool:
        """Whether `collect_output_statistics` came to its end there."""
        return (folder / INDEX).is_file()

    def of(self, linear: Linear) -> Float32 | None:
        """Mean of g g^T over all tokens, g (out,) the gradient at the Linear's output: (out, out) float32.

        Of a Linear with more outputs than the bound only the diagonal blocks, (blocks, size, size): block i is about
        the outputs from i * size on; the last may be cut off, its remaining rows and columns are 0. None for experts
        and routers. Raises BadInputError when the file is damaged.
        """
        entry = self._index.get(linear.name)
        if entry is None:
            return None
        data = Journal(self.folder).read(_file(linear.name))
        if data is None or sha256(data).hexdigest() != entry["sha256"]:
            raise BadInputError(f"{self.folder / _file(linear.name)}: is missing or damaged; start again")
        values: Float32 = np.frombuffer(data, dtype="<f4").reshape(entry["shape"]).copy()
        return values

    def digest(self, linear: Linear) -> str:
        """sha256 of the values, "" where there are none."""
        return str(self._index.get(linear.name, {}).get("sha256", ""))


def collect_output_statistics(
    model: StreamedModel,
    documents: Sequence[Sequence[int]],
    folder: Path,
    progress: Progress | None = None,
    most_outputs: int = MOST_OUTPUTS,
    draw: Draw | None = None,
) -> OutputStatistics:
    """Run `documents` (token ids) through the float model and back; one token is drawn at each position by `draw`, by
    default with a fixed seed. The results lie in `folder`, which is made; the states of all blocks lie in nameless
    files there while this runs: 4 x tokens x hidden x (blocks + 2) bytes.

    Memory: a block and what one batch leaves in it for the way back, its statistics, a bounded piece of logits.
    Raises UsageError without tokens, UnsupportedError for a model without a head, BadInputError for gradients that are
    not finite, OutputError when the folder cannot be written.
    """
    kept = [document for document in documents if len(document)]
    if not kept:
        raise UsageError("no tokens to calibrate with; give a longer text")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, kept, folder, progress or Silent())
    run.forward()
    run.turn(draw or _Sampler(SEED))
    journal, index = Journal(folder), {}
    for block in reversed(range(model.blocks)):
        for name, values in run.back(block, most_outputs).items():
            digest = journal.write(_file(name), [np.ascontiguousarray(values, dtype="<f4").data])
            index[name] = {"shape": values.shape, "sha256": digest}
    journal.write(INDEX, [json.dumps(index, sort_keys=True).encode()])
    run.progress.finish()
    return OutputStatistics(folder)


class _Sampler:
    """Draws from softmax(logits) by the inverse of the distribution function, in the order of the positions."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._torch = require("torch")

    def __call__(self, logits: Any) -> Any:
        total = logits.double().softmax(-1).cumsum_(-1)
        chance = self._torch.from_numpy(self._generator.random((len(logits), 1)))
        return self._torch.searchsorted(total, chance * total[:, -1:], right=True)[:, 0].clamp_(max=total.shape[1] - 1)


class _Run:
    """States before each block, and the gradient at what the blocks from some one on get."""

    def __init__(
        self, model: StreamedModel, documents: Sequence[Sequence[int]], folder: Path, progress: Progress
    ) -> None:
        self.model, self.progress = model, progress
        self._torch = require("torch")
        self._folder = folder
        self._documents = documents
        self._batches: list[Batch] = []
        self._states: list[States] = []
        self.tokens = sum(map(len, documents))
        progress.start("gradients", float(self.tokens), "tokens")

    def forward(self) -> None:
        """States before block 0, block 1, ..., and after the last."""
        for batch in self.model.embed_each(self._documents):
            if not self._states:
                self._states.append(self._allocate(int(batch.states.shape[-1])))
            self._states[0].views[len(self._batches)].copy_(batch.states)
            batch.states = self._states[0].views[len(self._batches)]
            self._batches.append(batch)
        hidden = int(self._states[0].views[0].shape[-1])
        for index in range(self.model.blocks):
            self._states.append(self._allocate(hidden))
            with self.model.block(index) as module, self._torch.no_grad(), fast_products():
                for number, batch in enumerate(self._batches):
                    output = self.model.apply(index, module, batch, self._states[index].views[number])
                    self._states[index + 1].views[number].copy_(output)
                    self._moved(batch)

    def turn(self, draw: Draw) -> None:
        """Replace the states after the last block by the gradient of log p(y) there."""
        torch = self._torch
        rows = max(1, self.model.logit_rows // 8)
        with self.model.torch_head() as head:
            for view in self._states[-1].views:
                flat = view.view(-1, view.shape[-1])
                for start in range(0, len(flat), rows):
                    states = flat[start : start + rows].clone().requires_grad_()
                    with torch.enable_grad(), fast_products():
                        logits = head(states)
                        pull = logits.detach().softmax(-1).neg_()
                        pull[torch.arange(len(states)), draw(logits.detach())] += 1
                        logits.backward(pull)
                    flat[start : start + rows].copy_(states.grad)

    def back(self, index: int, most_outputs: int) -> dict[str, Float32]:
        """The statistics of block `index` by Linear name; the gradient goes on to what enters it."""
        gradients, entering = self._states.pop(), self._states[index]
        linears = [one for one in self.model.architecture.linears if one.block == index and _watched(one)]
        sums = {linear.name: _Sum(linear, most_outputs) for linear in linears}
        with self.model.block(index) as module:
            for number, batch in enumerate(self._batches):
                states = entering.views[number].clone().requires_grad_()
                with self._torch.enable_grad(), fast_products():
                    with self._watching(linears, sums):
                        output = self.model.apply(index, module, batch, states)
                    output.backward(gradients.views[number])
                entering.views[number].copy_(states.grad)
                self._moved(batch)
        where = f"{self.model.checkpoint.location}: block {index}"
        return {name: total.result(self.tokens, f"{where}, {name}") for name, total in sums.items()}

    @contextmanager
    def _watching(self, linears: Sequence[Linear], sums: dict[str, "_Sum"]) -> Iterator[None]:
        """While active, outputs of the Linears' modules will hand their gradient to the sums."""

        def hook(names: list[str]) -> Callable[[Any, Any, Any], None]:
            def forward(module: Any, arguments: Any, output: Any) -> None:
                if output.requires_grad:
                    output.register_hook(lambda gradient: arrive(names, gradient))

            return forward

        def arrive(names: list[str], gradient: Any) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            for name in names:
                place = self.model.places[name]
                sums[name].add(rows[:, place.start : place.start + place.rows])

        by_module: dict[str, list[str]] = {}
        for linear in linears:
            by_module.setdefault(linear.module, []).append(linear.name)
        with ExitStack() as stack:
            for path, names in by_module.items():
                stack.callback(self.model.module.get_submodule(path).register_forward_hook(hook(names)).remove)
            yield

    def _allocate(self, hidden: int) -> States:
        groups = group_documents(self._documents, self.model.batch_tokens)
        shapes = [(len(group), len(self._documents[group[0]]), hidden) for group in groups]
        return States(shapes, self._folder)

    def _moved(self, batch: Batch) -> None:
        self.progress.advance(batch.tokens / (2 * self.model.blocks))


class _Sum:
    """Running sum of g g^T, or of its diagonal blocks of equal size."""

    def __init__(self, linear: Linear, most_outputs: int) -> None:
        outputs = linear.shape[0]
        self._size = outputs
        if outputs > most_outputs:
            even = -(-outputs // -(-outputs // most_outputs))
            self._size = min(most_outputs, -(-even // WHOLE) * WHOLE)
        self._blocks = -(-outputs // self._size)
        self._total = require("torch").zeros((self._blocks, self._size, self._size))
        self.seen = 0

    def add(self, gradients: Any) -> None:
        """Account for `gradients` (tokens, out)."""
        self.seen += len(gradients)
        gradients = gradients.float()
        for block in range(self._blocks):
            part = gradients[:, block * self._size : (block + 1) * self._size]
            at = slice(0, part.shape[1])
            self._total[block, at, at] += part.T @ part

    def result(self, tokens: int, where: str) -> Float32:
        """The mean. Raises AnyQuantError unless all tokens came by, BadInputError when it is not finite."""
        if self.seen != tokens:
            raise AnyQuantError(f"{where}: {self.seen} of {tokens} gradients came back through its output")
        total = self._total.div_(tokens)
        if not require("torch").isfinite(total.sum()):
            raise BadInputError(f"{where}: the gradient at its output is not finite")
        mean: Float32 = ((total + total.mT) / 2).numpy()
        return mean[0] if self._blocks == 1 else mean


def _watched(linear: Linear) -> bool:
    return linear.expert is None and linear.role is not Role.ROUTER


def _file(name: str) -> str:
    return f"output-{name}.f32"
