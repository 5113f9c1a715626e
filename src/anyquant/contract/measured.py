"""What was measured of a choice on *select*, and how much room it must leave so that *certify* will agree.

The certificate is judged on another split, and passes when its own upper bound, value_c + 1.645 SE_c, lies within the
limit. Both splits are samples: value_c - value_s has the standard error sqrt(SE_s^2 + SE_c^2). For the certificate to
pass with 90 % probability, the value on *select* must satisfy

    value_s + 1.645 SE_c + t sqrt(SE_s^2 + SE_c^2) <= limit,

t a quantile of Student's distribution with as many degrees of freedom as *select* has documents but one: their spread
is an estimate, too. It is that of 97 %: the bound of a skewed value varies with it, and more than it does, and what is
chosen is the luckiest of several tries. Then about 90 % are certified when documents of real artifacts are drawn
(bench/honesty.py). Where the bootstrap gave an upper bound, its distance from the value takes the place of 1.645 SE:
divergences are skewed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from anyquant.evaluation.bootstrap import Estimate, ratio
from anyquant.evaluation.kl import Float64

BOUND = 1.6449  # standard errors of a one-sided 95 % bound
LIKELY = 1.880794  # and of 97 %, where the standard error is known
_FAR = 5.0  # scores are cut here: e^5 times the limit says only that it is far


@dataclass(frozen=True)
class Margin:
    """One limit: `value <= limit` is wanted, whatever its name says; `upper` is the value's one-sided 95 % bound.

    `documents` are those that the standard error was estimated from; None: so many that it is known.
    """

    name: str
    value: float
    standard_error: float
    limit: float
    upper: float | None = None
    documents: int | None = None

    def cautious(self, spread: float = 1.0) -> float:
        """The value with the room it needs; `spread` is SE_c / SE_s, about sqrt(documents of select / of certify)."""
        upper = self.value + BOUND * self.standard_error if self.upper is None else self.upper
        apart = likely(self.documents) * math.hypot(1.0, spread) * self.standard_error
        return self.value + spread * (upper - self.value) + apart

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


def likely(documents: int | None) -> float:
    """Standard errors of a one-sided 97 % bound, the error estimated from so many documents: Student's quantile.

    By the expansion of Abramowitz & Stegun 26.7.5, right to 0.1 % from 4 documents on.
    """
    if documents is None:
        return LIKELY
    if documents < 2:
        return math.inf
    z, freedom = LIKELY, documents - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


def at_most(name: str, estimate: Estimate, limit: float) -> Margin:
    return Margin(name, estimate.value, estimate.standard_error, limit, estimate.upper, estimate.documents)


def at_least(name: str, estimate: Estimate, limit: float, *, perfect: float = 1.0) -> Margin:
    """A limit from below, turned around: what is missing to `perfect` must be at most what the limit leaves."""
    value, upper = perfect - estimate.value, perfect - estimate.lower
    return Margin(name, value, estimate.standard_error, perfect - limit, upper, estimate.documents)


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
