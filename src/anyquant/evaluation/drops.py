"""How much worse a user's metric became, from its scores item by item on the original and on the artifact."""

import math
from dataclasses import dataclass

import numpy as np

from anyquant.core.errors import UsageError
from anyquant.evaluation.bootstrap import ENOUGH_DOCUMENTS, estimate
from anyquant.evaluation.kl import Float64
from anyquant.evaluation.limits import HIGHER, DropLimit, split_metric

FEW = 10  # changed items below which resampling alone is not trusted


@dataclass(frozen=True)
class Scores:
    """What one call of a metric gave: one score per item, or `single`: one number for all of them."""

    values: Float64
    single: bool

    @property
    def mean(self) -> float:
        return float(self.values.mean())


@dataclass(frozen=True)
class Drop:
    """`value` with its one-sided 95 % bounds in the unit of the limit: absolute, or as a share of |baseline|.

    Positive is worse, whichever direction is better. `hindrance` says why there can be no verdict, "" when there can.
    """

    limit: DropLimit
    baseline: float
    candidate: float
    value: float
    lower: float
    upper: float
    items: int
    hindrance: str = ""


def refuse_zero(limit: DropLimit, baseline: Scores) -> None:
    """Raise UsageError for a percentage of nothing."""
    if limit.relative and baseline.mean == 0:
        raise UsageError(
            f"--max-drop {limit.metric}={limit.text}: the original scores 0, of which there is no percentage; give an "
            "absolute drop, e.g. =0.01"
        )


def drop_of(limit: DropLimit, baseline: Scores, candidate: Scores, seed: int = 0) -> Drop:
    """The drop of the mean, bounded by a paired bootstrap over items.

    A relative limit r bounds the mean of drop - r |baseline| item by item, so that the spread of the baseline counts
    too; negative baselines are worse by the same share of their size.
    """
    refuse_zero(limit, baseline)
    if baseline.single != candidate.single or len(baseline.values) != len(candidate.values):
        return failed(limit, baseline, f"the original has {_count(baseline)}, the artifact {_count(candidate)}")
    worse = 1.0 if split_metric(limit.metric)[2] == HIGHER else -1.0
    unit = abs(baseline.mean) if limit.relative else 1.0
    differences = worse * (baseline.values - candidate.values)
    value = float(differences.mean()) / unit
    found = (limit, baseline.mean, candidate.mean, value)
    items = len(differences)
    if baseline.single:
        return Drop(*found, math.nan, math.nan, 1, "it gives one number, which has no bound; give one score per item")
    if items < ENOUGH_DOCUMENTS:
        reason = f"{items} items are too few, {ENOUGH_DOCUMENTS} are needed"
        return Drop(*found, math.nan, math.nan, items, reason)
    # the limit itself, item by item: zero for an absolute one, whose size is known
    allowed = limit.amount * math.copysign(1.0, baseline.mean) * baseline.values if limit.relative else np.zeros(items)
    beyond = estimate(differences - allowed, np.ones(items), seed=seed)
    shift = limit.amount if limit.relative else 0.0
    upper = max(shift + beyond.upper / unit, _rare(differences, baseline, candidate) / unit)
    return Drop(*found, shift + beyond.lower / unit, upper, items)


def _rare(differences: Float64, baseline: Scores, candidate: Scores) -> float:
    """Upper bound of the drop when few items changed: what none of 40 items showed may still happen to 7 % of all.

    Share of items that become worse (Clopper & Pearson 1934) times the largest drop seen; and at least the share that
    may hide behind none, times the size of the scores: one item that became a little worse does not tell less.
    Resampling only ever finds what it has seen; for scores that are right or wrong that would pass too often.
    """
    worse, items = differences[differences > 0], len(differences)
    if np.count_nonzero(differences) >= FEW:
        return -math.inf
    both = np.concatenate([baseline.values, candidate.values])
    most = float(max(np.abs(both).max(), np.ptp(both)))
    seen = share_bound(len(worse), items) * float(worse.max()) if len(worse) else 0.0
    return max(seen, share_bound(0, items) * most)


def share_bound(count: int, items: int, confidence: float = 0.95) -> float:
    """Largest share under which `count` or fewer of `items` come up with probability 1 - confidence."""
    low, high = count / items, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        chance = sum(math.comb(items, k) * middle**k * (1 - middle) ** (items - k) for k in range(count + 1))
        low, high = (middle, high) if chance > 1 - confidence else (low, middle)
    return high


def failed(limit: DropLimit, baseline: Scores, reason: str) -> Drop:
    """The metric could not be had of the artifact."""
    return Drop(limit, baseline.mean, math.nan, math.nan, math.nan, math.nan, 0, reason)


def _count(scores: Scores) -> str:
    return "one number" if scores.single else f"{len(scores.values)} scores"
