"""A `transformers` model of which one block at a time has weights.

The modelling code is run as it is: the model is built with parameters on the meta device, and its own forward pass
prepares what every block is called with (rotary tables, masks). Blocks are intercepted by their place in the block
list, so no model family needs a class here. Everything is float32; there is no cache of keys and values.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from anyquant.core.arithmetic import DTYPES, products_in
from anyquant.core.checkpoint import Checkpoint, read_rows, read_tensor, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.extras import require
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress, Silent
from anyquant.models.architecture import Architecture
from anyquant.models.batches import Batch, group_documents, same_arguments
from anyquant.models.building import build_structure, stored_names
from anyquant.models.placement import find_places

BATCH_TOKENS = 2048  # tokens that go through a block at once: enough for full speed, little memory
GAP = 4  # rows of the embedding that are read in vain to save opening the file again
LOGIT_ELEMENTS = 1 << 25  # elements of the largest (tokens, vocabulary) matrix: 128 MiB


class StreamedModel:
    """A checkpoint run block by block: `embed`, then each `block` in order, then `head_input` or `logits`.

    Memory: the float32 weights of one block (or of the head), the norms, and the hidden states of all batches.
    `module` is the `transformers` model, `places` tells where in its parameters the Linears of the blocks lie (by
    name), `stored` what the checkpoint calls the parameters that it stores on their own. `config` replaces the
    checkpoint's own where its files hold none. `dtype` is one of DTYPES.
    Raises BadInputError when a parameter of the model is missing from the checkpoint or has another shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        config: Mapping[str, Any] | None = None,
        batch_tokens: int = BATCH_TOKENS,
        dtype: str = DTYPES[0],
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.batch_tokens = batch_tokens
        settings = checkpoint.config if config is None else config
        self.module = build_structure(settings, checkpoint.location, len(checkpoint.names()))
        self._torch = require("torch")
        self.dtype = dtype
        self._layers = self._find_blocks()
        self._embedding = self._path_of(self.module.get_input_embeddings()) + ".weight"
        head = self.module.get_output_embeddings()
        self._head = None if head is None else self._path_of(head) + ".weight"
        self._hollow = dict(self.module.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(parameter.shape) for name, parameter in self._hollow.items()}
        self.places = find_places(architecture, shapes, checkpoint.location)
        self.stored = stored_names(self.module, checkpoint.names())
        self._sources = self._bind(shapes)
        self.module.get_input_embeddings().padding_idx = None
        self._fill([name for name in self._hollow if self._is_resident(name)])
        self._fill_buffers()
        self._returns_tuple = self._probe()

    @property
    def blocks(self) -> int:
        return len(self._layers)

    @property
    def vocabulary(self) -> int:
        return int(self._hollow[self._head or self._embedding].shape[0])

    @property
    def embedding_module(self) -> str:
        """Path of the module that looks tokens up."""
        return self._embedding.removesuffix(".weight")

    @property
    def head_module(self) -> str:
        """Path of the module that computes the logits, "" when there is none."""
        return (self._head or "").removesuffix(".weight")

    def embed(self, documents: Sequence[Sequence[int]]) -> list[Batch]:
        """The hidden states that enter block 0, and what each block is called with.

        Only the embedding rows of the tokens that occur are read. Raises UsageError for ids outside the vocabulary.
        """
        return list(self.embed_each(documents))

    def embed_each(
        self,
        documents: Sequence[Sequence[int]],
        rows: Callable[[np.ndarray[Any, np.dtype[np.int64]]], Float32] | None = None,
    ) -> Iterator[Batch]:
        """As `embed`, one batch at a time, so that the caller may move its states elsewhere.

        `rows` gives the rows of the embedding for ascending ids, in the place of the checkpoint's.
        """
        calls: dict[tuple[int, ...], Sequence[Any]] = {}
        for group in group_documents(documents, self.batch_tokens):
            ids = np.array([documents[index] for index in group], dtype=np.int64)
            batch = self._embed_batch(group, ids, rows)
            # mostly the arguments depend on the shape alone: then one copy serves all batches of that shape
            shared = calls.setdefault(ids.shape, batch.calls)
            batch.calls = shared if same_arguments(shared, batch.calls, self._torch) else batch.calls
            yield batch

    def embedding_gradients(
        self, document: Sequence[int], gradients: Sequence[Any]
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[Any]]:
        """The ids that occur in a document, and the gradient at their rows of the embedding, (ids, width), for each of
        the `gradients` (1, length, hidden) at the states that enter block 0."""
        ids = np.array([document], dtype=np.int64)
        used, entering, found = np.unique(ids), [], []

        def record(index: int, given: Any, *_: Any) -> Any:
            entering.append(given)
            return given

        with self._torch.enable_grad(), self._intercept(record), self._embedding_of(used):
            rows = self.module.get_input_embeddings().weight.requires_grad_()
            self.module.base_model(input_ids=self._torch.from_numpy(ids))
            for gradient in gradients:
                rows.grad = None
                entering[0].backward(gradient, retain_graph=True)
                found.append(rows.grad)
        return used, found

    @contextmanager
    def block(self, index: int) -> Iterator[Any]:
        """Block `index` with its weights, for the time of the `with` statement; then they are freed."""
        names = list(self.parameters(index).values())
        try:
            self._fill(names)
            yield self._layers[index]
        finally:
            self._empty(names)

    def advance(self, index: int, block: Any, batch: Batch) -> None:
        """Replace the states of `batch` by what `block`, given by `with model.block(index)`, makes of them."""
        with self._torch.no_grad():
            batch.states = self.apply(index, block, batch, batch.states)

    def apply(self, index: int, block: Any, batch: Batch, states: Any, weights: Mapping[str, Any] | None = None) -> Any:
        """What `block` makes of `states`, which stand in the place of the batch's own.

        `weights` replaces parameters by their names below the block; gradients flow to them where they are enabled.
        """
        arguments, keywords = batch.calls[index]
        with products_in(self.dtype):
            output = self._torch.func.functional_call(block, dict(weights or {}), (states, *arguments), dict(keywords))
        return (output[0] if isinstance(output, tuple) else output).float()

    def parameters(self, index: int) -> dict[str, str]:
        """Names of the parameters of block `index`: below the block -> in the model."""
        prefix = f"{self.architecture.block_path}.{index}."
        return {name.removeprefix(prefix): name for name in self._hollow if name.startswith(prefix)}

    def parameter_of(self, tensor: str) -> str:
        """The parameter that a tensor of the checkpoint fills on its own."""
        return next((name for name, source in self._sources.items() if source == tensor), tensor)

    def read(self, name: str) -> Float32:
        """The source's values of a parameter of the model, float32 in its shape."""
        source = self._sources[name]
        if isinstance(source, str):
            return read_tensor(self.checkpoint, source)
        values = np.empty(tuple(self._hollow[name].shape), dtype=np.float32)
        for linear in source:
            self.places[linear.name].of(values)[...] = read_view(self.checkpoint, linear.view, 0, linear.shape[0])
        return values

    def run_blocks(self, batches: Sequence[Batch], progress: Progress | None = None) -> None:
        """All batches through all blocks; `progress` advances by tokens; each block is its share."""
        sink = progress or Silent()
        for index in range(self.blocks):
            with self.block(index) as block:
                for batch in batches:
                    self.advance(index, block, batch)
                    sink.advance(batch.tokens / self.blocks)

    def head_input(self, states: Any) -> Any:
        """What the head multiplies, for `states` (documents, length, hidden) after the last block.

        Of a model without a head: its last states.
        """
        with self._torch.no_grad(), self._intercept(lambda index, given, *_: states):
            if self._head is None:
                return self._run_outside(self.module.base_model, states.shape[:2]).last_hidden_state
            caught: list[Any] = []
            head = self.module.get_submodule(self.head_module)

            def catch(entering: Any) -> Any:
                caught.append(entering)
                return entering

            try:
                head.forward = catch
                self._run_outside(self.module, states.shape[:2])
            finally:
                vars(head).pop("forward", None)
        return caught[0]

    @contextmanager
    def head(self) -> Iterator[Callable[[Any], Float32]]:
        """A function from states (tokens, hidden) after the last block to logits (tokens, vocabulary), float32.

        It bounds nothing: hand it at most `logit_rows` tokens at a time. Raises UnsupportedError for a model without
        logits.
        """
        with self.torch_head() as torch_logits:

            def logits(states: Any) -> Float32:
                with self._torch.no_grad():
                    result: Float32 = torch_logits(states).numpy()
                return result

            yield logits

    @contextmanager
    def torch_head(self) -> Iterator[Callable[[Any], Any]]:
        """As `head`; the logits are a torch tensor, from which gradients flow to the states where they are enabled."""
        if self._head is None:
            raise UnsupportedError(f"{self.checkpoint.location}: {self.architecture.class_name} computes no logits")

        def logits(states: Any) -> Any:
            batch = states[None]
            with self._intercept(lambda index, given, *_: batch):
                return self._run_outside(self.module, batch.shape[:2]).logits[0]

        try:
            self._fill([self._head])
            yield logits
        finally:
            self._empty([self._head])

    @property
    def logit_rows(self) -> int:
        """Tokens whose logits fit into the bounded matrix."""
        return max(1, LOGIT_ELEMENTS // self.vocabulary)

    def _embed_batch(
        self,
        group: tuple[int, ...],
        ids: np.ndarray[Any, np.dtype[np.int64]],
        given_rows: Callable[[np.ndarray[Any, np.dtype[np.int64]]], Float32] | None,
    ) -> Batch:
        used = np.unique(ids)
        rows = self.checkpoint.spec(self._source_of_embedding).rows
        if used[0] < 0 or used[-1] >= rows:
            wrong = int(used[0] if used[0] < 0 else used[-1])
            raise UsageError(
                f"document {group[0]} or one of its length holds token {wrong}; ids run from 0 to {rows - 1}"
            )
        calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
        entering = []

        def record(index: int, given: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
            entering.append(given)
            calls.append((arguments, keywords))
            return given

        with self._torch.no_grad(), self._intercept(record), self._embedding_of(used, given_rows):
            self.module.base_model(input_ids=self._torch.from_numpy(ids))
        return Batch(group, entering[0], calls)

    @contextmanager
    def _embedding_of(
        self,
        used: np.ndarray[Any, np.dtype[np.int64]] | None,
        rows: Callable[[np.ndarray[Any, np.dtype[np.int64]]], Float32] | None = None,
    ) -> Iterator[None]:
        """While active the embedding has the rows of the ascending ids `used`; None: every id is a row of zeros."""
        torch, width = self._torch, self._hollow[self._embedding].shape[1]
        values = np.zeros((1, width), np.float32) if used is None else (rows or self._embedding_rows)(used)
        ids = None if used is None else torch.from_numpy(used)

        def look_up(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (torch.zeros_like(arguments[0]) if ids is None else torch.searchsorted(ids, arguments[0]),)

        handle = self.module.get_input_embeddings().register_forward_pre_hook(look_up)
        try:
            self._assign(self._embedding, values)
            yield
        finally:
            handle.remove()
            self._empty([self._embedding])

    def _run_outside(self, module: Any, shape: tuple[int, int]) -> Any:
        """Run all but the blocks, which are intercepted, on `shape` (documents, length) tokens that mean nothing."""
        with self._embedding_of(None):
            return module(input_ids=self._torch.zeros(shape, dtype=self._torch.long))

    def _probe(self) -> bool:
        """Whether blocks return a tuple. Raises UnsupportedError unless each is called once, with what the one before
        returned."""
        reason = ""
        for self._returns_tuple in (False, True):
            given: list[tuple[int, Any]] = []

            def answer(index: int, states: Any, *_: Any, given: list[tuple[int, Any]] = given) -> Any:
                given.append((index, states.clone()))
                return states

            try:
                with self._torch.no_grad(), self._intercept(answer):
                    self._run_outside(self.module.base_model, (2, 3))
            except Exception as error:  # modelling code trips over a wrong return value in any way it likes
                reason = f": {error}"
                continue
            first = given[0][1] if given else None
            in_order = [index for index, _ in given] == list(range(self.blocks))
            if in_order and all(states.shape[:2] == (2, 3) and self._torch.equal(states, first) for _, states in given):
                return self._returns_tuple
        raise UnsupportedError(
            f"{self.checkpoint.location}: the blocks of {self.architecture.class_name} are not called one after the "
            f"other{reason}"
        )

    def _embedding_rows(self, used: np.ndarray[Any, np.dtype[np.int64]]) -> Float32:
        source = self._source_of_embedding
        runs = np.split(used, np.flatnonzero(np.diff(used) > GAP) + 1)
        return np.concatenate(
            [read_rows(self.checkpoint, source, int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs]
        )

    @contextmanager
    def _intercept(self, answer: Callable[[int, Any, tuple[Any, ...], Mapping[str, Any]], Any]) -> Iterator[None]:
        """While active, blocks do not compute: `answer(index, states, arguments, keywords)` is their output."""

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Any, *arguments: Any, **keywords: Any) -> Any:
                output = answer(index, hidden_states, arguments, keywords)
                return (output,) if self._returns_tuple else output

            return forward

        try:
            for index, layer in enumerate(self._layers):
                layer.forward = stand_in(index)
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)

    def _is_resident(self, name: str) -> bool:
        inside = name.startswith(self.architecture.block_path + ".")
        return not inside and name not in (self._embedding, self._head)

    def _path_of(self, module: Any) -> str:
        return next(str(name) for name, found in self.module.named_modules() if found is module)

    def _find_blocks(self) -> Any:
        try:
            return self.module.get_submodule(self.architecture.block_path)
        except AttributeError:
            raise UnsupportedError(
                f"{self.checkpoint.location}: a model of type {self.module.config.model_type!r} has no blocks at "
                f"{self.architecture.block_path}"
            ) from None

    @property
    def _source_of_embedding(self) -> str:
        source = self._sources[self._embedding]
        if not isinstance(source, str):
            raise UnsupportedError(f"{self.checkpoint.location}: the embedding is not stored as one matrix")
        return source

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str | tuple[Linear, ...]]:
        """Parameter of the model -> tensor of the checkpoint, or the Linears that fill it; all shapes checked."""
        known = set(self.checkpoint.names())
        fillers: dict[str, list[Linear]] = {}
        for name, place in self.places.items():
            fillers.setdefault(place.parameter, []).append(self.architecture.by_name[name])
        sources: dict[str, str | tuple[Linear, ...]] = {}
        for name, shape in shapes.items():
            source = self.stored.get(name, self.module.all_tied_weights_keys.get(name, name))
            if source in known or name not in fillers:
                self._check_shape(source, shape, known)
                sources[name] = source
            else:
                sources[name] = tuple(fillers[name])
                self._check_fillers(name, fillers[name], shape, known)
        return sources

    def _check_shape(self, source: str, shape: tuple[int, ...], known: set[str]) -> None:
        if source not in known:
            raise BadInputError(f"{self.checkpoint.location}: tensor {source} is missing, the model needs it")
        stored = self.checkpoint.spec(source).shape
        if stored != shape:
            raise BadInputError(
                f"{self.checkpoint.location}: tensor {source} has shape {stored}, config.json asks for {shape}"
            )

    def _check_fillers(self, name: str, linears: Sequence[Linear], shape: tuple[int, ...], known: set[str]) -> None:
        """Refuse Linears that leave a part of the parameter open, or whose tensors are not there."""
        for linear in linears:
            if linear.view.tensor not in known:
                raise BadInputError(
                    f"{self.checkpoint.location}: tensor {linear.view.tensor} is missing, the model needs it"
                )
        if sum(linear.weights for linear in linears) != math.prod(shape):
            raise BadInputError(
                f"{self.checkpoint.location}: the tensors of {name} do not add up to {shape}, as config.json asks for"
            )

    def _assign(self, name: str, values: Float32) -> None:
        owner, _, leaf = name.rpartition(".")
        parameter = self._torch.nn.Parameter(self._torch.from_numpy(values), requires_grad=False)
        setattr(self.module.get_submodule(owner), leaf, parameter)

    def _fill(self, names: Sequence[str]) -> None:
        for name in names:
            self._assign(name, self.read(name))

    def _fill_buffers(self) -> None:
        """Buffers that the checkpoint stores (a router's bias); the others follow from the config."""
        for name, buffer in self.module.named_buffers():
            if name in self.stored:
                values = self._torch.from_numpy(read_tensor(self.checkpoint, self.stored[name]))
                if values.shape != buffer.shape:
                    raise BadInputError(
                        f"{self.checkpoint.location}: tensor {self.stored[name]} has shape {tuple(values.shape)}, "
                        f"config.json asks for {tuple(buffer.shape)}"
                    )
                buffer.copy_(values)

    def _empty(self, names: Sequence[str]) -> None:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, self._hollow[name])
