"""The contract, and what the evidence says about it.

`pass` only if the bound on the bad side lies within the limit, `fail` only if the bound on the good side lies beyond
it. Everything else, missing and non-finite evidence and fewer than 30 documents included, is `inconclusive`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from enum import StrEnum

from anyquant.core.errors import AnyQuantError
from anyquant.evaluation.bootstrap import ENOUGH_DOCUMENTS, Estimate
from anyquant.evaluation.drops import Drop
from anyquant.evaluation.kl import TAIL_TOKENS
from anyquant.evaluation.limits import Contract, DropLimit
from anyquant.evaluation.measures import Measures


class Status(StrEnum):
    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    MEASURED = "measured"


@dataclass(frozen=True)
class LimitResult:
    """One limit and its evidence; `lower` and `upper` are one-sided 95 % bounds.

    `kept` is the nearest limit that this evidence shows to be kept, as a flag; "" when it shows none.
    """

    name: str
    limit: float
    value: float
    lower: float
    upper: float
    status: Status
    sentence: str
    kept: str = ""


@dataclass(frozen=True)
class Verdict:
    status: Status
    limits: tuple[LimitResult, ...]
    sentence: str

    @property
    def nearest(self) -> str:
        """The limits that were not shown to be kept, as they would be: the nearest contract. "" when there is none."""
        missed = [result for result in self.limits if result.status is not Status.PASS]
        return " ".join(result.kept for result in missed) if all(result.kept for result in missed) else ""


def judge(
    measures: Measures | None, contract: Contract, size: int | None = None, drops: Sequence[Drop] = ()
) -> Verdict:
    """The verdict on `measures` (None: nothing could be measured), `size`, the artifact's bytes, and users' metrics.

    Raises AnyQuantError for a contract in bits per weight: that needs the model (`Contract.resolved`).
    """
    if contract.max_bpw is not None:
        raise AnyQuantError("a contract in bits per weight must be resolved into bytes before it is judged")
    if contract.empty:
        return Verdict(Status.MEASURED, (), "No limit was set: measured, not judged.")
    found = {drop.limit: drop for drop in drops}
    metrics = [_drop(limit, found.get(limit)) for limit in contract.max_drop]
    results = [*_quality(measures, contract), *metrics, *_size(size, contract)]
    statuses = {result.status for result in results}
    status = next((s for s in (Status.FAIL, Status.INCONCLUSIVE) if s in statuses), Status.PASS)
    return Verdict(status, tuple(results), " ".join(result.sentence for result in results))


def _quality(measures: Measures | None, contract: Contract) -> list[LimitResult]:
    results = []
    reason = _hindrance(measures)
    found = measures
    if contract.max_kl is not None:
        results.append(_at_most("mean KL", "max_kl", contract.max_kl, found.mean_kl if found else None, reason))
    if contract.max_kl_99_9 is not None:
        results.append(_tail(found, contract.max_kl_99_9, reason))
    if contract.max_ppl_increase is not None:
        increase = _shifted(found.ppl_ratio) if found else None
        results.append(_at_most("perplexity increase", "max_ppl_increase", contract.max_ppl_increase, increase, reason))
    if contract.min_same_top is not None:
        results.append(_at_least(found.same_top if found else None, contract.min_same_top, reason))
    return results


def _hindrance(measures: Measures | None) -> str | None:
    """Why no quality limit can be judged at all."""
    if measures is None:
        return "nothing was measured"
    if measures.nonfinite:
        return f"{measures.nonfinite} positions are not finite, first in {measures.nonfinite_document}"
    if measures.documents < ENOUGH_DOCUMENTS:
        return f"{measures.documents} documents are too few, {ENOUGH_DOCUMENTS} are needed"
    return None


def _at_most(noun: str, name: str, limit: float, found: Estimate | None, reason: str | None) -> LimitResult:
    value, lower, upper = (found.value, found.lower, found.upper) if found else (math.nan,) * 3
    if reason or not (math.isfinite(lower) and math.isfinite(upper)):
        text = f"{noun} {value:.4g} cannot be judged against {limit:.4g}: {reason or 'its bounds are not finite'}."
        return LimitResult(name, limit, value, lower, upper, Status.INCONCLUSIVE, text)
    if upper <= limit:
        status, text = Status.PASS, f"at most {upper:.4g} (95 % bound), within the limit of {limit:.4g}"
    elif lower > limit:
        status, text = Status.FAIL, f"at least {lower:.4g} (95 % bound), above the limit of {limit:.4g}"
    else:
        status = Status.INCONCLUSIVE
        text = f"between {lower:.4g} and {upper:.4g}, which leaves the limit of {limit:.4g} open: give more text"
    kept = f"--{name.replace('_', '-')} {rounded(upper)}"
    return LimitResult(name, limit, value, lower, upper, status, f"{noun} {value:.4g}, {text}.", kept)


def _at_least(found: Estimate | None, limit: float, reason: str | None) -> LimitResult:
    value, lower, upper = (found.value, found.lower, found.upper) if found else (math.nan,) * 3
    noun = "same top token"
    if reason or not (math.isfinite(lower) and math.isfinite(upper)):
        text = f"{noun} {value:.2%} cannot be judged against {limit:.2%}: {reason or 'its bounds are not finite'}."
        return LimitResult("min_same_top", limit, value, lower, upper, Status.INCONCLUSIVE, text)
    if lower >= limit:
        status, text = Status.PASS, f"at least {lower:.2%} (95 % bound), within the limit of {limit:.2%}"
    elif upper < limit:
        status, text = Status.FAIL, f"at most {upper:.2%} (95 % bound), below the limit of {limit:.2%}"
    else:
        status = Status.INCONCLUSIVE
        text = f"between {lower:.2%} and {upper:.2%}, which leaves the limit of {limit:.2%} open: give more text"
    kept = f"--min-same-top {rounded(lower, down=True)}"
    return LimitResult("min_same_top", limit, value, lower, upper, status, f"{noun} {value:.2%}, {text}.", kept)


def _tail(measures: Measures | None, limit: float, reason: str | None) -> LimitResult:
    """The 99.9 % quantile has an upper bound only, and only on enough tokens; beyond the limit it is never certain."""
    value = measures.kl_99_9 if measures else math.nan
    upper = measures.kl_99_9_upper if measures else math.nan
    if not reason and measures and not measures.kl_99_9_certified:
        reason = f"{measures.tokens} tokens are too few, {TAIL_TOKENS} are needed"
    noun = f"99.9 % of the KL values are at most {value:.4g}"
    if reason or not math.isfinite(upper):
        text = f"{noun}; cannot be judged against {limit:.4g}: {reason or 'its bound is not finite'}."
        return LimitResult("max_kl_99_9", limit, value, math.nan, upper, Status.INCONCLUSIVE, text)
    status = Status.PASS if upper <= limit else Status.INCONCLUSIVE
    side = "within" if status is Status.PASS else "not shown to be within"
    text = f"{noun}, bounded by {upper:.4g}, {side} the limit of {limit:.4g}."
    return LimitResult("max_kl_99_9", limit, value, math.nan, upper, status, text, f"--max-kl-99-9 {rounded(upper)}")


def _drop(limit: DropLimit, drop: Drop | None) -> LimitResult:
    """A user's metric: bounds in the unit of the limit, from differences item by item."""
    name = f"max_drop {limit.metric}"
    if drop is None or drop.hindrance:
        reason = "it was not measured" if drop is None else drop.hindrance
        text = f"{limit.metric} cannot be judged against a drop of {limit.text}: {reason}."
        value = math.nan if drop is None else drop.value
        return LimitResult(name, limit.amount, value, math.nan, math.nan, Status.INCONCLUSIVE, text)
    lower, upper = drop.lower, drop.upper

    def shown(value: float) -> str:
        return f"{value:.2%}" if limit.relative else f"{value:.4g}"

    if upper <= limit.amount:
        status, text = Status.PASS, f"at most {shown(upper)} (95 % bound), within the limit of {limit.text}"
    elif lower > limit.amount:
        status, text = Status.FAIL, f"at least {shown(lower)} (95 % bound), above the limit of {limit.text}"
    else:
        status = Status.INCONCLUSIVE
        text = (
            f"between {shown(lower)} and {shown(upper)}, which leaves the limit of {limit.text} open: give more items"
        )
    said = f"{limit.metric} {drop.candidate:.4g}, original {drop.baseline:.4g}: drop {shown(drop.value)}, {text}."
    least = f"{rounded(100 * upper)}%" if limit.relative else rounded(upper)
    return LimitResult(name, limit.amount, drop.value, lower, upper, status, said, f"--max-drop {limit.metric}={least}")


def _size(size: int | None, contract: Contract) -> list[LimitResult]:
    limit = contract.max_size
    if limit is None:
        return []
    if size is None:
        text = f"The size cannot be judged against {limit:,} bytes: nothing was written."
        return [LimitResult("max_size", limit, math.nan, math.nan, math.nan, Status.INCONCLUSIVE, text)]
    status = Status.PASS if size <= limit else Status.FAIL
    side = "within" if status is Status.PASS else "above"
    text = f"size {size:,} bytes, {side} the limit of {limit:,}."
    return [LimitResult("max_size", limit, size, size, size, status, text, f"--max-size {size}B")]


def _shifted(ratio: Estimate) -> Estimate:
    """Increase = ratio - 1."""
    low, high = ratio.interval
    return Estimate(
        ratio.value - 1,
        ratio.standard_error,
        ratio.lower - 1,
        ratio.upper - 1,
        (low - 1, high - 1),
        ratio.documents,
        ratio.conclusive,
    )


def rounded(bound: float, down: bool = False) -> str:
    """A bound to three digits, away from what was measured, so that the limit still holds."""
    context = Context(prec=3, rounding=ROUND_FLOOR if down else ROUND_CEILING)
    return f"{float(context.create_decimal_from_float(bound)):.3g}"
