"""A `transformers` model of which one block at a time has weights.

The modelling code is run as it is: the model is built with parameters on the meta device, and its own forward pass
prepares what every block is called with (rotary tables, masks). Blocks are intercepted by their place in the block
list, so no model family needs a class here. Everything is float32; there is no cache of keys and values.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint, read_rows, read_tensor, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.extras import require
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress, Silent
from anyquant.models.architecture import Architecture
from anyquant.models.placement import find_places

# model_type -> (config class, model class) of transformers
FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}

# the fields of config.json that shape the computation; nothing else of the file reaches transformers
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "qkv_bias"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
)

BATCH_TOKENS = 2048  # tokens that go through a block at once: enough for full speed, little memory
LOGIT_ELEMENTS = 1 << 25  # elements of the largest (tokens, vocabulary) matrix: 128 MiB


def plain(value: Any) -> Any:
    """A JSON value without keys that begin with an underscore, which transformers treats as its own switches."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if not str(key).startswith("_")}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def build_structure(config: Mapping[str, Any], location: str) -> Any:
    """The `transformers` causal language model of a `config.json`: parameters on meta, buffers real, evaluation mode.

    Only `FIELDS` of the config are used; no code of the model's folder is run. `location` is for error messages.
    Raises UnsupportedError for another model type, BadInputError when transformers refuses the values.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise UnsupportedError(f"{location}: cannot run model type {family!r}; it runs: {', '.join(sorted(FAMILIES))}")
    transformers, accelerate = require("transformers"), require("accelerate")
    config_class, model_class = FAMILIES[family]
    fields = {key: plain(value) for key, value in config.items() if key in FIELDS}
    try:
        # no padding id: it may lie outside the vocabulary, and nothing is padded
        settings = getattr(transformers, config_class)(**fields, pad_token_id=None, use_cache=False)
        settings._attn_implementation = "sdpa"
        settings._experts_implementation = "eager"  # one product per expert, as statistics need it
        with accelerate.init_empty_weights(include_buffers=False):
            return getattr(transformers, model_class)(settings).eval()
    except Exception as error:  # the config is foreign data, and transformers raises whatever it trips over
        raise BadInputError(f"{location}: config.json does not describe a {family} model: {error}") from error


@dataclass
class Batch:
    """Documents of one length on their way through the blocks.

    `documents` are indices into the caller's sequence, `states` a float32 tensor (documents, length, hidden).
    `calls` holds per block the further positional and keyword arguments of its call.
    """

    documents: tuple[int, ...]
    states: Any
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]

    @property
    def tokens(self) -> int:
        return int(self.states.shape[0] * self.states.shape[1])


def group_documents(documents: Sequence[Sequence[int]], batch_tokens: int) -> list[tuple[int, ...]]:
    """Indices of documents of equal length, at most `batch_tokens` tokens each but at least one document.

    Equal lengths need no padding, so a document's result does not depend on its neighbours' lengths.
    Raises UsageError for an empty document.
    """
    by_length: dict[int, list[int]] = {}
    for index, document in enumerate(documents):
        if not len(document):
            raise UsageError(f"document {index} has no tokens")
        by_length.setdefault(len(document), []).append(index)
    groups = []
    for length, indices in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        groups += [tuple(indices[start : start + size]) for start in range(0, len(indices), size)]
    return groups


class StreamedModel:
    """A checkpoint run block by block: `embed`, then each `block` in order, then `head_input` or `logits`.

    Memory: the float32 weights of one block (or of the head), the norms, and the hidden states of all batches.
    `module` is the `transformers` model, `places` tells where in its parameters the Linears of the blocks lie (by
    name). `config` replaces the checkpoint's own where its files hold none.
    Raises BadInputError when a parameter of the model is missing from the checkpoint or has another shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        config: Mapping[str, Any] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.batch_tokens = batch_tokens
        settings = checkpoint.config if config is None else config
        self._check_block_count(settings)
        self.module = build_structure(settings, checkpoint.location)
        self._torch = require("torch")
        self._layers = self.module.get_submodule(architecture.block_path)
        self._embedding = self._name_of(self.module.get_input_embeddings())
        self._head = self._name_of(self.module.get_output_embeddings())
        self._hollow = dict(self.module.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(parameter.shape) for name, parameter in self._hollow.items()}
        self.places = find_places(architecture, shapes, checkpoint.location)
        self._sources = self._bind(shapes)
        self.module.get_input_embeddings().padding_idx = None
        self._fill([name for name in self._hollow if self._is_resident(name)])

    @property
    def blocks(self) -> int:
        return len(self._layers)

    @property
    def vocabulary(self) -> int:
        return int(self._hollow[self._head].shape[0])

    @property
    def head_module(self) -> str:
        """Path of the module that computes the logits."""
        return self._head.removesuffix(".weight")

    def embed(self, documents: Sequence[Sequence[int]]) -> list[Batch]:
        """The hidden states that enter block 0, and what each block is called with.

        Only the embedding rows of the tokens that occur are read. Raises UsageError for ids outside the vocabulary.
        """
        return list(self.embed_each(documents))

    def embed_each(self, documents: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """As `embed`, one batch at a time, so that the caller may move its states elsewhere."""
        calls: dict[tuple[int, ...], Sequence[Any]] = {}
        for group in group_documents(documents, self.batch_tokens):
            ids = np.array([documents[index] for index in group], dtype=np.int64)
            batch = self._embed_batch(group, ids)
            # the arguments depend on the shape alone: one copy serves all batches of that shape
            batch.calls = calls.setdefault(ids.shape, batch.calls)
            yield batch

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
        output = self._torch.func.functional_call(block, dict(weights or {}), (states, *arguments), dict(keywords))
        return output[0] if isinstance(output, tuple) else output

    def parameters(self, index: int) -> dict[str, str]:
        """Names of the parameters of block `index`: below the block -> in the model."""
        prefix = f"{self.architecture.block_path}.{index}."
        return {name.removeprefix(prefix): name for name in self._hollow if name.startswith(prefix)}

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
        """What the head multiplies: `states` (documents, length, hidden) of the last block through the final norm."""
        with self._torch.no_grad(), self._intercept(lambda index, given, *_: states):
            return self.module.base_model(inputs_embeds=states, use_cache=False).last_hidden_state

    @contextmanager
    def head(self) -> Iterator[Callable[[Any], Float32]]:
        """A function from states (tokens, hidden) after the last block to logits (tokens, vocabulary), float32.

        It bounds nothing: hand it at most `logit_rows` tokens at a time.
        """

        def logits(states: Any) -> Float32:
            batch = states[None]
            with self._torch.no_grad(), self._intercept(lambda index, given, *_: batch):
                output = self.module(inputs_embeds=batch, use_cache=False).logits
            result: Float32 = output[0].numpy()
            return result

        try:
            self._fill([self._head])
            yield logits
        finally:
            self._empty([self._head])

    @property
    def logit_rows(self) -> int:
        """Tokens whose logits fit into the bounded matrix."""
        return max(1, LOGIT_ELEMENTS // self.vocabulary)

    def _embed_batch(self, group: tuple[int, ...], ids: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        used, local = np.unique(ids, return_inverse=True)
        rows = self.checkpoint.spec(self._embedding).rows
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

        try:
            self._assign(self._embedding, self._embedding_rows(used))
            with self._torch.no_grad(), self._intercept(record):
                tokens = self._torch.from_numpy(local.reshape(ids.shape))
                self.module.base_model(input_ids=tokens, use_cache=False)
        finally:
            self._empty([self._embedding])
        return Batch(group, entering[0], calls)

    def _embedding_rows(self, used: np.ndarray[Any, np.dtype[np.int64]]) -> Float32:
        source = self._embedding
        starts = np.flatnonzero(np.diff(used, prepend=used[0] - 2) != 1)
        runs = zip(used[starts], used[np.append(starts[1:], len(used)) - 1], strict=True)
        return np.concatenate([read_rows(self.checkpoint, source, int(first), int(last) + 1) for first, last in runs])

    @contextmanager
    def _intercept(self, answer: Callable[[int, Any, tuple[Any, ...], Mapping[str, Any]], Any]) -> Iterator[None]:
        """While active, blocks do not compute: `answer(index, states, arguments, keywords)` is their output."""

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Any, *arguments: Any, **keywords: Any) -> Any:
                return answer(index, hidden_states, arguments, keywords)

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

    def _name_of(self, module: Any) -> str:
        return next(f"{name}.weight" for name, found in self.module.named_modules() if found is module)

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str | tuple[Linear, ...]]:
        """Parameter of the model -> tensor of the checkpoint, or the Linears that fill it; all shapes checked."""
        known = set(self.checkpoint.names())
        fillers: dict[str, list[Linear]] = {}
        for name, place in self.places.items():
            fillers.setdefault(place.parameter, []).append(self.architecture.by_name[name])
        sources: dict[str, str | tuple[Linear, ...]] = {}
        for name, shape in shapes.items():
            source = self._embedding if name == self._head and self.architecture.tied else name
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
        if sum(linear.shape[0] * linear.shape[1] for linear in linears) != math.prod(shape):
            raise BadInputError(
                f"{self.checkpoint.location}: the tensors of {name} do not add up to {shape}, as config.json asks for"
            )

    def _check_block_count(self, config: Mapping[str, Any]) -> None:
        """Refuse a config that claims more blocks than there are tensors, before anything is built from it."""
        claimed = config.get("num_hidden_layers", 0)
        if not isinstance(claimed, int) or claimed > len(self.checkpoint.names()):
            raise BadInputError(
                f"{self.checkpoint.location}: config.json claims num_hidden_layers {claimed!r}, "
                f"the checkpoint holds {len(self.checkpoint.names())} tensors"
            )

    def _assign(self, name: str, values: Float32) -> None:
        owner, _, leaf = name.rpartition(".")
        parameter = self._torch.nn.Parameter(self._torch.from_numpy(values), requires_grad=False)
        setattr(self.module.get_submodule(owner), leaf, parameter)

    def _fill(self, names: Sequence[str]) -> None:
        for name in names:
            self._assign(name, self.read(name))

    def _empty(self, names: Sequence[str]) -> None:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(self.module.get_submodule(owner), leaf, self._hollow[name])
