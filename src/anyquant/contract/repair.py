"""What the measurements say about the predictions, kind by kind, and exchanges between kinds that follow from it.

The predictions of a kind of groups (a role) may all be too low or too high by one factor. At the best choice for the
predictions an exchange between kinds changes the predicted sum only in second order, but the measured one in first
order where a factor is off. So: tilt one kind, choose again at equal bytes, measure, and fit the factors to all that
was measured near there; then choose with the fitted factors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from anyquant.contract.allocate import BudgetTooSmallError, Choice, Group, curve
from anyquant.contract.measured import difference
from anyquant.contract.tries import Problem, Session, Try

Factors = Mapping[str, float]

_TILT = 2.0
_PRIOR = 0.5  # standard deviation of a factor about their common mean
_NOISE = 0.01  # of a measured ratio, paired; more with the distance, where a straight line is no longer true
_NEAR = 0.7  # of log loss: tries farther from the base tell little about it
_LEAST_GAIN = 0.02  # of the loss: less is not worth a measurement
_LEAST_SAVING = 0.01  # of the bytes
_PATIENCE = 3  # exchanges in a row that bring nothing
_RUNS = 8  # kinds made of neighbours when none are named


def repair(session: Session, base: Try, shrink: bool) -> Try:
    """The best try after exchanges, while measurements are left and some of them gain.

    With `shrink`, fewer bytes within the limits; else less loss within the bytes of `base`.
    """
    kinds = kinds_of(session.problem)
    untilted = _by_share(session, base, kinds)
    missed = 0
    while session.left and missed < _PATIENCE:
        factors = fitted(session, base, kinds, _worth(shrink))
        choice, step = _chosen(session, base, kinds, factors, shrink), "fitted"
        while choice is None and untilted:
            kind, step = untilted[0], f"tilted towards {untilted[0]}"
            untilted = untilted[1:]
            choice = _fit(
                session, tilted(session.problem.groups, kinds, _more(factors, kind)), _room(session, base, shrink)
            )
        if choice is None:
            break
        tried = session.attempt(choice, step)
        missed += 1
        if _better(tried, base, shrink):
            base, missed = tried, 0
    return base


def kinds_of(problem: Problem) -> Mapping[str, str]:
    """The kind of every group: as named, else the run of neighbours it is in."""
    if problem.kinds:
        return {group.name: problem.kinds.get(group.name, group.name) for group in problem.groups}
    runs = min(_RUNS, len(problem.groups))
    return {group.name: f"part {index * runs // len(problem.groups) + 1}" for index, group in enumerate(problem.groups)}


def tilted(groups: Sequence[Group], kinds: Mapping[str, str], factors: Factors) -> list[Group]:
    """The groups with the losses of each kind multiplied."""
    return [
        replace(
            group,
            candidates=tuple(replace(c, loss=c.loss * factors.get(kinds[group.name], 1.0)) for c in group.candidates),
        )
        for group in groups
    ]


def fitted(session: Session, base: Try, kinds: Mapping[str, str], worth: Callable[[Try], float]) -> Mapping[str, float]:
    """The factor of each kind, by ridge regression on the tries near the base.

    worth / worth_base - 1 = sum over kinds of factor (predicted_kind - predicted_kind_base) / predicted_base, factors
    about 1 before anything is seen. Only their ratios matter to a choice.
    """
    names = sorted(set(kinds.values()))
    own, height = _parts(session, base.choice, kinds, names), worth(base)
    sum_own = float(own.sum())
    rows, seen, weights = [], [], []
    for tried in session.tries:
        value = worth(tried)
        far = abs(math.log(value / height)) if value > 0 and height > 0 else math.inf
        if far > _NEAR or sum_own <= 0:
            continue
        rows.append((_parts(session, tried.choice, kinds, names) - own) / sum_own)
        seen.append(value / height - 1)
        weights.append(1 / (_NOISE**2 + (0.5 * far**2) ** 2))
    if not rows:
        return dict.fromkeys(names, 1.0)
    design, weight = np.array(rows), np.array(weights)[:, None]
    left = design.T @ (weight * design) + np.eye(len(names)) / _PRIOR**2
    right = design.T @ (weight[:, 0] * (np.array(seen) - design.sum(axis=1)))
    solution = np.clip(1 + np.linalg.solve(left, right), 0.1, 10.0)
    return dict(zip(names, solution.tolist(), strict=True))


def _chosen(session: Session, base: Try, kinds: Mapping[str, str], factors: Factors, shrink: bool) -> Choice | None:
    """The best choice for the factors, if it is new and promises enough."""
    groups = tilted(session.problem.groups, kinds, factors)
    losses = {group.name: {each.name: each.loss for each in group.candidates} for group in groups}
    now = math.fsum(losses[group][name] for group, name in base.choice.items())
    limit = _room(session, base, shrink)
    if shrink:
        limit = curve(groups).nbytes_for(now * math.exp(min(-base.score, 1.0))) + session.overhead
        if limit > base.nbytes * (1 - _LEAST_SAVING):
            return None
    choice = _fit(session, groups, limit)
    if choice is None or shrink:
        return choice
    then = math.fsum(losses[group][name] for group, name in choice.items())
    return choice if then <= now * (1 - _LEAST_GAIN) else None


def _fit(session: Session, groups: Sequence[Group], limit: int) -> Choice | None:
    """The choice for so many bytes, unless it is known or there is none."""
    try:
        choice, _ = session.fit(groups, limit)
    except BudgetTooSmallError:
        return None
    return None if session.known(choice) else choice


def _room(session: Session, base: Try, shrink: bool) -> int:
    limit = session.problem.max_bytes
    return base.nbytes if shrink or limit is None else limit


def _more(factors: Factors, kind: str) -> Factors:
    return {**factors, kind: factors.get(kind, 1.0) * _TILT}


def _better(tried: Try, base: Try, shrink: bool) -> bool:
    if shrink:
        return tried.passed and (tried.score < base.score or tried.nbytes <= base.nbytes * (1 - _LEAST_SAVING))
    if tried.measured is None or base.measured is None or not math.isfinite(tried.measured.loss):
        return False
    if not math.isfinite(base.measured.loss):
        return True
    apart, error = difference(tried.measured, base.measured)
    return apart + (error if tried.measured.totals is not None else 0.0) < 0


def _worth(shrink: bool) -> Callable[[Try], float]:
    def loss(tried: Try) -> float:
        return math.nan if tried.measured is None else tried.measured.loss

    return (lambda tried: math.exp(tried.score)) if shrink else loss


def _by_share(session: Session, base: Try, kinds: Mapping[str, str]) -> list[str]:
    """Kinds, the one with the largest part of the predicted loss first."""
    names = sorted(set(kinds.values()))
    parts = _parts(session, base.choice, kinds, names)
    return [names[index] for index in np.argsort(-parts, kind="stable")]


def _parts(session: Session, choice: Choice, kinds: Mapping[str, str], names: list[str]) -> np.ndarray:
    """The predicted loss in every kind, in the order of names."""
    sums = dict.fromkeys(names, 0.0)
    for group, name in choice.items():
        sums[kinds[group]] += session.loss(group, name)
    return np.array([sums[name] for name in names])
