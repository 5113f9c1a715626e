"""Which weights a pruner keeps, given a score for each: patterns and options that pruners share."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.algorithms.base import Task
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.options import complete_options

Scores = npt.NDArray[np.floating[Any]]
Keep = npt.NDArray[np.bool_]

# of so many consecutive weights of a row, so many stay
PATTERNS = {"unstructured": (0, 0), "2:4": (2, 4), "4:8": (4, 8)}
DEFAULTS: Mapping[str, Any] = {"sparsity": 0.5, "pattern": "unstructured"}


def checked_options(algorithm: str, task: Task, defaults: Mapping[str, Any] = DEFAULTS) -> dict[str, Any]:
    """The options, complete. Raises UsageError, or UnsupportedError for a matrix that the pattern does not fit."""
    options = complete_options(algorithm, task.options, defaults)
    pattern, sparsity = options["pattern"], options["sparsity"]
    if pattern not in PATTERNS:
        raise UsageError(f"algorithm {algorithm}: option pattern is {pattern!r}, expected {' or '.join(PATTERNS)}")
    if not 0 <= sparsity < 1:
        raise UsageError(f"algorithm {algorithm}: option sparsity is {sparsity}, expected at least 0 and below 1")
    kept, size = PATTERNS[pattern]
    if size and sparsity != 1 - kept / size:
        raise UsageError(f"algorithm {algorithm}: pattern {pattern} has sparsity {1 - kept / size:g}, not {sparsity:g}")
    if size and task.shape[1] % size:
        raise UnsupportedError(
            f"{task.place}: pattern {pattern} needs a multiple of {size} columns, not {task.shape[1]}"
        )
    return options


def best_in_pattern(scores: Scores, pattern: str) -> Keep:
    """Of each run of `size` consecutive scores in a row, the `kept` highest; of equal ones the later."""
    kept, size = PATTERNS[pattern]
    return best_of_rows(scores.reshape(-1, size), size - kept).reshape(scores.shape)


def best_of_rows(scores: Scores, dropped: int) -> Keep:
    """All but the `dropped` lowest scores of each row (rows, n); of equal ones the later stay."""
    if dropped == 0:
        return np.ones(scores.shape, dtype=np.bool_)
    limit = np.partition(scores, dropped - 1, axis=1)[:, dropped - 1 : dropped]
    lower, equal = scores < limit, scores == limit
    left = dropped - lower.sum(axis=1, keepdims=True)
    gone: Keep = lower | (equal & (np.cumsum(equal, axis=1) <= left))
    return ~gone


def best_of_all(scores: Scores, dropped: int) -> Keep:
    """All but the `dropped` lowest scores of the whole matrix."""
    return best_of_rows(scores.reshape(1, -1), dropped).reshape(scores.shape)
