"""What enters each Linear of a block while the block runs.

A Linear with a module of its own is watched by a hook on it. Experts share one module: their products are told apart by
where the weights of each lie in memory, so it does not matter how the modelling code finds its way to them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from anyquant.core.errors import AnyQuantError
from anyquant.core.linear import Linear
from anyquant.models.products import watch_products
from anyquant.models.streaming import StreamedModel

Sink = Callable[[str, Any], None]  # (input group, activations (tokens, in))
Arguments = tuple[Any, ...]


def rows_of(activations: Any) -> Any:
    """(..., in) as a matrix (tokens, in), float32."""
    return activations.detach().reshape(-1, activations.shape[-1]).float()


def first_of_groups(linears: Sequence[Linear]) -> dict[str, Linear]:
    """Input group -> the first Linear that it feeds, which is the one that is watched."""
    first: dict[str, Linear] = {}
    for linear in linears:
        first.setdefault(linear.input_group, linear)
    return first


@contextmanager
def watching(
    model: StreamedModel, groups: Mapping[str, Linear], parameters: Mapping[str, Any], sink: Sink
) -> Iterator[None]:
    """While active, `sink` is called with what enters the Linear of each group, in the order of the computation.

    `parameters` are those that the block runs with, by their names in the model. Raises AnyQuantError when a group was
    not reached at all, experts aside.
    """
    reached: set[str] = set()

    def arrive(group: str, activations: Any) -> None:
        reached.add(group)
        sink(group, rows_of(activations))

    own = {group: linear for group, linear in groups.items() if linear.expert is None}
    experts = {group: linear for group, linear in groups.items() if linear.expert is not None}
    with ExitStack() as stack:
        for group, linear in own.items():
            module = model.module.get_submodule(linear.module)
            stack.callback(module.register_forward_pre_hook(_hook(group, arrive), with_kwargs=True).remove)
        if experts:
            addresses = {
                model.places[linear.name].of(parameters[model.places[linear.name].parameter]).data_ptr(): group
                for group, linear in experts.items()
            }
            stack.enter_context(watch_products(addresses, arrive))
        yield
    missed = [groups[group] for group in own if group not in reached]
    if missed or (experts and not reached & experts.keys()):
        linear = missed[0] if missed else next(iter(experts.values()))
        raise AnyQuantError(f"{model.checkpoint.location}: nothing was seen to enter {linear.name} ({linear.module})")


def _hook(group: str, arrive: Sink) -> Callable[[Any, Arguments, Mapping[str, Any]], None]:
    def hook(module: Any, arguments: Arguments, keywords: Mapping[str, Any]) -> None:
        arrive(group, arguments[0] if arguments else next(iter(keywords.values())))

    return hook


class _Reached(Exception):  # noqa: N818 - not an error
    """All that was to be seen of a pass has been seen."""


class Enough:
    """Ends a pass through a block when every group has been reached; not where experts are, nor with `whole`."""

    def __init__(self, groups: Mapping[str, Linear], whole: bool) -> None:
        self._groups = groups.keys()
        self._early = not whole and all(linear.expert is None for linear in groups.values())
        self._seen: set[str] = set()

    def arrived(self, group: str) -> None:
        """Call when a group has been reached, as the last thing."""
        self._seen.add(group)
        if self._early and self._seen >= self._groups:
            raise _Reached

    def run(self, pass_through: Callable[[], Any]) -> Any:
        """The result of a pass, None when it was ended."""
        self._seen.clear()
        try:
            return pass_through()
        except _Reached:
            return None


class Routing:
    """The routing of one pass through a block, to be used again in another: what the experts of each module got.

    Two passes with different states route tokens differently; for statistics across both, each expert must see the same
    tokens in the same order.
    """

    def __init__(self, model: StreamedModel, linears: Sequence[Linear]) -> None:
        paths = dict.fromkeys(linear.module for linear in linears if linear.expert is not None)
        self._modules = [model.module.get_submodule(path) for path in paths]
        self._seen: list[list[Arguments]] = [[] for _ in paths]

    def __bool__(self) -> bool:
        """Whether there are experts."""
        return bool(self._modules)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember all arguments of the experts' modules but the activations."""
        for seen in self._seen:
            seen.clear()

        def record(place: int) -> Callable[[Any, Arguments], None]:
            return lambda module, arguments: self._seen[place].append(arguments[1:])

        with self._hooks(record):
            yield

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Call the experts' modules with what was remembered."""
        turns = [iter(seen) for seen in self._seen]

        def repeat(place: int) -> Callable[[Any, Arguments], Arguments]:
            return lambda module, arguments: (arguments[0], *next(turns[place]))

        with self._hooks(repeat):
            yield

    @contextmanager
    def _hooks(self, make: Callable[[int], Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for place, module in enumerate(self._modules):
                stack.callback(module.register_forward_pre_hook(make(place)).remove)
            yield
