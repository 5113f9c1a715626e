"""Outputs of those parts of a block that are final already, so that later passes through it need not compute them.

A block is passed once for each input that is observed; its attention, once quantized, gives the same output each time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from anyquant.core.linear import Linear


@dataclass
class Part:
    """A child `module` of the block and the names of the `linears` in it."""

    module: Any
    linears: frozenset[str]
    outputs: dict[str, list[Any]] = field(default_factory=dict)  # by path, for each batch: room for the output
    rests: dict[tuple[str, int], tuple[Any, ...] | None] = field(default_factory=dict)  # what was recorded: beside it


def parts_of(block: Any, path: str, linears: Sequence[Linear]) -> list[Part]:
    """The children of `block`, a torch module at `path` of the model, that have Linears, and which."""
    inside: dict[str, set[str]] = {}
    for linear in linears:
        child = linear.module.removeprefix(f"{path}.").partition(".")[0]
        inside.setdefault(child, set()).add(linear.name)
    return [Part(block.get_submodule(child), frozenset(names)) for child, names in inside.items()]


class Replay:
    """Records outputs of `parts`, of every path (the float model's, the quantized one's) and batch on its own.

    `room()` gives tensors, one for each batch, that outputs can be kept in; those of another shape are not kept.
    What the last part puts out need not be.
    """

    def __init__(self, parts: Sequence[Part], room: Callable[[], Sequence[Any]]) -> None:
        self.parts = parts
        self._room = room

    def clear(self) -> None:
        """Forget all outputs: weights that were final have changed after all."""
        for part in self.parts:
            part.rests.clear()

    @contextmanager
    def passing(
        self, path: str, batch: int, shape: tuple[int, ...], final: Callable[[str], bool], watched: frozenset[str]
    ) -> Iterator[None]:
        """For one pass of a batch, whose states have the `shape`: final parts that were run before are not run again.

        A part is final when its Linears are, and all in parts before it. One with a Linear that is `watched`, whose
        inputs are to be seen, is run.
        """
        undone: list[Callable[[], None]] = []
        moving = False  # whether a part before was not final: what enters the next is not either

        def observe(part: Part) -> None:
            def enter(*_: Any) -> None:
                nonlocal moving
                moving = moving or not all(map(final, part.linears))

            def leave(module: Any, arguments: Any, output: Any) -> None:
                if not moving and part is not self.parts[-1] and first_of(output).shape == shape:
                    self._keep(part, path, batch, output)

            undone.append(part.module.register_forward_pre_hook(enter).remove)
            undone.append(part.module.register_forward_hook(leave).remove)

        try:
            for part in self.parts:
                if (path, batch) in part.rests and not part.linears & watched:
                    part.module.forward = _again(part.outputs[path][batch], part.rests[path, batch])
                    undone.append(lambda part=part: vars(part.module).pop("forward", None))  # type: ignore[misc]
                else:
                    observe(part)
            yield
        finally:
            for undo in undone:
                undo()

    def _keep(self, part: Part, path: str, batch: int, output: Any) -> None:
        first, *rest = output if isinstance(output, tuple) else (output,)
        if any(value is not None for value in rest):
            return
        if path not in part.outputs:
            part.outputs[path] = list(self._room())
        part.outputs[path][batch].copy_(first)
        part.rests[path, batch] = tuple(rest) if isinstance(output, tuple) else None


def _again(kept: Any, rest: tuple[Any, ...] | None) -> Callable[..., Any]:
    """A forward that returns the output as it was; a copy, as the block may go on in place."""

    def forward(*_: Any, **__: Any) -> Any:
        return kept.clone() if rest is None else (kept.clone(), *rest)

    return forward


def first_of(output: Any) -> Any:
    """The states in what a module returned."""
    return output[0] if isinstance(output, tuple) else output
