"""Which candidate each group takes, so that the sum of losses is least within a budget of bytes.

A multiple-choice knapsack: exactly one candidate of every group.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anyquant.contract.knapsack import Float64, Int64, Menu, Steps, menu, solve, steps
from anyquant.core.errors import AnyQuantError, UsageError

Choice = Mapping[str, str]  # group name -> candidate name

# states of the dynamic programming kept between two groups; beyond it the gap is proven instead
MOST_STATES = 20_000


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


@dataclass(frozen=True)
class Allocation:
    """A choice with its sums of bytes and losses; no choice within the budget has a loss below `bound`.

    When `bound` lies within one part in 10^9 of `loss`, the solution is proven to be the best.
    """

    choice: Choice
    nbytes: int
    loss: float
    bound: float


class BudgetTooSmallError(UsageError):
    """No choice fits; `smallest` is the least number of bytes that any choice takes."""

    def __init__(self, budget: int, smallest: int) -> None:
        super().__init__(
            f"{budget:,} bytes are too few: the smallest possible plan takes {smallest:,}; allow at least as many"
        )
        self.budget = budget
        self.smallest = smallest


def allocate(groups: Sequence[Group], budget: int, *, most_states: int = MOST_STATES) -> Allocation:
    """The choice of least summed loss whose bytes sum to at most `budget`; of equal losses a smaller one.

    Exact while at most `most_states` partial solutions stay promising; beyond that `loss - bound` is the proven gap.
    Raises BudgetTooSmallError when even the smallest candidates exceed the budget, AnyQuantError for a group without
    candidates, two of one name, a loss that is not finite or bytes below zero.
    """
    menus = _menus(groups)
    smallest = sum(int(entry.nbytes[0]) for entry in menus)
    if smallest > budget:
        raise BudgetTooSmallError(budget, smallest)
    picks, bound = solve(menus, budget, most_states)
    return _allocation(groups, menus, picks, bound)


def frontier(groups: Sequence[Group], count: int) -> tuple[Allocation, ...]:
    """At most `count` allocations, from the smallest to the one of least loss, about evenly apart in bytes.

    Each lies on the lower convex hull of all choices, so it is the best for its bytes. Raises as `allocate`.
    """
    if count < 2:
        raise AnyQuantError(f"frontier: count is {count}; a frontier has two ends")
    menus = _menus(groups)
    ascent, (spent, _) = _ascent(menus)
    wanted = np.linspace(float(spent[0]), float(spent[-1]), count)
    places = sorted({int(np.abs(spent - each).argmin()) for each in wanted})
    return tuple(_allocation(groups, menus, ascent.picks(place, len(menus)), None) for place in places)


@dataclass(frozen=True)
class Curve:
    """The least loss for given bytes when two neighbours may be mixed: falls and is convex; corners are choices."""

    nbytes: Int64
    loss: Float64

    def loss_at(self, nbytes: float) -> float:
        return float(np.interp(nbytes, self.nbytes, self.loss))

    def nbytes_for(self, loss: float) -> int:
        """The fewest bytes of a loss at most so large; the most there are if none is."""
        return math.ceil(float(np.interp(-loss, -self.loss, self.nbytes)))


def curve(groups: Sequence[Group]) -> Curve:
    """The predicted curve of loss over bytes. Raises as `allocate`."""
    _, (spent, losses) = _ascent(_menus(groups))
    return Curve(spent, np.maximum(losses, losses[-1]))


def _ascent(menus: list[Menu]) -> tuple[Steps, tuple[Int64, Float64]]:
    ascent = steps(menus)
    smallest = sum(int(entry.nbytes[0]) for entry in menus)
    return ascent, ascent.curve(smallest, math.fsum(float(entry.loss[0]) for entry in menus))


def _menus(groups: Sequence[Group]) -> list[Menu]:
    menus = []
    for group in groups:
        if not group.candidates:
            raise AnyQuantError(f"group {group.name!r} has no candidate")
        for each in group.candidates:
            if each.nbytes < 0 or not math.isfinite(each.loss):
                raise AnyQuantError(f"group {group.name!r}: {each.name!r} has {each.nbytes} bytes and loss {each.loss}")
        if len({each.name for each in group.candidates}) < len(group.candidates):
            raise AnyQuantError(f"group {group.name!r} has two candidates of one name")
        nbytes = np.array([each.nbytes for each in group.candidates], np.int64)
        menus.append(menu(nbytes, np.array([each.loss for each in group.candidates], np.float64)))
    if len({group.name for group in groups}) < len(groups):
        raise AnyQuantError("two groups have one name")
    return menus


def _allocation(groups: Sequence[Group], menus: list[Menu], picks: Int64, bound: float | None) -> Allocation:
    chosen = [group.candidates[int(entry.lines[pick])] for group, entry, pick in zip(groups, menus, picks, strict=True)]
    loss = math.fsum(each.loss for each in chosen)
    return Allocation(
        choice={group.name: each.name for group, each in zip(groups, chosen, strict=True)},
        nbytes=sum(each.nbytes for each in chosen),
        loss=loss,
        bound=loss if bound is None else min(bound, loss),
    )
