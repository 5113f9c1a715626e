"""The residual stream inside a block: what a matrix finds there to which it adds its output."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from anyquant.calibrate.replay import split
from anyquant.core.linear import Linear, Role

WRITERS = frozenset({Role.ATTN_OUTPUT, Role.FFN_DOWN})
TOLERANCE = 1e-4  # relative: whether a block's output is its input and the outputs of the writers


def writers(linears: Sequence[Linear]) -> dict[str, Linear]:
    """Input group -> the only Linear that it feeds, where that adds its output to the residual stream."""
    alone: dict[str, list[Linear]] = {}
    for linear in linears:
        alone.setdefault(linear.input_group, []).append(linear)
    return {
        group: found[0]
        for group, found in alone.items()
        if len(found) == 1 and found[0].role in WRITERS and found[0].expert is None
    }


class StreamSum:
    """While `following`, `now` is the residual stream (tokens, hidden): the input and what `modules` put out so far.

    These are the writers, or the parts of the block that they are in, where these put out what their writers do.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules
        self.now: Any = None

    @contextmanager
    def following(self, states: Any) -> Iterator[None]:
        """For one pass of a block that `states` (documents, length, hidden) enter."""
        self.now = states.reshape(-1, states.shape[-1])

        def add(module: Any, arguments: Any, output: Any) -> None:
            self.now = self.now + split(output)[0].detach().reshape(self.now.shape)

        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_hook(add).remove)
            yield

    def explains(self, output: Any) -> bool:
        """Whether the block's output, after a pass, is the stream: it is not where outputs are scaled or normalised."""
        flat = output.reshape(self.now.shape)
        return bool((flat - self.now).norm() <= TOLERANCE * flat.norm())
