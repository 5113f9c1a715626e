"""Bounds against the t distribution where it is exact, scipy's BCa, and their coverage in simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from anyquant.core.errors import AnyQuantError
from anyquant.evaluation.bootstrap import bias_corrected, bounds, estimate, ratio, resample


def test_normal_data_gives_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, size=80)
    found = estimate(values, np.ones(80), replicates=20000)
    error = values.std(ddof=1) / math.sqrt(80)
    quantile = scipy.stats.t.ppf(0.95, 79)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(error)
    assert found.upper == pytest.approx(values.mean() + quantile * error, abs=0.1 * error)
    assert found.lower == pytest.approx(values.mean() - quantile * error, abs=0.1 * error)
    assert found.interval[0] < found.lower < found.upper < found.interval[1]


def test_bca_equals_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    ones = np.ones(60)
    lower, upper = bias_corrected(values, ones, resample(values, ones, 40000, 0), 0.975)
    oracle = scipy.stats.bootstrap((values,), np.mean, n_resamples=40000, method="BCa", random_state=2)
    assert (lower, upper) == pytest.approx(tuple(oracle.confidence_interval), abs=0.01)


def test_the_ratio_weighs_by_tokens() -> None:
    value, error = ratio(np.array([10.0, 0.0, 4.0]), np.array([10.0, 70.0, 20.0]))
    assert value == pytest.approx(0.14)
    # residuals 8.6, -9.8, 1.2; sqrt(3/2 * 171.44) / 100
    assert error == pytest.approx(math.sqrt(1.5 * (8.6**2 + 9.8**2 + 1.2**2)) / 100)


def test_the_bounds_cover_skewed_divergences() -> None:
    """500 worlds of 34 documents whose divergence is gamma distributed (skewness 1.4) around 1."""
    random = np.random.default_rng(3)
    covered, below, normal = 0, 0, 0
    for world in range(500):
        counts = random.integers(100, 500, size=34).astype(float)
        totals = counts * random.gamma(2.0, 0.5, size=34)
        lower, upper = bounds(totals, counts, resample(totals, counts, 600, world), 0.95)
        value, error = ratio(totals, counts)
        covered += upper >= 1.0
        below += lower <= 1.0
        normal += value + 1.645 * error >= 1.0
    assert 0.925 <= covered / 500 <= 0.975
    assert 0.925 <= below / 500 <= 0.975
    assert covered >= normal + 5


def test_the_same_seed_gives_the_same_bounds() -> None:
    values, counts = np.random.default_rng(4).random((2, 40))
    assert estimate(values, counts, seed=5) == estimate(values, counts, seed=5)
    assert estimate(values, counts, seed=5) != estimate(values, counts, seed=6)


def test_few_or_broken_documents_are_not_conclusive() -> None:
    assert not estimate(np.arange(29.0), np.ones(29)).conclusive
    assert estimate(np.arange(30.0), np.ones(30)).conclusive
    broken = np.arange(40.0)
    broken[7] = np.inf
    found = estimate(broken, np.ones(40))
    assert not found.conclusive and found.value == math.inf and math.isnan(found.upper)
    for few in (0, 1):
        assert math.isnan(estimate(np.ones(few), np.ones(few)).upper)
    with pytest.raises(AnyQuantError, match="paired"):
        estimate(np.ones(3), np.ones(4))


def test_no_spread_gives_a_point() -> None:
    found = estimate(np.full(30, 2.0), np.full(30, 4.0))
    assert (found.lower, found.value, found.upper) == (0.5, 0.5, 0.5)


def test_replicates_without_spread_fall_back_to_finite_bounds() -> None:
    """One differing document: a third of the resamples miss it and have no standard error."""
    totals = np.full(30, 100.0)
    totals[3] = 99.0
    found = estimate(totals, np.full(30, 100.0))
    assert math.isfinite(found.lower) and found.lower < found.value <= found.upper <= 1.01


@pytest.mark.parametrize("documents", [2, 3, 4])
def test_the_bounds_of_a_few_documents_of_unequal_length_stay_near_them(documents: int) -> None:
    """Replicates of one document alone have no spread: rounding must not divide by what is left of it."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        counts = random.integers(100, 512, size=documents).astype(float)
        values = random.uniform(0.01, 0.02, size=documents)
        drawn = resample(values * counts, counts, 4000, seed)
        alone = np.isclose(drawn.ratios[:, None], values, rtol=1e-12).any(axis=1)
        assert (drawn.errors[alone] == 0).all()
        assert (drawn.errors[~alone] > 1e-9).all()
