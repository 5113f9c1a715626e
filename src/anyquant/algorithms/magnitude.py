"""Magnitude pruning: the smallest weights of a matrix go. Needs no statistics (Han et al. 2015, arXiv 1506.02626)."""

from functools import partial

import numpy as np

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.sparsity import DEFAULTS, Keep, best_in_pattern, best_of_all, checked_options


def prune(task: Task) -> Keep:
    """`keep` (rows, in). Option `sparsity`: the fraction of the matrix that goes, rounded down. `pattern`:
    "unstructured", or "2:4" and "4:8", where so many of so many consecutive weights stay."""
    options = checked_options("magnitude", task)
    scores = np.abs(task.weights)
    if options["pattern"] != "unstructured":
        return best_in_pattern(scores, options["pattern"])
    return best_of_all(scores, int(scores.size * options["sparsity"]))


ALGORITHM = Algorithm("magnitude", options=DEFAULTS, prune=prune, check=partial(checked_options, "magnitude"))
