"""The search of a contract: the smallest choice within limits, or the best within bytes.

Predictions say which choice is best for given bytes; measurements on *select* say where on that curve the limits are
met. The logarithm of a measured loss is close to a straight line in the logarithm of the predicted one, so the point
is found by a secant in these, kept within the bracket of the largest choice that failed and the smallest that passed.
What measurements are left then correct the predictions (see `repair`). One certification on another split is the
caller's: a choice passes here only with the room that makes it likely (see `measured`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from anyquant.contract.allocate import BudgetTooSmallError, Choice, allocate, curve
from anyquant.contract.measured import Margin
from anyquant.contract.repair import repair
from anyquant.contract.tries import Effort, Problem, Seen, Session, Try, silent
from anyquant.core.errors import AnyQuantError

__all__ = ["Effort", "Ended", "Outcome", "Problem", "Seen", "Try", "best_within_bytes", "smallest_within_limits"]

_SLOPES = (0.4, 2.5)  # of log measured over log predicted; a secant outside them is noise
_APART = 0.1  # in log predicted, for two points to tell a slope
_URGENT = 2  # measurements left at which a search without a passing choice asks for less loss than the line says
_ROOM = 0.25  # how much less, in log loss
_STRIDE = 4.0  # by what steps down grow while all pass
_UNCORRECTED = 0.5  # of the loss to begin at, where the time is over and nothing will correct the prediction


class Ended(StrEnum):
    CONVERGED = "converged"  # nothing better is expected
    EVALUATIONS = "evaluations"  # all measurements are used
    EXPIRED = "expired"  # time is over
    UNREACHABLE = "unreachable"  # the choice of least loss misses a limit
    SIZE = "size"  # the best choice within max_bytes misses a limit


@dataclass(frozen=True)
class Outcome:
    """`best` is the choice to take where `reached`, else the one that came nearest to the limits (None: none tried).

    `reason` is a sentence or two for the report; `tries` are in the order they were made. `frontier`: the loss that is
    expected of the best choice for given bytes, see `Session.frontier`.
    """

    best: Try | None
    reached: bool
    ended: Ended
    reason: str
    tries: tuple[Try, ...]
    frontier: tuple[tuple[int, float], ...] = ()


def smallest_within_limits(
    problem: Problem, effort: Effort | None = None, say: Callable[[str], None] = silent
) -> Outcome:
    """The smallest choice whose limits all hold on *select* with room, and within `max_bytes` where that is given.

    When the time is over before it begins, one choice that is likely to hold them is measured all the same.
    Raises BudgetTooSmallError when no choice is within `max_bytes`, and whatever `measure` raises.
    """
    session = Session(problem, effort or Effort(), say)
    ladder = _Ladder(session)
    while session.left or session.owed:
        step = ladder.next()
        if step is None:
            break
        session.attempt(*step)
    base = ladder.passing()
    if base is None:
        return _missed(session, ladder)
    base = repair(session, base, shrink=True)
    ended = _ended(session)
    return Outcome(base, True, ended, _found(base, session, ended), tuple(session.tries), session.frontier())


def best_within_bytes(problem: Problem, effort: Effort | None = None, say: Callable[[str], None] = silent) -> Outcome:
    """The choice of least measured loss whose exact bytes are at most `max_bytes`; that promise is hard.

    Without any measurement (no evaluations, no time) the prediction decides. Limits that `measure` returns are told in
    `reached`, not searched for. Raises BudgetTooSmallError when no choice is within `max_bytes`.
    """
    if problem.max_bytes is None:
        raise AnyQuantError("search: the best within bytes needs max_bytes")
    session = Session(problem, effort or Effort(), say)
    choice, _ = session.fit(problem.groups, problem.max_bytes)
    if session.left and not session.known(choice):
        session.attempt(choice, "predicted")
    if not session.tries:
        base = session.judged(choice, None, "predicted")
        return Outcome(base, True, _ended(session), "The predicted best choice within the bytes; not measured.", ())
    base = repair(session, min(session.tries, key=_loss), shrink=False)
    ended = _ended(session)
    return Outcome(base, base.passed, ended, _found(base, session, ended), tuple(session.tries), session.frontier())


def _loss(tried: Try) -> float:
    loss = math.inf if tried.measured is None else tried.measured.loss
    return loss if math.isfinite(loss) else math.inf


class _Ladder:
    """Where to measure next, on the curve of predicted best choices."""

    def __init__(self, session: Session) -> None:
        self.session = session
        problem = session.problem
        self.curve = curve(problem.groups)
        everything = sum(max(each.nbytes for each in group.candidates) for group in problem.groups)
        self.top: Choice = allocate(problem.groups, everything).choice
        self.capped = False
        limit = problem.max_bytes
        if limit is not None and problem.nbytes(self.top) > limit:
            self.top, self.capped = session.fit(problem.groups, limit)[0], True
        self.largest = problem.nbytes(self.top)
        self.width = math.inf  # of the bracket, when it was last looked at
        self.poor = 0  # how often it then was not even halved since the time before

    def passing(self) -> Try | None:
        """The smallest that passed, of equal ones the better."""
        passed = [tried for tried in self.session.tries if tried.passed]
        return min(passed, key=lambda tried: (tried.nbytes, tried.score), default=None)

    def failing(self) -> Try | None:
        """The largest that failed, of those smaller than the smallest that passed."""
        passing = self.passing()
        failed = [t for t in self.session.tries if not t.passed and (passing is None or t.nbytes < passing.nbytes)]
        return max(failed, key=lambda tried: tried.nbytes, default=None)

    def next(self) -> tuple[Choice, str] | None:
        """The choice to measure next and why; None when the bracket is closed."""
        passing, failing, session = self.passing(), self.failing(), self.session
        if not session.tries:
            return self._near(self._begin()), "from the prediction"
        if passing is None:
            if session.known(self.top):
                return None
            urgent = session.left <= _URGENT
            wanted = self._root(_ROOM if urgent else 0.0)
            if session.left == 1 or wanted >= self.largest:
                return self.top, "the largest"
            least = failing.nbytes * (1 + self.session.effort.tolerance) if failing else 0.0
            choice = self._near(max(wanted, math.ceil(least)))
            return (self.top, "the largest") if session.known(choice) else (choice, "along the line")
        low = session.smallest - 1 if failing is None else failing.nbytes
        step = session.effort.tolerance * passing.nbytes
        if passing.nbytes <= session.smallest or passing.nbytes - low <= step:
            return None
        # a third of a step above the line: more likely to pass; and next to an end, one step from it, to close
        between = min(self._root(0.0) + step / 3, passing.nbytes - 0.95 * step)
        between = max(between, low + 0.95 * step)
        self.poor += passing.nbytes - low > self.width / 2
        if self.poor > 1:  # the line does not tell
            between = self._farther(passing, step) if failing is None else self._halved(passing, failing)
            between = min(max(between, low + 0.95 * step), passing.nbytes - 0.95 * step)
        self.width = passing.nbytes - low
        for target in (math.floor(between), (low + passing.nbytes) // 2, passing.nbytes - 1):
            choice = self._near(target)
            if not session.known(choice) and session.problem.nbytes(choice) < passing.nbytes:
                return choice, "between" if failing else "along the line"
        return None

    def _farther(self, passing: Try, step: float) -> float:
        """With nothing that failed below, ever longer steps down: the border is mostly near."""
        return passing.nbytes - step * _STRIDE ** (self.poor - 1)

    def _halved(self, passing: Try, failing: Try) -> float:
        """Half way in log loss, as Dekker and Brent do."""
        return self._nbytes_for(math.sqrt(max(failing.predicted * max(passing.predicted, self._floor), 0.0)))

    def _near(self, nbytes: int | float) -> Choice:
        """The best choice for so many bytes, the smallest if they are fewer."""
        wanted = min(max(math.floor(nbytes), self.session.smallest), self.largest)
        try:
            return self.session.fit(self.session.problem.groups, wanted)[0]
        except BudgetTooSmallError:
            return self.session.fit(self.session.problem.groups, self.largest)[0]

    def _begin(self) -> int:
        start = self.session.problem.start
        low, high = max(float(self.curve.loss[-1]), self._floor), float(self.curve.loss[0])
        if start is None and high <= 0:
            return self.session.smallest
        wanted = math.sqrt(low * high) if start is None else start
        return self._nbytes_for(wanted * (_UNCORRECTED if self.session.effort.expired() else 1.0))

    @property
    def _floor(self) -> float:
        """A predicted loss of zero, where a logarithm is taken."""
        return 1e-9 * max(float(self.curve.loss[0]), 1e-30)

    def _nbytes_for(self, predicted: float) -> int:
        return self.curve.nbytes_for(predicted) + self.session.overhead

    def _root(self, room: float) -> int:
        """Bytes at which the score is expected to be `-room`."""
        points = [(math.log(max(t.predicted, self._floor)), t.score + room) for t in self.session.tries]
        points.sort(key=lambda point: abs(point[1]))
        place, score = points[0]
        slope = 1.0
        for other, other_score in points[1:]:
            if abs(other - place) >= _APART:
                slope = min(max((other_score - score) / (other - place), _SLOPES[0]), _SLOPES[1])
                break
        return self._nbytes_for(math.exp(min(place - score / slope, 700.0)))

    def needed(self) -> int | None:
        """The bytes at which the limits are expected to hold; None if not even the least loss would do."""
        nbytes = self._root(0.0)
        place = self.curve.nbytes[-1] + self.session.overhead
        return nbytes if nbytes < place else None


def _ended(session: Session) -> Ended:
    if len(session.tries) >= session.effort.evaluations:
        return Ended.EVALUATIONS
    return Ended.EXPIRED if session.effort.expired() else Ended.CONVERGED


def _missed(session: Session, ladder: _Ladder) -> Outcome:
    """No choice passed: which limit binds, and what could be promised instead."""
    tries = tuple(session.tries)
    if not tries:
        return Outcome(None, False, _ended(session), f"Nothing was measured: {_WHY[_ended(session)]}.", tries)
    nearest = min(tries, key=lambda tried: (tried.score, tried.nbytes))
    offer = _offer(nearest, session.effort.spread)
    if not session.known(ladder.top):
        ended = _ended(session)
        reason = f"No choice that was tried kept the limits, and {_WHY[ended]}. {offer}"
    elif ladder.capped:
        ended, needed = Ended.SIZE, ladder.needed()
        more = "even the largest choice is not expected to" if needed is None else f"about {needed:,} bytes would"
        reason = f"The best choice within {session.problem.max_bytes:,} bytes misses a limit; {more} keep it. {offer}"
    else:
        ended = Ended.UNREACHABLE
        reason = f"Even the choice of least loss, {ladder.largest:,} bytes, misses a limit. {offer}"
    return Outcome(nearest, False, ended, reason, tries, session.frontier())


_WHY = {
    Ended.CONVERGED: "nothing better is expected",
    Ended.EVALUATIONS: "all measurements are used",
    Ended.EXPIRED: "the time is over",
}


def _found(base: Try, session: Session, ended: Ended) -> str:
    return f"Try {base.number} of {session.made}, {base.nbytes:,} bytes: {_WHY[ended]}."


def _offer(nearest: Try, spread: float) -> str:
    """The nearest contract that would likely hold."""
    margins = nearest.measured.margins if nearest.measured else ()

    def told(margin: Margin) -> str:
        text = f"{margin.name} {margin.value:.4g}, limit {margin.limit:.4g}"
        return f"{text}, likely to hold at {margin.cautious(spread):.4g}"

    missed = [told(margin) for margin in margins if margin.score(spread) > 0]
    return f"Nearest, at {nearest.nbytes:,} bytes: {'; '.join(missed)}."
