"""The float32 twin: exact where the artifact is sound, far off where its bytes are read in the wrong order."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anyquant.calibrate.text import Document
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.progress import Silent
from anyquant.formats.gguf.format import GGUFFormat
from anyquant.models.architecture import Architecture
from anyquant.pipeline.planner import writable
from anyquant.pipeline.rows import Direct, Unweighted
from anyquant.pipeline.run import execute
from anyquant.pipeline.texts import source_tokenizer
from anyquant.pipeline.twin import twin_conversion
from anyquant.runtimes import RUNTIMES
from anyquant.store.publish import Stage
from support.jobs import job_of

TEXT = "def reads(model): return [model[i] for i in range(3)]  # the model reads 12 tokens"


class Misread(GGUFFormat):
    """Writes the q and k rows of Llama in the order of the source, as a converter that forgot the permutation."""

    def layout(self, architecture: Architecture, plan: object, checkpoint: Checkpoint) -> object:  # type: ignore[override]
        made = super().layout(architecture, plan, checkpoint)  # type: ignore[arg-type]
        return replace(made, units=tuple(replace(unit, permutation="") for unit in made.units))


@pytest.mark.parametrize(
    ("family", "target", "sound"),
    [
        ("llama", GGUFFormat(), True),
        ("phi3", GGUFFormat(), True),
        ("llama", Misread(), False),
    ],
)
def test_the_twin_tells_a_sound_conversion_from_a_broken_one(
    model: Callable[[str], Path], tmp_path: Path, family: str, target: GGUFFormat, sound: bool
) -> None:
    job = replace(job_of(model(family), grid="q4_k"), format=target)
    tokenizer = source_tokenizer(job.checkpoint)
    documents = [Document("text", tuple(tokenizer.whole(TEXT)), "text")]
    with Stage(tmp_path / "out") as stage:
        execute(job, Direct(job, Unweighted()), stage, 1, Silent())
        decoded = writable(job).open(stage.folder, job.architecture)
        found = twin_conversion(job, decoded, RUNTIMES.get("llama.cpp"), stage, documents, tokenizer.whole)
    assert found.tokens_equal
    assert found.mean_kl < 1e-8 if sound else found.mean_kl > 1e-2
    assert list(tmp_path.iterdir()) == []
