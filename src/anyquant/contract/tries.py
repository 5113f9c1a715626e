"""What a search is given, and the record of what it tried."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from anyquant.contract.allocate import Allocation, BudgetTooSmallError, Choice, Group, allocate, curve
from anyquant.contract.measured import Measured
from anyquant.core.errors import AnyQuantError

_ROUNDS = 40  # of lowering the budget until the exact bytes hold
_PLACES = 64  # of the frontier
_VISIBLE = 1e-4  # of its largest loss; less is of no interest


def never() -> bool:
    return False


def silent(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Seen:
    """A choice that was measured before the search began, as try `number`."""

    choice: Choice
    measured: Measured
    number: int


@dataclass(frozen=True)
class Problem:
    """`nbytes` gives the exact bytes of a choice's files, `measure` its quality on *select*, which costs much.

    `start` is the predicted loss to begin at: the limit on mean KL where there is one. `kinds` names for every group
    what its prediction may be wrong about in common with others, such as its role; without it neighbours share.
    The search goes on from what was `seen`, which is one of its measurements, and may end with it.
    """

    groups: Sequence[Group]
    nbytes: Callable[[Choice], int]
    measure: Callable[[Choice], Measured]
    start: float | None = None
    max_bytes: int | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    seen: Seen | None = None


@dataclass(frozen=True)
class Effort:
    """At most `evaluations` measurements; `expired` says that time is over; bytes are found to within `tolerance`.

    Without any measurement nothing could be said, so the first one is made in any case.
    Tries are counted on from the `earlier` ones, which the caller made. `spread` is the standard
    error on *certify* as a multiple of that on *select*.
    """

    evaluations: int = 12
    earlier: int = 0
    expired: Callable[[], bool] = never
    tolerance: float = 0.005
    spread: float = 1.0


@dataclass(frozen=True)
class Try:
    """One choice: exact bytes, summed predictions, what was measured (None: nothing), and whether all limits held.

    `score` is that of the limit worst met, see `Measured.score`; `step` says why it was tried.
    """

    number: int
    choice: Choice
    nbytes: int
    predicted: float
    measured: Measured | None
    score: float
    passed: bool
    step: str


class Session:
    """Tries in their order, at most as many as the effort allows, none twice."""

    def __init__(self, problem: Problem, effort: Effort, say: Callable[[str], None]) -> None:
        self.problem = problem
        self.effort = effort
        self.tries: list[Try] = []
        self._say = say
        self._losses = {group.name: {each.name: each.loss for each in group.candidates} for group in problem.groups}
        self._known: set[tuple[str, ...]] = set()
        smallest = allocate(problem.groups, _least(problem.groups))
        self.smallest = problem.nbytes(smallest.choice)
        self.overhead = self.smallest - smallest.nbytes
        if problem.seen is not None:
            seen = self.judged(problem.seen.choice, problem.seen.measured, "seen")
            self._record(replace(seen, number=problem.seen.number))

    @property
    def left(self) -> int:
        return 0 if self.effort.expired() else max(self.effort.evaluations - len(self.tries), 0)

    @property
    def owed(self) -> bool:
        """Whether the first measurement is still to be made, which does not ask for the time."""
        return not self.tries and self.effort.evaluations > 0

    @property
    def made(self) -> int:
        """Measurements, earlier ones included."""
        return self.effort.earlier + len(self.tries)

    def predicted(self, choice: Choice) -> float:
        return math.fsum(self._losses[group][name] for group, name in choice.items())

    def loss(self, group: str, candidate: str) -> float:
        return self._losses[group][candidate]

    def known(self, choice: Choice) -> bool:
        return self._key(choice) in self._known

    def fit(self, groups: Sequence[Group], limit: int) -> tuple[Choice, int]:
        """The choice of least loss whose exact bytes are at most `limit`, and those bytes.

        Exact bytes are not quite the sum of the groups' (headers, alignment), so the budget is corrected until they
        hold. Raises BudgetTooSmallError when the smallest choice is too large.
        """
        best: tuple[float, Choice, int] | None = None
        budget = limit - self.overhead
        for _ in range(_ROUNDS):
            try:
                found = allocate(groups, budget)
            except BudgetTooSmallError:
                break
            exact = self.problem.nbytes(found.choice)
            if exact <= limit:
                if best is None or found.loss < best[0]:
                    best = (found.loss, found.choice, exact)
                room = limit - exact - (budget - found.nbytes)
                if room <= 0:
                    break
                budget += room
            else:
                if best is not None:
                    break
                budget = min(budget, found.nbytes) - (exact - limit)
        if best is not None:
            return best[1], best[2]
        return self._smallest(groups, limit)

    def _smallest(self, groups: Sequence[Group], limit: int) -> tuple[Choice, int]:
        found: Allocation = allocate(groups, _least(groups))
        exact = self.problem.nbytes(found.choice)
        if exact > limit:
            raise BudgetTooSmallError(limit, exact)
        return found.choice, exact

    def frontier(self) -> tuple[tuple[int, float], ...]:
        """(bytes, loss) along the best choices by prediction, as the tries say that predictions are off; by bytes.

        One factor for all of them, the middle one of measured over predicted. Empty where nothing was measured.
        """
        factors = [t.measured.loss / t.predicted for t in self.tries if t.measured is not None and t.predicted > 0]
        factors = [factor for factor in factors if 0 < factor < math.inf]
        if not factors:
            return ()
        whole, factor = curve(self.problem.groups), median(factors)
        shown = whole.loss > max(_VISIBLE * float(whole.loss[0]), 0.0)
        nbytes, heights = whole.nbytes[shown], np.log(whole.loss[shown])
        if not len(heights):
            return ()
        places = np.searchsorted(-heights, np.linspace(-heights[0], -heights[-1], _PLACES))
        return tuple((int(nbytes[at]) + self.overhead, factor * math.exp(heights[at])) for at in np.unique(places))

    def attempt(self, choice: Choice, step: str) -> Try:
        """Measure a choice, and record it. Raises AnyQuantError when no measurement is left."""
        if len(self.tries) >= self.effort.evaluations:
            raise AnyQuantError(f"search: all {self.effort.evaluations} measurements are used")
        measured = self.problem.measure(choice)
        tried = self.judged(choice, measured, step)
        self._record(tried)
        self._say(sentence(tried))
        return tried

    def _record(self, tried: Try) -> None:
        self.tries.append(tried)
        self._known.add(self._key(tried.choice))

    def judged(self, choice: Choice, measured: Measured | None, step: str) -> Try:
        nbytes, limit = self.problem.nbytes(choice), self.problem.max_bytes
        score = math.inf if measured is None else measured.score(self.effort.spread)
        passed = score <= 0 and (limit is None or nbytes <= limit)
        return Try(self.made + 1, choice, nbytes, self.predicted(choice), measured, score, passed, step)

    def _key(self, choice: Choice) -> tuple[str, ...]:
        return tuple(choice[group.name] for group in self.problem.groups)


def sentence(tried: Try) -> str:
    """One line about a try."""
    text = f"try {tried.number}: {tried.nbytes:,} bytes, predicted {tried.predicted:.4g}"
    if tried.measured is None:
        return text + ", not measured"
    text += f", measured {tried.measured.loss:.4g} ± {tried.measured.standard_error:.2g}"
    if tried.measured.margins:  # without a limit there is nothing to leave room to
        text += f": {'enough' if tried.passed else 'too little'} room"
    return f"{text} ({tried.step})"


def _least(groups: Sequence[Group]) -> int:
    return sum(min((each.nbytes for each in group.candidates), default=0) for group in groups)
