"""SparseGPT: weights go whose removal the others make up for best (Frantar and Alistarh 2023, arXiv 2301.00774).

Columns are handled in blocks of 128. When a block is reached, weights already changed by error feedback, those with
the least w^2 / U_jj^2 in it go, over all rows (U the upper Cholesky factor of the inverse Hessian); with a pattern,
those of each run when its first column is reached. GPTQ, with the same dampening, then finds the same values again.
"""

from typing import Any

import numpy as np

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.error_feedback import correct, feed_errors_back
from anyquant.algorithms.hessian import Route, factor, hessian_of
from anyquant.algorithms.sparsity import PATTERNS, Keep, best_in_pattern, best_of_all, checked_options
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError

DEFAULTS = {"sparsity": 0.5, "pattern": "unstructured", "dampening": 0.01, "block": 128}


def prune(task: Task) -> Keep:
    """`keep` (rows, in). Option `sparsity`: the fraction of each block that goes, rounded down. `pattern`:
    "unstructured", or "2:4" and "4:8", where so many of so many consecutive weights stay. `dampening`, `block`: as in
    GPTQ. Raises UsageError, and BadInputError for a Hessian that cannot be one."""
    options = _checked(task)
    hessian_of(task.stats, task.shape[1], task.place, "sparsegpt")
    assert task.stats is not None  # noqa: S101
    size = PATTERNS[options["pattern"]][1] or 1
    route = Route("natural", 1, 1, -(-options["block"] // size) * size)
    pruner = Pruner(task.shape, options["pattern"], options["sparsity"])
    feed_errors_back(task.weights, factor(task.stats, route, float(options["dampening"]), task.place), pruner)
    return pruner.keep


def _checked(task: Task) -> dict[str, Any]:
    options = checked_options("sparsegpt", task, DEFAULTS)
    for name, least in {"block": 1, "dampening": 0}.items():
        if not least <= options[name] < np.inf:
            raise UsageError(f"algorithm sparsegpt: option {name} is {options[name]}, expected at least {least}")
    return options


class Pruner:
    """Sets weights to 0 and leaves the others to take up the error; `keep` (rows, in) says which."""

    def __init__(self, shape: tuple[int, int], pattern: str, sparsity: float) -> None:
        self.keep: Keep = np.ones(shape, dtype=np.bool_)
        self.pattern = pattern
        self.sparsity = sparsity

    def round(self, start: int, block: Float32, upper: Float32) -> Float32:
        size = PATTERNS[self.pattern][1]
        keep = self.keep[:, start : start + block.shape[1]]
        diagonal = upper.diagonal()
        if not size:
            keep[:] = best_of_all((block / diagonal) ** 2, int(block.size * self.sparsity))
        values = np.empty_like(block)
        for j in range(block.shape[1]):
            if size and j % size == 0:
                at = slice(j, j + size)
                keep[:, at] = best_in_pattern((block[:, at] / diagonal[at]) ** 2, self.pattern)
            values[:, j] = np.where(keep[:, j], block[:, j], np.float32(0))
            errors = (block[:, j] - values[:, j]) / diagonal[j]
            correct(block[:, j + 1 :], errors[:, None], upper[j : j + 1, j + 1 :])
        return values


ALGORITHM = Algorithm(
    "sparsegpt", needs=frozenset({"hessian"}), options=DEFAULTS, prune=prune, finisher="gptq", check=_checked
)
