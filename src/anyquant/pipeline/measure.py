"""Measure an artifact in its runtime: against the original (loss), and against our own decode of it (conversion)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.text import Document, token_count
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import InconclusiveError, OutputError
from anyquant.core.progress import Progress
from anyquant.evaluation.limits import Contract
from anyquant.evaluation.measures import Comparison, Measures
from anyquant.models.architecture import Architecture
from anyquant.pipeline.report import Conversion, Loss
from anyquant.runtimes.activations import RoundedInput
from anyquant.runtimes.base import Session
from anyquant.runtimes.transformers import TransformersRuntime
from anyquant.store.system import SYSTEM, writing

CONVERSION_DOCUMENTS = 3
CONVERSION_TOKENS = 256


class ReferenceLogits:
    """Logits of the original on some documents: computed once, block by block, kept as float16 in an unnamed file.

    Each row is stored minus its maximum, so that float16 is finest where the probability is. Two bytes per token and
    entry of the vocabulary lie in `folder` until `close`. Raises OutputError when it has no room for them.
    """

    def __init__(
        self, runtime: TransformersRuntime, documents: Sequence[Document], folder: Path, progress: Progress
    ) -> None:
        self.documents = tuple(documents)
        self._width = runtime.architecture.dimensions.vocabulary
        self._starts: list[int] = []
        _expect_space(folder, 2 * self._width * token_count(self.documents))
        with writing(folder):
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the object
        ids = [document.tokens for document in self.documents]
        for _, start, logits in runtime.logit_chunks(ids, progress):
            if start == 0:
                self._starts.append(self._file.tell())
            shifted = logits - logits.max(axis=1, keepdims=True)
            kept = np.maximum(shifted, -60000.0, out=shifted).astype(np.float16)
            with writing(folder):
                self._file.write(kept.data)
        with writing(folder):
            self._file.flush()

    def read(self, index: int) -> npt.NDArray[np.float16]:
        """float16 (tokens, vocabulary) of one document."""
        self._file.seek(self._starts[index])
        count = len(self.documents[index].tokens) * self._width
        return np.frombuffer(self._file.read(2 * count), dtype=np.float16).reshape(-1, self._width)

    def close(self) -> None:
        self._file.close()


def _expect_space(folder: Path, nbytes: int) -> None:
    """Raise OutputError now rather than after the whole model was run: large vocabularies take many gigabytes."""
    with writing(folder):
        free = SYSTEM.free_bytes(folder)
    if free < nbytes:
        raise OutputError(
            f"{folder}: {nbytes} bytes are needed for the logits of the original while it is measured, {free} are "
            "free; free some, or give fewer --tokens"
        )


def answers(session: Session, documents: Sequence[Document]) -> Iterator[npt.NDArray[np.float32]]:
    """The runtime's logits of each document, computed when asked for."""
    return (session.logits(document.tokens) for document in documents)


def compare(
    candidates: Iterable[npt.NDArray[np.float32]], reference: ReferenceLogits, progress: Progress, label: str
) -> Measures:
    """Every measure of the artifact's logits, one array per document of the reference."""
    comparison = Comparison()
    progress.start(label, token_count(reference.documents), "tokens")
    for index, (document, candidate) in enumerate(zip(reference.documents, candidates, strict=True)):
        comparison.add(document.name, reference.read(index), candidate, document.tokens)
        progress.advance(len(document.tokens))
    progress.finish()
    return comparison.measures()


def loss_of(measures: Measures, split: str) -> Loss:
    """The measures as the report keeps them."""

    def triple(value: float, interval: tuple[float, float], shift: float = 0.0) -> tuple[float, float, float]:
        return value - shift, interval[0] - shift, interval[1] - shift

    return Loss(
        split=split,
        documents=measures.documents,
        tokens=measures.tokens,
        mean_kl=triple(measures.mean_kl.value, measures.mean_kl.interval),
        kl_99_9=measures.kl_99_9,
        same_top=triple(measures.same_top.value, measures.same_top.interval),
        perplexity=measures.ppl_candidate,
        reference_perplexity=measures.ppl_reference,
        perplexity_increase=triple(measures.ppl_ratio.value, measures.ppl_ratio.interval, 1.0),
    )


def below_noise(contract: Contract, conversion: Conversion | None) -> list[str]:
    """A warning where the limit is finer than the runtime's own arithmetic, which no artifact in it can mend."""
    limit = contract.max_kl
    noise = 0.0 if conversion is None else conversion.mean_kl + (conversion.arithmetic or 0.0)
    if limit is None or noise <= limit:
        return []
    said = f"--max-kl {limit:g} lies below what the runtime's own arithmetic adds on these grids, {noise:.1e} nats"
    return [f"{said}: choose a larger limit, or a grid on which it computes exactly"]


def check_conversion(
    session: Session,
    decoded: Checkpoint,
    architecture: Architecture,
    source: Checkpoint,
    documents: Sequence[Document],
    encode: Callable[[str], list[int]],
    rounding: Sequence[RoundedInput] = (),
) -> Conversion:
    """The runtime against our own decode of the artifact, on a few short documents, and its token ids on their text.

    `rounding`: inputs of matrices that the runtime rounds because the artifact says so.

    `encode` is the source's tokenizer, special tokens included. Raises InconclusiveError when our own decode gives
    values that are not finite: then there is nothing to compare with, and the fault is the model's.
    """
    ids = [document.tokens[:CONVERSION_TOKENS] for document in documents[:CONVERSION_DOCUMENTS]]
    comparison = Comparison()
    ours = TransformersRuntime(decoded, architecture, source.config, rounding)
    for number, logits in enumerate(ours.logits(ids)):
        if not np.isfinite(logits).all():
            raise InconclusiveError(
                f"{source.location}: with its own float32 arithmetic the model gives logits that are not finite "
                f"({documents[number].name}); nothing can be shown of it, and nothing was published"
            )
        comparison.add(str(number), logits, session.logits(ids[number]), ids[number])
    measures = comparison.measures()
    return Conversion(
        documents=measures.documents,
        tokens=measures.tokens,
        mean_kl=measures.mean_kl.value,
        limit=math.nan,
        tokens_equal=_same_tokens(session, encode, ids),
    )


def _same_tokens(session: Session, encode: Callable[[str], list[int]], documents: Sequence[Sequence[int]]) -> bool:
    """Whether the runtime's tokenizer and the source's give the same ids for the text of the documents."""
    texts = [session.detokenize(ids) for ids in documents]
    return all(list(session.tokenize(text)) == encode(text) for text in texts)
