"""The residual stream inside a block: what a matrix finds there to which it adds its output."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from anyquant.calibrate.replay import split
from anyquant.core.linear import Linear, Role

WRITERS = frozenset({Role.ATTN_OUTPUT, Role.FFN_DOWN})
# relative: whether a block's output is its input and the outputs of the writers
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}


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
            states = split(output)[0].detach()
            if states.numel() == self.now.numel():  # else a part of the tokens: then nothing adds up
                self.now = self.now + states.reshape(self.now.shape)

        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_hook(add).remove)
            yield

    def explains(self, output: Any, dtype: str) -> bool:
        """Whether the block's output, after a pass with products in `dtype`, is the stream: it is not where outputs are
        scaled or normalised."""
        flat = output.reshape(self.now.shape)
        return bool((flat - self.now).norm() <= TOLERANCES[dtype] * flat.norm())
