"""The float32 twin of a quantized artifact: the same decoded values in a type on which the runtime computes exactly.

Runtimes round activations where weights are quantized, so their logits differ from those of the decoded weights by more
than a conversion may. The twin is written by the same format from the artifact's own decoded bytes: when the runtime
agrees with `transformers` on it to float precision, then names, row orders, metadata and tokenizer are right, and what
is left of the difference is the runtime's arithmetic.
"""

from collections.abc import Callable, Sequence

from anyquant.calibrate.text import Document
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.progress import Silent
from anyquant.pipeline.decoded import DecodedSource
from anyquant.pipeline.measure import check_conversion
from anyquant.pipeline.planner import Job, Model, make_job
from anyquant.pipeline.recipe import Recipe
from anyquant.pipeline.report import Conversion
from anyquant.pipeline.rows import Direct, Unweighted
from anyquant.pipeline.run import execute
from anyquant.runtimes.base import Runtime
from anyquant.store.publish import Stage

PRESET = "F32"
MOST_WEIGHTS = 500_000_000  # 2 GB beside the output for a moment; larger models are compared directly


def twin_conversion(
    job: Job,
    decoded: Checkpoint,
    runtime: Runtime,
    stage: Stage,
    documents: Sequence[Document],
    encode: Callable[[str], list[int]],
) -> Conversion:
    """The runtime on the twin against `transformers` on the decoded weights. The twin is removed again."""
    weights = DecodedSource(decoded, job.checkpoint)
    model = Model(job.architecture, weights, weights)
    twin = make_job(model, job.format, Recipe(preset=PRESET), False)
    beside = stage.out.with_name(f"{stage.out.name}-twin")
    with Stage(beside, needed=twin.layout.nbytes) as staged:
        execute(twin, Direct(twin, Unweighted()), staged, 1, Silent())
        longest = max(len(document.tokens) for document in documents)
        with runtime.load(staged.folder / job.format.entry, longest) as session:
            return check_conversion(session, decoded, job.architecture, job.checkpoint, documents, encode)
