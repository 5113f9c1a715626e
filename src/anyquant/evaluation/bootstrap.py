"""Confidence bounds of a mean per token, from per-document totals.

Tokens of one document are not independent, documents are taken to be: so documents are resampled. The estimate is the
ratio R = sum(totals) / sum(counts), a mean weighted by tokens. Bounds are bootstrap-t (studentized by the linearised
standard error of a ratio), which keeps its coverage best for the skewed values that divergences are; BCa where that
fails. Simulated coverage of the 95 % upper bound with 34 documents of unequal length: 94.5 % for gamma distributed
divergences of skewness 1.4, 93.5 % for log-normal ones of sigma 0.4 and 90 % of sigma 0.8 (BCa 89 %, normal 85 %).

Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 12 and 14; Cochran, Sampling Techniques (1977),
section 6.4.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from anyquant.core.errors import AnyQuantError
from anyquant.evaluation.kl import Float64

ENOUGH_DOCUMENTS = 30
_BATCH = 1 << 22  # elements of the resampling weights held at once
_ROUNDING = 1e-12  # of a sum of squares: less is what float64 leaves where the exact difference is zero


@dataclass(frozen=True)
class Estimate:
    """`lower` and `upper` are one-sided bounds, each right with 95 % confidence; `interval` is two-sided 95 %.

    `conclusive` is False for fewer than 30 documents or values that are not finite: then no verdict may rest on it.
    """

    value: float
    standard_error: float
    lower: float
    upper: float
    interval: tuple[float, float]
    documents: int
    conclusive: bool


@dataclass(frozen=True)
class Resamples:
    """Bootstrap replicates of a ratio and of its standard error."""

    ratios: Float64
    errors: Float64


def ratio(totals: Float64, counts: Float64) -> tuple[float, float]:
    """R = sum(totals) / sum(counts) and its standard error, by linearisation."""
    value = float(totals.sum() / counts.sum())
    documents = len(totals)
    if documents < 2:
        return value, math.nan
    residuals = totals - value * counts
    return value, math.sqrt(documents / (documents - 1) * float((residuals**2).sum())) / float(counts.sum())


def estimate(
    totals: Float64, counts: Float64, *, confidence: float = 0.95, replicates: int = 4000, seed: int = 0
) -> Estimate:
    """The ratio with its bounds; `totals` and `counts` (documents,), paired. The same seed gives the same bounds.

    Raises AnyQuantError when the arrays differ in length.
    """
    if totals.shape != counts.shape or totals.ndim != 1:
        raise AnyQuantError(f"bootstrap: totals {totals.shape} and counts {counts.shape} must be paired vectors")
    documents = len(totals)
    nan = math.nan
    if not documents or not np.isfinite(totals).all() or not float(counts.sum()) > 0:
        with np.errstate(invalid="ignore"):
            value = float(totals.sum() / counts.sum()) if documents and float(counts.sum()) > 0 else nan
        return Estimate(value, nan, nan, nan, (nan, nan), documents, False)
    value, error = ratio(totals, counts)
    if documents < 2:
        return Estimate(value, nan, nan, nan, (nan, nan), documents, False)
    drawn = resample(totals, counts, replicates, seed)
    lower, upper = bounds(totals, counts, drawn, confidence)
    interval = bounds(totals, counts, drawn, 1 - (1 - confidence) / 2)
    return Estimate(value, error, lower, upper, interval, documents, documents >= ENOUGH_DOCUMENTS)


def bounds(totals: Float64, counts: Float64, drawn: Resamples, confidence: float) -> tuple[float, float]:
    """Lower and upper one-sided bound at `confidence`: studentized, or BCa where a replicate has no spread."""
    lower, upper = studentized(totals, counts, drawn, confidence)
    if math.isfinite(lower) and math.isfinite(upper):
        return lower, upper
    return bias_corrected(totals, counts, drawn, confidence)


def resample(totals: Float64, counts: Float64, replicates: int, seed: int) -> Resamples:
    """Draw documents with replacement, `replicates` times."""
    documents = len(totals)
    generator = np.random.default_rng(seed)
    chances = np.full(documents, 1.0 / documents)
    value = float(totals.sum() / counts.sum())
    apart = totals - value * counts  # sums of squares of the totals themselves would lose a small spread to rounding
    columns = np.stack([apart, counts, apart**2, apart * counts, counts**2], axis=1)
    sums = np.empty((replicates, columns.shape[1]))
    batch = max(1, _BATCH // documents)
    for start in range(0, replicates, batch):
        stop = min(start + batch, replicates)
        sums[start:stop] = generator.multinomial(documents, chances, size=stop - start) @ columns
    drawn, weight, squares, products, weights = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = drawn / weight
        spread = squares - 2 * shift * products + shift**2 * weights
        spread = np.where(spread > _ROUNDING * squares, spread, 0.0)  # one document drawn every time has none
        errors = np.sqrt(documents / (documents - 1) * spread) / weight
    return Resamples(value + shift, errors)


def studentized(totals: Float64, counts: Float64, drawn: Resamples, confidence: float) -> tuple[float, float]:
    """Bootstrap-t: R - t* SE with t* the quantiles of (R* - R) / SE*. Efron & Tibshirani 12.5."""
    value, error = ratio(totals, counts)
    if error <= 1e-12 * abs(value):
        return value, value
    with np.errstate(invalid="ignore", divide="ignore"):
        statistics = (drawn.ratios - value) / drawn.errors
    statistics = np.where(np.isnan(statistics), 0.0, statistics)
    low, high = np.quantile(statistics, [1 - confidence, confidence], method="higher")
    return value - float(high) * error, value - float(low) * error


def bias_corrected(totals: Float64, counts: Float64, drawn: Resamples, confidence: float) -> tuple[float, float]:
    """BCa: quantiles of the replicates, corrected for bias and skewness. Efron & Tibshirani 14.3."""
    value, _ = ratio(totals, counts)
    left_out = (totals.sum() - totals) / (counts.sum() - counts)
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum())
    if spread == 0:
        return value, value
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
    normal = NormalDist()
    below = float((drawn.ratios < value).mean() + 0.5 * (drawn.ratios == value).mean())
    bias = normal.inv_cdf(min(max(below, 1 / len(drawn.ratios)), 1 - 1 / len(drawn.ratios)))

    def level(wanted: float) -> float:
        score = bias + normal.inv_cdf(wanted)
        return normal.cdf(bias + score / max(1 - acceleration * score, 1e-6))

    low, high = np.quantile(drawn.ratios, [level(1 - confidence), level(confidence)])
    return float(low), float(high)
