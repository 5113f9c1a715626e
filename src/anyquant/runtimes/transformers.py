"""The reference runtime: a checkpoint's logits by the `transformers` modelling code in float32, block by block.

It also runs any quantized state, by decoding: `DecodedCheckpoint` puts decoded weights in the place of the source's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint, TensorSpec, read_rows
from anyquant.core.dtypes import DTYPES, Bytes, Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UsageError
from anyquant.core.linear import Linear
from anyquant.core.progress import Progress, Silent
from anyquant.models.architecture import Architecture
from anyquant.models.streaming import StreamedModel
from anyquant.runtimes.activations import RoundedInput, rounding_inputs


class TransformersRuntime:
    """Logits of `checkpoint`, whose tensors have the names and shapes of the source model.

    `config` is the model's `config.json` where the checkpoint's own files hold none. `rounding` simulates rounded
    activations.
    """

    name = "transformers"

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        config: Mapping[str, Any] | None = None,
        rounding: Sequence[RoundedInput] = (),
    ) -> None:
        self.rounding = rounding
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.config = checkpoint.config if config is None else config
        if not self.config:
            raise UsageError(f"{checkpoint.location}: holds no config.json; pass the source model's config")

    def logits(
        self, documents: Sequence[Sequence[int]], progress: Progress | None = None, label: str = "reference"
    ) -> Iterator[Float32]:
        """Logits of every position of every document, in order: float32 (tokens, vocabulary) each.

        One pass over the weights serves all documents. Progress counts tokens, under `label`.
        """
        pieces: list[Float32] = []
        for index, start, piece in self.logit_chunks(documents, progress, label):
            pieces.append(piece)
            if start + len(piece) == len(documents[index]):
                yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
                pieces = []

    def logit_chunks(
        self, documents: Sequence[Sequence[int]], progress: Progress | None = None, label: str = "reference"
    ) -> Iterator[tuple[int, int, Float32]]:
        """As `logits`, in bounded pieces: (document, its first position, float32 (positions, vocabulary))."""
        if not documents:
            return
        sink = progress or Silent()
        model = StreamedModel(self.checkpoint, self.architecture, self.config)
        batches = model.embed(documents)
        sink.start(label, float(sum(batch.tokens for batch in batches)), "tokens")
        with rounding_inputs(model.module, self.rounding):
            model.run_blocks(batches, sink)
        sink.finish()
        place = {index: batch.states[row] for batch in batches for row, index in enumerate(batch.documents)}
        with model.head() as head:
            for index in range(len(documents)):
                states = place[index]
                for start in range(0, len(states), model.logit_rows):
                    yield index, start, head(states[start : start + model.logit_rows])


class DecodedCheckpoint:
    """`base` in float32 with the matrices of its Linears replaced; names, shapes and config stay the source's.

    `tensors(linear name)` returns the decoded float32 matrix (out, in); it is asked once per run of reads of a
    Linear. Fused tensors are assembled from their views; rows that belong to no Linear, norms and biases come from
    `base`. Tensors that hold no floating-point values are passed through.
    """

    def __init__(self, base: Checkpoint, architecture: Architecture, tensors: Callable[[str], Float32]) -> None:
        self.base = base
        self.location = f"{base.location} (decoded)"
        self._tensors = tensors
        self._views: dict[str, list[Linear]] = {}
        for linear in architecture.linears:
            self._views.setdefault(linear.view.tensor, []).append(linear)
        self._last: tuple[str, Float32] | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.base.metadata

    def text_file(self, name: str) -> bytes | None:
        """A companion file of the source, such as its tokenizer."""
        return self.base.text_file(name)

    def names(self) -> Sequence[str]:
        return self.base.names()

    def spec(self, name: str) -> TensorSpec:
        stored = self.base.spec(name)
        if not self._is_float(stored):
            return stored
        return TensorSpec(name, "F32", stored.shape, 4 * stored.elements)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        stored = self.base.spec(name)
        if not self._is_float(stored):
            self.base.read_into(name, start, stop, buffer)
            return
        if not 0 <= start <= stop <= stored.rows or buffer.size != 4 * (stop - start) * stored.row_length:
            raise AnyQuantError(
                f"{self.location}: {name} rows {start} to {stop} do not fit a {buffer.size} byte buffer"
            )
        rows = buffer.view(np.float32).reshape(stop - start, stored.row_length)
        covered = 0
        for linear in self._views.get(name, ()):
            covered += self._place(linear, start, rows)
        # most tensors are all Linear, or not at all: only a mixed one is read from both sides
        if covered < stop - start:
            rows_of_base = read_rows(self.base, name, start, stop)
            if not covered:
                rows[:] = rows_of_base
                return
            rows[:] = rows_of_base
            for linear in self._views[name]:
                self._place(linear, start, rows)

    def _place(self, linear: Linear, first: int, rows: Float32) -> int:
        """Write the rows of `linear` that lie in stored rows [first, first + len(rows)); returns how many."""
        view = linear.view
        height = view.columns if view.transposed else view.rows
        begin, end = max(first, view.start), min(first + len(rows), view.start + height)
        if begin >= end:
            return 0
        matrix = self._matrix(linear)
        stored = matrix.T if view.transposed else matrix
        rows[begin - first : end - first] = stored[begin - view.start : end - view.start]
        return end - begin

    def _matrix(self, linear: Linear) -> Float32:
        # the last matrix is kept: an embedding is read in many short runs of rows
        if self._last is None or self._last[0] != linear.name:
            self._last = None
            matrix = self._tensors(linear.name)
            if matrix.shape != linear.shape:
                raise BadInputError(
                    f"{self.location}: {linear.name} decodes to shape {matrix.shape}, expected {linear.shape}"
                )
            self._last = (linear.name, matrix)
        return self._last[1]

    @staticmethod
    def _is_float(spec: TensorSpec) -> bool:
        return spec.dtype in DTYPES and DTYPES[spec.dtype].floating
