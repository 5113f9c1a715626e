"""What was measured of a choice on *select*, and how much room it must leave so that *certify* will agree.

The certificate is judged on another split, and passes when its own upper bound, value_c + 1.645 SE_c, lies within the
limit. Both splits are samples: value_c - value_s has the standard error sqrt(SE_s^2 + SE_c^2). For the certificate to
pass with 90 % probability (1.2816 standard errors), the value on *select* must satisfy

    value_s + 1.645 SE_c + 1.2816 sqrt(SE_s^2 + SE_c^2) <= limit,

for splits of one size value_s + (1.645 + 1.812) SE <= limit. Where the bootstrap gave an upper bound, its distance from
the value takes the place of 1.645 SE: divergences are skewed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from anyquant.evaluation.bootstrap import Estimate, ratio
from anyquant.evaluation.kl import Float64

BOUND = 1.6449  # standard errors of a one-sided 95 % bound
LIKELY = 1.2816  # and of 90 %
_FAR = 5.0  # scores are cut here: e^5 times the limit says only that it is far


@dataclass(frozen=True)
class Margin:
    """One limit: `value <= limit` is wanted, whatever its name says; `upper` is the value's one-sided 95 % bound."""

    name: str
    value: float
    standard_error: float
    limit: float
    upper: float | None = None

    def cautious(self, spread: float = 1.0) -> float:
        """The value with the room it needs; `spread` is SE_c / SE_s, about sqrt(documents of select / of certify)."""
        upper = self.value + BOUND * self.standard_error if self.upper is None else self.upper
        return self.value + spread * (upper - self.value) + LIKELY * math.hypot(1.0, spread) * self.standard_error

    def score(self, spread: float = 1.0) -> float:
        """At most 0 exactly if the cautious value is within the limit; log(cautious / limit) where that exists."""
        cautious = self.cautious(spread)
        if not math.isfinite(cautious):
            return _FAR
        if self.limit > 0:
            score = math.log(cautious / self.limit) if cautious > 0 else -_FAR
        else:  # a limit of zero or below has no ratio: steps of its own size, or of the noise
            score = (cautious - self.limit) / max(abs(self.limit), self.standard_error, 1e-12)
        return min(max(score, -_FAR), _FAR)


def at_most(name: str, estimate: Estimate, limit: float) -> Margin:
    return Margin(name, estimate.value, estimate.standard_error, limit, estimate.upper)


def at_least(name: str, estimate: Estimate, limit: float, *, perfect: float = 1.0) -> Margin:
    """A limit from below, turned around: what is missing to `perfect` must be at most what the limit leaves."""
    return Margin(name, perfect - estimate.value, estimate.standard_error, perfect - limit, perfect - estimate.lower)


@dataclass(frozen=True)
class Measured:
    """A choice measured on *select*: its mean `loss` (KL, nats per token) and every limit.

    `totals` and `counts`, per document, let two choices be compared on the same documents.
    """

    loss: float
    standard_error: float
    margins: Sequence[Margin] = ()
    totals: Float64 | None = None
    counts: Float64 | None = None

    def score(self, spread: float = 1.0) -> float:
        """Of the limit that is worst met; at most 0 exactly if all are likely to be certified."""
        scores = [margin.score(spread) for margin in self.margins]
        return max(scores, default=-_FAR if math.isfinite(self.loss) else _FAR)


def difference(measured: Measured, other: Measured) -> tuple[float, float]:
    """measured.loss - other.loss and its standard error, paired by document where both have documents."""
    totals, others, counts = measured.totals, other.totals, measured.counts
    if totals is not None and others is not None and counts is not None and totals.shape == others.shape:
        return ratio(totals - others, counts)
    apart = measured.loss - other.loss
    return apart, math.hypot(measured.standard_error, other.standard_error)
