"""Chain: the calibration documents on their way through the blocks, each of which they leave as it was quantized."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from anyquant.calibrate import states as storage
from anyquant.calibrate.live import LiveBlock
from anyquant.calibrate.states import States
from anyquant.calibrate.stats import Moments, Running
from anyquant.calibrate.watch import rows_of
from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.core.progress import Progress, Silent
from anyquant.models.batches import Batch, group_documents
from anyquant.models.streaming import StreamedModel

KEPT_BYTES = 1 << 28  # of what is kept inside a block between passes


class Chain:
    """`documents` (token ids) before block `index`; `block(index)` is next, and `head` after the last.

    `both` keeps the states of the unquantized model as well. States of more than `memory` bytes in all lie in files in
    the folder `scratch`. `unrouted` names the Linears whose statistics had to be assumed so far, as no token reached
    the expert. Progress counts tokens; each block is its share of them.

    Memory: the states, and inside `block` its weights (with `both` twice) and the statistics asked for.
    Raises UsageError when there are no tokens, OutputError when `scratch` cannot be written.
    """

    def __init__(
        self,
        model: StreamedModel,
        documents: Sequence[Sequence[int]],
        both: bool = False,
        scratch: Path | None = None,
        memory: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.index = 0
        self.unrouted: tuple[str, ...] = ()
        kept = [document for document in documents if len(document)]
        if not kept:
            raise UsageError("no tokens to calibrate with; give a longer text")
        self._progress = progress or Silent()
        self.batches: list[Batch] = []
        self._chains: list[States] = []
        self._room = KEPT_BYTES if memory is None else min(KEPT_BYTES, memory // 4)
        tokens = sum(map(len, kept))
        self._progress.start("calibrate", float(tokens), "tokens")
        for batch in model.embed_each(kept):
            if not self._chains:
                hidden = int(batch.states.shape[-1])
                size = 4 * tokens * hidden * (2 if both else 1)
                self._chains = self._allocate(
                    kept, hidden, both, scratch if memory is not None and size > memory else None
                )
            for chain in self._chains:
                chain.views[len(self.batches)].copy_(batch.states)
            batch.states = self._chains[0].views[len(self.batches)]
            self.batches.append(batch)

    def _allocate(
        self, documents: Sequence[Sequence[int]], hidden: int, both: bool, scratch: Path | None
    ) -> list[States]:
        groups = group_documents(documents, self.model.batch_tokens)
        shapes = [(len(group), len(documents[group[0]]), hidden) for group in groups]
        return [States(shapes, scratch) for _ in range(2 if both else 1)]

    @contextmanager
    def block(self, index: int) -> Iterator[LiveBlock]:
        """Block `index`, which must be the next, with its float weights, for the time of the `with` statement.

        Raises BadInputError when the checkpoint cannot be read, AnyQuantError when another block is next.
        """
        self._expect(index)
        floats = self._chains[1].views if len(self._chains) > 1 else None
        with self.model.block(index) as module:
            live = LiveBlock(self.model, index, module, (self.batches, floats), self._moved, self._room)
            try:
                yield live
            finally:
                live.close()
                self.unrouted += live.unrouted
                self.index += live.advanced

    def head(self, needs: frozenset[str]) -> Moments:
        """Statistics of what the head multiplies, after the last block."""
        self._expect(self.model.blocks)
        place = f"{self.model.checkpoint.location}: {self.model.head_module}"
        running: Running | None = None
        for number, batch in enumerate(self.batches):
            rows = rows_of(self.model.head_input(batch.states))
            other = None
            if "cross" in needs and len(self._chains) > 1:
                other = rows_of(self.model.head_input(self._chains[1].views[number]))
            running = running or Running(int(rows.shape[-1]), place, needs)
            running.add(rows, other)
        self._progress.finish()
        if running is None:
            raise AnyQuantError(f"{place}: the chain has no documents")
        return running.result()

    def save(self, path: Path) -> str:
        """Write the states, raw float32, so that a later run may go on before block `index`; returns their sha256.

        What lay at `path` is replaced in one step. Raises OutputError.
        """
        return storage.save(path, self._chains)

    def restore(self, index: int, path: Path) -> str:
        """Go on before block `index` with states that `save` wrote there; returns their sha256.

        Raises BadInputError when the file cannot be read or has another size than the states of these documents.
        """
        digest = storage.restore(path, self._chains)
        self._progress.advance(sum(batch.tokens for batch in self.batches) * index / self.model.blocks)
        self.index = index
        return digest

    def _expect(self, index: int) -> None:
        if index != self.index:
            raise AnyQuantError(f"block {self.index} is next in the chain, not {index}")

    def _moved(self, tokens: int) -> None:
        self._progress.advance(tokens / self.model.blocks)
