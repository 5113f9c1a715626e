"""The reference's logits: kept as they were computed, in bounded pieces, or refused before the work."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anyquant.calibrate.text import Document
from anyquant.core.errors import OutputError
from anyquant.core.progress import Progress, Silent
from anyquant.models.detect import detect
from anyquant.pipeline.measure import ReferenceLogits
from anyquant.runtimes.transformers import TransformersRuntime
from anyquant.store.open import open_checkpoint
from anyquant.store.system import System
from support.checkpoints import make_checkpoint

DOCUMENTS = [Document("a", tuple(range(40)), "a"), Document("b", tuple(range(7)), "b")]


class InPieces(TransformersRuntime):
    """Logits of nine positions at a time, as a large vocabulary has them."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        super().__init__(checkpoint, detect(checkpoint))
        self.asked = 0

    def logit_chunks(
        self, documents: Sequence[Sequence[int]], progress: Progress | None = None
    ) -> Iterator[tuple[int, int, npt.NDArray[np.float32]]]:
        self.asked += 1
        for index, document in enumerate(documents):
            for start in range(0, len(document), 9):
                yield index, start, self.rows(index, start, min(start + 9, len(document)))

    def rows(self, index: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        width = self.architecture.dimensions.vocabulary
        rows = np.random.default_rng(index).normal(0, 3, (64, width))[start:stop]
        return rows.astype(np.float32)

    def logits(self, *_: Any) -> Iterator[npt.NDArray[np.float32]]:
        raise AssertionError("a whole document at once takes gigabytes")


@pytest.fixture
def runtime(tmp_path: Path) -> InPieces:
    make_checkpoint(tmp_path / "model", "llama")
    return InPieces(tmp_path / "model")


def test_what_is_read_back_is_what_was_computed(runtime: InPieces, tmp_path: Path) -> None:
    reference = ReferenceLogits(runtime, DOCUMENTS, tmp_path, Silent())
    for index in (1, 0):
        wanted = runtime.rows(index, 0, len(DOCUMENTS[index].tokens))
        wanted -= wanted.max(axis=1, keepdims=True)
        np.testing.assert_array_equal(reference.read(index), wanted.astype(np.float16))
    reference.close()


def test_too_little_room_is_said_before_the_work(
    runtime: InPieces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * 47 * runtime.architecture.dimensions.vocabulary
    monkeypatch.setattr(System, "free_bytes", lambda self, folder: needed - 1)
    with pytest.raises(OutputError, match=f"{needed} bytes are needed"):
        ReferenceLogits(runtime, DOCUMENTS, tmp_path, Silent())
    assert runtime.asked == 0
