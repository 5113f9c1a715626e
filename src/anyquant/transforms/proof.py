"""The proof that a rewrite changed nothing: float logits before and after."""

from collections.abc import Sequence

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import AnyQuantError
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.runtimes.transformers import TransformersRuntime

LIMIT = 1e-4  # relative; float32 gives about 1e-6


def relative_logit_difference(
    original: Checkpoint,
    rewritten: Checkpoint,
    documents: Sequence[Sequence[int]],
    architectures: tuple[Architecture, Architecture] | None = None,
) -> float:
    """The largest ||a - b|| / ||a|| over all positions, where a, b are the logits of a position before and after.

    Both models run block by block in float32, side by side. Infinite when a logit of `rewritten` is not finite.
    `architectures` are those of the two where they are known. Raises AnyQuantError when there is no position.
    """
    before, after = architectures or (detect(original), detect(rewritten))
    worst, positions = 0.0, 0
    chunks = zip(
        TransformersRuntime(original, before).logit_chunks(documents),
        TransformersRuntime(rewritten, after).logit_chunks(documents),
        strict=True,
    )
    for (_, _, expected), (_, _, found) in chunks:
        difference = np.linalg.norm(found.astype(np.float64) - expected, axis=1)
        relative = difference / np.maximum(np.linalg.norm(expected.astype(np.float64), axis=1), 1e-30)
        worst = max(worst, float(np.nan_to_num(relative, nan=np.inf).max()))
        positions += len(expected)
    if not positions:
        raise AnyQuantError("a rewrite cannot be proved without tokens")
    return worst
