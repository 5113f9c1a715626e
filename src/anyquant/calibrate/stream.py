"""Statistics of a whole float model, one block in memory at a time."""

from collections.abc import Sequence

from anyquant.calibrate.chain import Chain
from anyquant.calibrate.stats import Moments, Statistics
from anyquant.core.arithmetic import DTYPES
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.progress import Progress
from anyquant.models.architecture import Architecture
from anyquant.models.families import HEAD_INPUT
from anyquant.models.streaming import StreamedModel

SECOND_MOMENT = frozenset({"second_moment"})


def collect(
    checkpoint: Checkpoint,
    architecture: Architecture,
    documents: Sequence[Sequence[int]],
    progress: Progress | None = None,
    dtype: str = DTYPES[0],
) -> Statistics:
    """Second moments of every input group of the blocks and of the head's input.

    `documents` are token ids. Progress counts tokens; each block is its share of them. An expert that no token was
    routed to gets the mean of the others, and is named. The blocks compute in `dtype`.

    Raises UsageError when there are no tokens, BadInputError naming the module when an activation is not finite.
    """
    chain = Chain(StreamedModel(checkpoint, architecture, dtype=dtype), documents, progress=progress)
    moments: dict[str, Moments] = {}
    for index in range(chain.model.blocks):
        with chain.block(index) as block:
            moments |= block.advance(SECOND_MOMENT)
    moments[HEAD_INPUT] = chain.head(SECOND_MOMENT)
    if chain.unrouted and progress is not None:
        progress.say(
            f"warning: no token reached {len(chain.unrouted)} expert matrices: {', '.join(chain.unrouted[:3])}"
        )
    return Statistics(moments)
