"""detect: what a checkpoint is, from its config and the names and shapes of its tensors; no tensor data is read.

The family's table (models.families) says which tensors there must be; every tensor of the checkpoint must find its
place. The one exception to "no data": a tied model that also stores its head, where the two are compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Carried, Linear, Role, View
from anyquant.models.architecture import Architecture, Dimensions
from anyquant.models.config import Settings, read_config
from anyquant.models.families import BLOCKS, EMBEDDING, HEAD, HEAD_INPUT, OUTPUT_NORM, Norm, Slot
from anyquant.models.stored import leftovers, listed, refuse_quantized, same_values
from anyquant.models.structural import describe, is_other


@dataclass(frozen=True)
class Binding:
    """A tensor that must be there, and the Linears and carried values that account for all of its bytes."""

    tensor: str
    shape: tuple[int, ...]
    linears: tuple[Linear, ...] = ()
    carried: tuple[Carried, ...] = ()


def detect(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a floating-point checkpoint.

    A model type that the families' table does not have is described by running its class (models.structural).

    Raises UnsupportedError for a model type, config value, tensor or element type that AnyQuant does not know, and
    BadInputError for missing tensors, wrong shapes and impossible config values.
    """
    where = checkpoint.location
    if is_other(checkpoint.config):
        return describe(checkpoint)
    settings = read_config(checkpoint.config, where)
    names = set(checkpoint.names())
    unused = leftovers(names)
    refuse_quantized(checkpoint, names - unused.keys())
    bindings = list(_bindings(settings, names))
    expected = {binding.tensor for binding in bindings}
    if settings.tied and f"{HEAD}.weight" in names:
        unused |= _redundant_head(checkpoint)
    unknown = names - expected - unused.keys()
    if unknown:
        raise UnsupportedError(
            f"{where}: {listed(unknown)} not known for {settings.family.model_type}; nothing is dropped in silence"
        )
    if expected - names:
        raise BadInputError(f"{where}: {listed(expected - names)} missing, though config.json calls for it")
    for binding in bindings:
        _check(checkpoint.spec(binding.tensor), binding, where)
    return Architecture(
        family=settings.family.model_type,
        class_name=settings.family.class_name,
        dimensions=settings.dimensions,
        linears=tuple(linear for binding in bindings for linear in binding.linears),
        carried=tuple(carried for binding in bindings for carried in binding.carried),
        tied=settings.tied,
        block_path=BLOCKS,
        unused=unused,
    )


def sizes(dimensions: Dimensions, shared_expert: int) -> Mapping[str, int]:
    """The sizes that the family tables name."""
    return {
        "one": 1,
        "hidden": dimensions.hidden,
        "intermediate": dimensions.intermediate,
        "query": dimensions.heads * dimensions.head_dim,
        "key": dimensions.kv_heads * dimensions.head_dim,
        "head": dimensions.head_dim,
        "experts": dimensions.experts,
        "expert": dimensions.expert_intermediate,
        "shared_expert": shared_expert,
    }


def _bindings(settings: Settings, names: set[str]) -> Iterator[Binding]:
    """All tensors that the model must have, in order of the forward pass."""
    vocabulary, hidden = settings.dimensions.vocabulary, settings.dimensions.hidden
    # a tied embedding is the head too, and rounding it with the head's input in mind costs the embedding nothing
    yield _edge(EMBEDDING, Role.EMBEDDING, HEAD_INPUT if settings.tied else "", vocabulary, hidden)
    for block in range(settings.dimensions.blocks):
        yield from _block(settings, names, block)
    norm = Carried("output_norm", "output_norm", OUTPUT_NORM, 0, hidden, None)
    yield Binding(OUTPUT_NORM, (hidden,), carried=(norm,))
    if not settings.tied:
        yield _edge(HEAD, Role.HEAD, HEAD_INPUT, vocabulary, hidden)


def _edge(module: str, role: Role, group: str, rows: int, columns: int) -> Binding:
    """The embedding or the head."""
    view = View(f"{module}.weight", 0, rows, columns)
    return Binding(view.tensor, (rows, columns), (Linear(role.value, role, view, None, group, module),))


