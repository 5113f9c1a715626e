"""What stays the same from one pass through a block to the next is kept, so that it is computed once.

A block is passed again for each input that is observed. Its attention, say, is a part of it: once the matrices there
are final, its output is; and before, once all but the last matrix are, what enters that one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from anyquant.core.linear import Linear

Pass = tuple[str, int]  # whose states (the float model's, the quantized one's), number of the batch


@dataclass
class Part:
    """A child `module` of a block and the names of the `linears` in it.

    `last` is the name and the module of the one that adds to the residual stream, if it is known that the part puts
    out what this one does, and `rest` what it returns beside. `sound`: it is called once in a pass and, where a writer
    of the stream is in it, puts out what that one does; others are left alone.
    """

    module: Any
    linears: frozenset[str]
    last: tuple[str, Any] | None = None
    rest: tuple[Any, ...] | None = None
    sound: bool = False


@dataclass(frozen=True)
class Kept:
    """The output of a part with what is returned `beside` it (None: it is no tuple), or what enters its last Linear."""

    states: Any
    is_output: bool
    beside: tuple[Any, ...] | None = None


def parts_of(block: Any, path: str, linears: Sequence[Linear]) -> list[Part]:
    """The children of `block`, a torch module at `path` of the model, that have Linears, and which."""
    inside: dict[str, set[str]] = {}
    for linear in linears:
        child = linear.module.removeprefix(f"{path}.").partition(".")[0]
        if linear.module.startswith(f"{path}."):
            inside.setdefault(child, set()).add(linear.name)
    return [Part(block.get_submodule(child), frozenset(names)) for child, names in inside.items()]


class Replay:
    """Keeps states of `parts` of a block while they take at most `room` bytes; the others are computed again.

    What the last part puts out is not kept, as nothing comes behind it. Nothing is before `learning`.
    """

    def __init__(self, parts: Sequence[Part], room: int) -> None:
        self.parts = parts
        self._room = room
        self._kept: dict[tuple[Pass, int], Kept] = {}

    def clear(self) -> None:
        """Forget all: weights that were final have changed."""
        for key in list(self._kept):
            self._drop(key)

    @contextmanager
    def learning(self, writers: Sequence[tuple[str, Any]]) -> Iterator[None]:
        """For one whole pass: see which parts put out what one of the `writers`, names and modules, in them does."""
        seen: dict[str, Any] = {}
        undone: list[Callable[[], None]] = []
        calls = [0] * len(self.parts)

        def count(number: int) -> Callable[..., None]:
            def called(*_: Any) -> None:
                calls[number] += 1

            return called

        def leave_writer(name: str) -> Callable[..., None]:
            return lambda module, arguments, output: seen.update({name: output})

        def leave(part: Part, name: str, writer: Any) -> Callable[..., None]:
            def compare(module: Any, arguments: Any, output: Any) -> None:
                states, beside = split(output)
                same = name in seen and seen[name].shape == getattr(states, "shape", None)
                if same and bool((seen[name] == states).all()):
                    part.last, part.rest = ((name, writer), beside) if _keepable(states, beside) else (None, None)

            return compare

        for number, part in enumerate(self.parts):
            undone.append(part.module.register_forward_pre_hook(count(number)).remove)
        for name, writer in writers:
            for part in (part for part in self.parts if name in part.linears and part.module is not writer):
                undone.append(writer.register_forward_hook(leave_writer(name)).remove)
                undone.append(part.module.register_forward_hook(leave(part, name, writer)).remove)
        try:
            yield
        finally:
            for undo in undone:
                undo()
        inside = {name for name, _ in writers}
        alone = [module for _, module in writers]
        for part, times in zip(self.parts, calls, strict=True):
            plain = not part.linears & inside or part.last is not None or any(part.module is one for one in alone)
            part.sound = times == 1 and plain

    @contextmanager
    def passing(
        self, through: Pass, final: Callable[[str], bool], watched: frozenset[str], keep: bool
    ) -> Iterator[None]:
        """For one pass of a batch: what was kept is not computed again, and with `keep`, what is final now is kept.

        A part is final when its Linears are, and those of all parts before it. One with a Linear that is `watched`,
        whose inputs are to be seen, is computed.
        """
        undone: list[Callable[[], None]] = []
        moving: list[Part] = []  # parts before whose output is not final

        def follow(number: int, part: Part) -> None:
            key = (through, number)

            def leave(module: Any, arguments: Any, output: Any) -> None:
                states, beside = split(output)
                if not all(map(final, part.linears)):
                    moving.append(part)
                elif keep and part.sound and not moving and part is not self.parts[-1] and _keepable(states, beside):
                    self._keep(key, Kept(states, True, beside))

            undone.append(part.module.register_forward_hook(leave).remove)
            if part.last is None or not part.sound or not keep or key in self._kept:
                return
            name, last = part.last

            def enter_last(module: Any, arguments: Any) -> None:
                if arguments and not moving and all(map(final, part.linears - {name})):
                    self._keep(key, Kept(arguments[0], False))

            undone.append(last.register_forward_pre_hook(enter_last, prepend=True).remove)

        try:
            for number, part in enumerate(self.parts):
                kept = self._kept.get((through, number))
                if kept is not None and not part.linears & watched:
                    part.module.forward = _again(part, kept)
                    undone.append(lambda part=part: vars(part.module).pop("forward", None))  # type: ignore[misc]
                    if kept.is_output:
                        continue
                follow(number, part)
            yield
        finally:
            for undo in undone:
                undo()

    def _keep(self, key: tuple[Pass, int], kept: Kept) -> None:
        before = self._kept.get(key)
        free = self._room + (_bytes(before) if before else 0)
        if (before and before.is_output) or _bytes(kept) > free:
            return
        self._drop(key)
        self._room -= _bytes(kept)
        self._kept[key] = Kept(kept.states.detach().clone(), kept.is_output, kept.beside)

    def _drop(self, key: tuple[Pass, int]) -> None:
        if key in self._kept:
            self._room += _bytes(self._kept.pop(key))


def split(output: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """The states in what a module returned, and what is beside them; None where it returned nothing but these."""
    return (output[0], tuple(output[1:])) if isinstance(output, tuple) else (output, None)


def _keepable(states: Any, beside: tuple[Any, ...] | None) -> bool:
    """Whether it is one tensor, and nothing is returned beside it that would have to be kept, too."""
    return hasattr(states, "nbytes") and (beside is None or all(value is None for value in beside))


def _bytes(kept: Kept) -> int:
    return int(kept.states.nbytes)


def _again(part: Part, kept: Kept) -> Callable[..., Any]:
    """A forward for the part. An output is copied, as the block may go on in place."""

    def forward(*_: Any, **__: Any) -> Any:
        if kept.is_output:
            states, beside = kept.states.clone(), kept.beside
        else:
            assert part.last is not None  # noqa: S101
            states, beside = part.last[1](kept.states), part.rest
        return states if beside is None else (states, *beside)

    return forward
