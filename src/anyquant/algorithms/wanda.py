"""Wanda: of each row, the weights go whose share of the output is smallest (Sun et al. 2023, arXiv 2306.11695)."""

from functools import partial

import numpy as np

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.sparsity import DEFAULTS, Keep, best_in_pattern, best_of_rows, checked_options
from anyquant.core.errors import UsageError


def prune(task: Task) -> Keep:
    """`keep` (rows, in) by |w| * root mean square of the input channel, within each row.

    Option `sparsity`: the fraction of each row that goes, rounded down. `pattern`: "unstructured", or "2:4" and "4:8",
    where so many of so many consecutive weights stay. Raises UsageError without statistics.
    """
    options = checked_options("wanda", task)
    if task.importance is None:
        raise UsageError(f"{task.place}: wanda needs the second moments of the input; calibrate with a text")
    scores = np.abs(task.weights) * np.sqrt(task.importance)
    if options["pattern"] != "unstructured":
        return best_in_pattern(scores, options["pattern"])
    return best_of_rows(scores, int(task.shape[1] * options["sparsity"]))


ALGORITHM = Algorithm(
    "wanda",
    needs=frozenset({"second_moment"}),
    options=DEFAULTS,
    rows_apart=True,
    prune=prune,
    check=partial(checked_options, "wanda"),
)