def _block(settings: Settings, names: set[str], block: int) -> Iterator[Binding]:
    """One block: norms and attention, then the last norm and the feed-forward part."""
    size = sizes(settings.dimensions, settings.shared_expert)
    *before, feed_forward = settings.family.norms
    for norm in before:
        yield _norm(norm, size, block)
    for slot in settings.family.attention:
        yield from _stored(slot, settings, size, block)
    yield _norm(feed_forward, size, block)
    for slot in _feed_forward(settings, names, block):
        yield from _stored(slot, settings, size, block)


def _norm(norm: Norm, size: Mapping[str, int], block: int) -> Binding:
    tensor, length = f"{BLOCKS}.{block}.{norm.tensor}", size[norm.length]
    carried = Carried(f"blocks.{block}.{norm.role}", norm.role, tensor, 0, length, block)
    return Binding(tensor, (length,), carried=(carried,))


def _stored(slot: Slot, settings: Settings, size: Mapping[str, int], block: int) -> Iterator[Binding]:
    """The tensors of one slot: one, one per expert, or a matrix and its bias."""
    tensor, experts = f"{BLOCKS}.{block}.{slot.tensor}", range(settings.dimensions.experts)
    if slot.per_expert:
        for expert in experts:
            yield _matrix(slot, size, block, tensor.format(expert=expert), (expert,))
    elif slot.stacked:
        yield _matrix(slot, size, block, tensor, experts)
    else:
        yield _matrix(slot, size, block, tensor, (None,))
        if not slot.owner and any(role in settings.biased for role, _ in slot.parts):
            carried = tuple(_biases(slot, size, block, tensor.removesuffix("weight") + "bias"))
            yield Binding(carried[0].tensor, (sum(part.length for part in carried),), carried=carried)


def _feed_forward(settings: Settings, names: set[str], block: int) -> tuple[Slot, ...]:
    """The slots of a block's feed-forward part; where experts may be stored in several ways, the one that is there."""
    if block not in settings.sparse_blocks:
        return settings.family.dense
    for slots in settings.family.sparse:
        if all(f"{BLOCKS}.{block}.{slot.tensor.format(expert=0)}" in names for slot in slots):
            return slots
    return settings.family.sparse[0]


def _matrix(slot: Slot, size: Mapping[str, int], block: int, tensor: str, experts: Sequence[int | None]) -> Binding:
    """A stored matrix as row views, expert by expert, part by part."""
    path, prefix = f"{BLOCKS}.{block}.", f"blocks.{block}."
    columns, start, linears = size[slot.columns], 0, []
    for expert in experts:
        own = f"{prefix}experts.{expert}." if expert is not None else prefix + slot.owner
        group = (own if expert is not None else prefix) + slot.group
        for role, rows in slot.parts:
            view = View(tensor, start, size[rows], columns)
            linears.append(Linear(own + role.value, role, view, block, group, path + slot.module, expert))
            start += size[rows]
    rows_each = start // len(experts)
    shape = (len(experts), rows_each, columns) if slot.stacked else (rows_each, columns)
    return Binding(tensor, shape, tuple(linears))


def _biases(slot: Slot, size: Mapping[str, int], block: int, tensor: str) -> Iterator[Carried]:
    start = 0
    for role, rows in slot.parts:
        name = f"{role.value}_bias"
        yield Carried(f"blocks.{block}.{name}", name, tensor, start, size[rows], block)
        start += size[rows]


def _check(spec: TensorSpec, binding: Binding, where: str) -> None:
    if spec.shape != binding.shape:
        raise BadInputError(
            f"{where}: {spec.name} has shape {list(spec.shape)}, but config.json calls for {list(binding.shape)}"
        )


def _redundant_head(checkpoint: Checkpoint) -> dict[str, str]:
    """A head stored beside the embedding it is tied to: of no use when equal, a contradiction when not."""
    head, embedding = checkpoint.spec(f"{HEAD}.weight"), checkpoint.spec(f"{EMBEDDING}.weight")
    if same_values(checkpoint, head, embedding):
        return {head.name: "the model is tied and this is the embedding once more"}
    raise UnsupportedError(
        f"{checkpoint.location}: tie_word_embeddings is true, but {head.name} differs from {embedding.name}; set "
        "tie_word_embeddings to false in a copy of config.json if the head is meant"
    )
