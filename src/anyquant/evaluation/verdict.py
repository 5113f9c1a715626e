"""The contract, and what the evidence says about it.

`pass` only if the bound on the bad side lies within the limit, `fail` only if the bound on the good side lies beyond
it. Everything else, missing and non-finite evidence and fewer than 30 documents included, is `inconclusive`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from anyquant.core.errors import UsageError
from anyquant.core.registry import suggest
from anyquant.evaluation.bootstrap import ENOUGH_DOCUMENTS, Estimate
from anyquant.evaluation.kl import TAIL_TOKENS
from anyquant.evaluation.measures import Measures

# mean KL of llama.cpp's q8_0, q6_K, q5_K_M, q4_K_M on Llama-3-8B, wikitext-2 (its perplexity README)
QUALITIES: Mapping[str, float] = {"lossless": 0.0014, "strict": 0.0055, "balanced": 0.011, "compact": 0.030}


class Status(StrEnum):
    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    MEASURED = "measured"


@dataclass(frozen=True)
class Contract:
    """Limits; None means no limit. KL in nats per token, `max_ppl_increase` relative (0.01 is 1 %),

    `min_same_top` a share of 0 to 1, `max_size` bytes of the artifact.
    """

    max_kl: float | None = None
    max_kl_99_9: float | None = None
    max_ppl_increase: float | None = None
    min_same_top: float | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                flag = "--" + item.name.replace("_", "-")
                raise UsageError(f"{flag} is {value}; give a finite number that is not negative")
        if self.min_same_top is not None and self.min_same_top > 1:
            raise UsageError(f"--min-same-top is {self.min_same_top}; it is a share, give a number of 0 to 1")

    @property
    def empty(self) -> bool:
        return all(getattr(self, item.name) is None for item in fields(self))

    @property
    def needs_measures(self) -> bool:
        """Whether any limit is about quality rather than size."""
        return any(getattr(self, item.name) is not None for item in fields(self) if item.name != "max_size")


@dataclass(frozen=True)
class LimitResult:
    """One limit and its evidence; `lower` and `upper` are one-sided 95 % bounds."""

    name: str
    limit: float
    value: float
    lower: float
    upper: float
    status: Status
    sentence: str


@dataclass(frozen=True)
class Verdict:
    status: Status
    limits: tuple[LimitResult, ...]
    sentence: str


def contract_for(quality: str) -> Contract:
    """The contract of a named quality. Raises UsageError for an unknown name."""
    if quality not in QUALITIES:
        raise UsageError(f"unknown quality {quality!r}; {suggest(quality, list(QUALITIES))}")
    return Contract(max_kl=QUALITIES[quality])


def judge(measures: Measures | None, contract: Contract, size: int | None = None) -> Verdict:
    """The verdict on `measures` (None: nothing could be measured) and `size`, the artifact's bytes."""
    if contract.empty:
        return Verdict(Status.MEASURED, (), "No limit was set: measured, not judged.")
    results = [*_quality(measures, contract), *_size(size, contract)]
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
    return LimitResult(name, limit, value, lower, upper, status, f"{noun} {value:.4g}, {text}.")


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
    return LimitResult("min_same_top", limit, value, lower, upper, status, f"{noun} {value:.2%}, {text}.")


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
    return LimitResult("max_kl_99_9", limit, value, math.nan, upper, status, text)


def _size(size: int | None, contract: Contract) -> list[LimitResult]:
    limit = contract.max_size
    if limit is None:
        return []
    if size is None:
        text = f"The size cannot be judged against {limit} bytes: nothing was written."
        return [LimitResult("max_size", limit, math.nan, math.nan, math.nan, Status.INCONCLUSIVE, text)]
    status = Status.PASS if size <= limit else Status.FAIL
    side = "within" if status is Status.PASS else "above"
    text = f"size {size} bytes, {side} the limit of {limit}."
    return [LimitResult("max_size", limit, size, size, size, status, text)]


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
