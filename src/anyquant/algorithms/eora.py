"""EoRA: a low-rank pair for what the quantization error does to the output, in the eigenspace of the input.

Liu et al. 2024, arXiv 2410.21271. Minimises tr((E - L R) H (E - L R)^T), E = weights - values, H the Hessian.
"""

from functools import partial
from typing import Any

import numpy as np

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.hessian import hessian_of
from anyquant.algorithms.low_rank import DEFAULTS, checked_rank, corrected
from anyquant.core.errors import BadInputError
from anyquant.core.extras import require
from anyquant.core.qtensor import QTensor


def correct(task: Task, quantized: QTensor) -> QTensor:
    """Option `rank`. The output error, of pruning too, is the least for this rank.

    Raises UsageError for another option, missing statistics, or a rank that the matrix does not have, BadInputError
    for a Hessian that cannot be one.
    """
    rank = checked_rank("eora", task)
    hessian = hessian_of(task.stats, task.shape[1], task.place, "eora")
    assert task.stats is not None  # noqa: S101
    root = task.stats.once(("root",), lambda: _root(hessian, task.place))
    return corrected(task, quantized, rank, root)


def _root(hessian: Any, place: str) -> Any:
    """S with H = S S^T, float64; what rounding made slightly negative counts as 0."""
    if not np.isfinite(hessian).all():
        raise BadInputError(f"{place}: the Hessian is not finite; calibrate again")
    torch = require("torch")
    values, vectors = torch.linalg.eigh(torch.from_numpy(hessian.astype(np.float64)))
    return (vectors * values.clamp(min=0).sqrt()).numpy()


ALGORITHM = Algorithm(
    "eora",
    needs=frozenset({"hessian"}),
    options=DEFAULTS,
    correct=correct,
    check=partial(checked_rank, "eora"),
)
