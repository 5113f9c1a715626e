"""Statistics of a whole model, one block in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anyquant.calibrate.stats import SecondMoments, Statistics
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.linear import Linear, Role
from anyquant.core.progress import Progress, Silent
from anyquant.models.architecture import Architecture
from anyquant.models.families import HEAD_INPUT
from anyquant.models.streaming import Batch, StreamedModel


def collect(
    checkpoint: Checkpoint,
    architecture: Architecture,
    documents: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> Statistics:
    """Second moments of every input group of the blocks and of the head's input.

    `documents` are token ids. Progress counts tokens; each block is its share of them.

    Raises UsageError when there are no tokens, BadInputError naming the module when an activation is not finite,
    UnsupportedError for experts.
    """
    if not any(len(document) for document in documents):
        raise UsageError("no tokens to calibrate with; give a longer text")
    sink = progress or Silent()
    observed = observed_groups(architecture)
    model = StreamedModel(checkpoint, architecture)
    batches = model.embed([document for document in documents if len(document)])
    sink.start("calibrate", float(sum(batch.tokens for batch in batches)), "tokens")
    moments: dict[str, SecondMoments] = {}
    for index in range(model.blocks):
        groups = {group: linear for group, linear in observed.items() if linear.block == index}
        moments |= _observe_block(model, index, groups, batches, sink)
    moments[HEAD_INPUT] = _observe_head(model, batches)
    sink.finish()
    return Statistics({group: running.result() for group, running in moments.items()})


def observed_groups(architecture: Architecture) -> dict[str, Linear]:
    """Input group of the blocks -> the first Linear that it feeds, whose module is watched."""
    first: dict[str, Linear] = {}
    for linear in architecture.linears:
        if linear.block is None or linear.role is Role.EMBEDDING:
            continue
        if linear.expert is not None:
            raise UnsupportedError(
                f"{linear.name}: statistics of experts are not collected yet; use data-free rounding"
            )
        first.setdefault(linear.input_group, linear)
    return first


def _observe_block(
    model: StreamedModel, index: int, groups: dict[str, Linear], batches: Sequence[Batch], progress: Progress
) -> dict[str, SecondMoments]:
    moments = {
        group: SecondMoments(linear.shape[1], f"{model.checkpoint.location}: block {index}, {linear.module}")
        for group, linear in groups.items()
    }
    with model.block(index) as block, _watching(model, groups, moments):
        for batch in batches:
            model.advance(index, block, batch)
            progress.advance(batch.tokens / model.blocks)
    return moments


@contextmanager
def _watching(model: StreamedModel, groups: dict[str, Linear], moments: dict[str, SecondMoments]) -> Iterator[None]:
    """Feed what enters the module of each group to its running sums."""

    def hook(running: SecondMoments) -> Callable[[Any, tuple[Any, ...]], None]:
        def add(module: Any, arguments: tuple[Any, ...]) -> None:
            running.add(_rows(arguments[0]))

        return add

    handles = []
    try:
        for group, linear in groups.items():
            try:
                module = model.module.get_submodule(linear.module)
            except AttributeError:
                raise UnsupportedError(
                    f"{model.checkpoint.location}: the transformers model has no module {linear.module}"
                ) from None
            handles.append(module.register_forward_pre_hook(hook(moments[group])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe_head(model: StreamedModel, batches: Sequence[Batch]) -> SecondMoments:
    hidden = int(batches[0].states.shape[-1])
    running = SecondMoments(hidden, f"{model.checkpoint.location}: {model.head_module}")
    for batch in batches:
        running.add(_rows(model.head_input(batch.states)))
    return running


def _rows(activations: Any) -> Any:
    """(..., in) torch float32 as a numpy matrix (tokens, in)."""
    return activations.detach().reshape(-1, activations.shape[-1]).numpy()
