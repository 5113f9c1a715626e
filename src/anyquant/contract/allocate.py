"""Which candidate each group takes, so that the sum of losses is least within a budget of bytes.

A multiple-choice knapsack: exactly one candidate of every group.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from anyquant.core.errors import UsageError

Choice = Mapping[str, str]  # group name -> candidate name


@dataclass(frozen=True)
class Candidate:
    """One way to store a group: `name` as the caller calls it, its bytes, its predicted loss (KL in nats per token)."""

    name: str
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Group:
    """What is decided together: one of `candidates` must be chosen. A pinned group has a single candidate.

    Linears that the target ties together are one group.
    """

    name: str
    candidates: tuple[Candidate, ...]


class BudgetTooSmallError(UsageError):
    """No choice fits; `smallest` is the least number of bytes that any choice takes."""

    def __init__(self, budget: int, smallest: int) -> None:
        super().__init__(
            f"{budget:,} bytes are too few: the smallest possible plan takes {smallest:,}; allow at least as many"
        )
        self.budget = budget
        self.smallest = smallest
