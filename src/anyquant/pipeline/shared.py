"""What the targets of one run have in common: the text, the calibration, the logits of the original, and plans."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

from anyquant.calibrate.text import Document
from anyquant.pipeline.measure import ReferenceLogits
from anyquant.pipeline.quantized import Quantizer
from anyquant.pipeline.recipe import Recipe

Made = TypeVar("Made")


class Shared(ExitStack):
    """`with Shared(several) as shared:` what the targets need of one source is made by the first that asks for it.

    With one target the logits of a split are let go as soon as they are not needed; with `several` they stay until the
    end: two bytes per token and entry of the vocabulary, on the disk of the output. `plans`: recipe and target of
    what a search found, by format: targets that load the same files get the same plan. `quantizer`: None before one is
    made.
    """

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self._several = several
        self._made: dict[str, Any] = {}
        self._references: dict[tuple[Document, ...], ReferenceLogits] = {}
        self.plans: dict[str, tuple[Recipe, str]] = {}
        self.quantizer: Quantizer | None = None

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` makes, and made when it was first asked for under this name."""
        if name not in self._made:
            self._made[name] = make()
        return cast("Made", self._made[name])

    def quantizing(self, make: Callable[[], Quantizer]) -> Quantizer:
        """The one that chooses the values for all targets; entered here, left with this."""
        if self.quantizer is None:
            self.quantizer = self.enter_context(make())
        return self.quantizer

    def forget(self) -> None:
        """The output is in its place: what was kept for going on after an interruption is not needed any more."""
        if self.quantizer is not None:
            self.quantizer.remove()

    @contextmanager
    def reference(
        self, documents: Sequence[Document], make: Callable[[], ReferenceLogits]
    ) -> Iterator[ReferenceLogits]:
        """The original's logits of some documents."""
        key = tuple(documents)
        if key in self._references:
            yield self._references[key]
            return
        found = make()
        if self._several:
            self._references[key] = found
            self.callback(found.close)
            yield found
            return
        try:
            yield found
        finally:
            found.close()
