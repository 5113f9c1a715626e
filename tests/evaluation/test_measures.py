"""The accumulator and the verdict."""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
import scipy.stats

from anyquant.core.errors import BadInputError, UsageError
from anyquant.evaluation.bootstrap import Estimate
from anyquant.evaluation.limits import Contract, contract_for
from anyquant.evaluation.measures import Comparison, Measures, resampled_tails
from anyquant.evaluation.verdict import Status, judge

Logits = npt.NDArray[np.float32]


def documents(count: int, noise: float, seed: int = 0) -> list[tuple[str, Logits, Logits, list[int]]]:
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(random.integers(5, 40))
        reference = (random.normal(size=(length, 64)) * 3).astype(np.float32)
        candidate = (reference + random.normal(size=reference.shape) * noise).astype(np.float32)
        found.append((f"d{number}", reference, candidate, random.integers(64, size=length).tolist()))
    return found


def measured(count: int = 40, noise: float = 0.1) -> Measures:
    comparison = Comparison()
    for document in documents(count, noise):
        comparison.add(*document)
    return comparison.measures()


def test_every_measure_equals_its_formula() -> None:
    found = measured()
    rows = documents(40, 0.1)
    p = [scipy.special.softmax(reference.astype(float), axis=1) for _, reference, _, _ in rows]
    q = [scipy.special.softmax(candidate.astype(float), axis=1) for _, _, candidate, _ in rows]
    kl = np.concatenate([scipy.special.rel_entr(x, y).sum(1) for x, y in zip(p, q, strict=True)])
    agreed = np.concatenate([x.argmax(1) == y.argmax(1) for x, y in zip(p, q, strict=True)])
    # the logits at t are for the token at t + 1
    nll = [
        np.concatenate([-np.log(x[np.arange(len(ids) - 1), ids[1:]]) for x, (*_, ids) in zip(side, rows, strict=True)])
        for side in (p, q)
    ]
    assert found.documents == 40 and found.tokens == len(kl) and found.conclusive
    assert found.mean_kl.value == pytest.approx(kl.mean())
    assert found.kl_max == pytest.approx(kl.max())
    assert found.kl_99_9 == pytest.approx(np.quantile(kl, 0.999))
    assert found.same_top.value == pytest.approx(agreed.mean())
    assert found.ppl_reference == pytest.approx(math.exp(nll[0].mean()))
    assert found.ppl_candidate == pytest.approx(math.exp(nll[1].mean()))
    assert found.ppl_ratio.value == pytest.approx(found.ppl_candidate / found.ppl_reference)
    assert 0 <= found.mean_kl.lower < found.mean_kl.value < found.mean_kl.upper
    assert found.ppl_ratio.lower < found.ppl_ratio.value < found.ppl_ratio.upper


def test_chunks_give_the_same_as_whole_documents() -> None:
    comparison = Comparison()
    for name, reference, candidate, ids in documents(40, 0.1):
        for start in range(0, len(ids), 7):
            comparison.add(name, reference[start : start + 7], candidate[start : start + 7], ids[start : start + 8])
    chunked, whole = comparison.measures(), measured()
    assert chunked.tokens == whole.tokens
    assert chunked.mean_kl.upper == pytest.approx(whole.mean_kl.upper)
    assert chunked.ppl_ratio.upper == pytest.approx(whole.ppl_ratio.upper)


def test_a_broken_position_is_flagged_and_never_a_pass() -> None:
    comparison = Comparison()
    for name, reference, candidate, ids in documents(40, 0.0):
        if name == "d5":
            candidate[2, 3] = np.nan
        comparison.add(name, reference, candidate, ids)
    found = comparison.measures()
    assert found.nonfinite == 1 and found.nonfinite_document == "d5" and not found.conclusive
    assert math.isnan(found.mean_kl.value) and math.isnan(found.same_top.value)
    verdict = judge(found, Contract(max_kl=1e9, min_same_top=0.0, max_ppl_increase=1e9))
    assert verdict.status is Status.INCONCLUSIVE
    assert {result.status for result in verdict.limits} == {Status.INCONCLUSIVE}
    assert "not finite, first in d5" in verdict.sentence


def test_what_does_not_fit_is_refused() -> None:
    comparison = Comparison()
    with pytest.raises(BadInputError, match="7 token ids for 5 positions"):
        comparison.add("d", np.zeros((5, 4)), np.zeros((5, 4)), [0] * 7)
    with pytest.raises(BadInputError, match="nothing to measure"):
        comparison.measures()


def test_verdicts_at_the_bounds() -> None:
    found = measured()
    lower, upper = found.mean_kl.lower, found.mean_kl.upper
    assert judge(found, Contract(max_kl=upper * 1.01)).status is Status.PASS
    assert judge(found, Contract(max_kl=(lower + upper) / 2)).status is Status.INCONCLUSIVE
    assert judge(found, Contract(max_kl=lower * 0.99)).status is Status.FAIL
    agreement = found.same_top
    assert judge(found, Contract(min_same_top=agreement.lower - 0.001)).status is Status.PASS
    assert judge(found, Contract(min_same_top=agreement.value)).status is Status.INCONCLUSIVE
    assert judge(found, Contract(min_same_top=agreement.upper + 0.001)).status is Status.FAIL
    increase = found.ppl_ratio.upper - 1
    assert judge(found, Contract(max_ppl_increase=increase + 0.01)).status is Status.PASS


def test_the_nearest_contract_holds_for_the_same_evidence() -> None:
    found = measured()
    verdict = judge(found, Contract(max_kl=1e-6, min_same_top=1.0, max_ppl_increase=0.0))
    assert verdict.status is Status.FAIL
    flags = dict(zip(verdict.nearest.split()[::2], map(float, verdict.nearest.split()[1::2]), strict=True))
    nearest = {flag.removeprefix("--").replace("-", "_"): value for flag, value in flags.items()}
    assert nearest.keys() >= {"max_kl", "min_same_top"}
    assert judge(found, Contract(**nearest)).status is Status.PASS
    assert nearest["max_kl"] < found.mean_kl.upper * 1.01


def test_one_failed_limit_fails_and_one_open_limit_leaves_open() -> None:
    found = measured()
    wide = found.mean_kl.upper * 2
    assert judge(found, Contract(max_kl=wide, max_size=10), size=11).status is Status.FAIL
    assert judge(found, Contract(max_kl=wide, max_size=10), size=10).status is Status.PASS
    assert judge(found, Contract(max_kl=wide, max_size=10)).status is Status.INCONCLUSIVE
    assert judge(None, Contract(max_size=10), size=10).status is Status.PASS
    assert judge(None, Contract(max_kl=1.0)).status is Status.INCONCLUSIVE
    assert judge(found, Contract()).status is Status.MEASURED


def test_few_documents_are_inconclusive_whatever_they_say() -> None:
    verdict = judge(measured(29, 0.0), Contract(max_kl=1.0))
    assert verdict.status is Status.INCONCLUSIVE and "29 documents are too few" in verdict.sentence
    assert judge(measured(29, 3.0), Contract(max_kl=1e-6)).status is Status.INCONCLUSIVE


def test_the_tail_is_certified_only_on_enough_tokens() -> None:
    found = measured()
    verdict = judge(found, Contract(max_kl_99_9=1e9))
    assert verdict.status is Status.INCONCLUSIVE and "50000 are needed" in verdict.sentence
    certified = replace(found, kl_99_9_upper=0.5, kl_99_9_certified=True)
    assert judge(certified, Contract(max_kl_99_9=0.6)).status is Status.PASS
    assert judge(certified, Contract(max_kl_99_9=0.4)).status is Status.INCONCLUSIVE


def test_tail_bound_lies_above_the_quantile_and_near_the_binomial_one() -> None:
    random = np.random.default_rng(0)
    parts = [random.exponential(size=500) for _ in range(100)]
    values = np.sort(np.concatenate(parts))
    # independent tokens: the order statistic that the binomial distribution gives
    rank = int(scipy.stats.binom.ppf(0.95, len(values), 0.999))
    bound = float(np.quantile(resampled_tails(parts), 0.95))
    assert np.quantile(values, 0.999) < bound
    assert bound == pytest.approx(values[rank], rel=0.05)


def test_quality_names_and_bad_limits() -> None:
    assert contract_for("balanced").max_kl == 0.011
    with pytest.raises(UsageError, match="balanced"):
        contract_for("balancd")
    for limits in ({"max_kl": -1.0}, {"max_kl": math.nan}, {"min_same_top": 98.0}):
        with pytest.raises(UsageError):
            Contract(**limits)


def test_a_missing_bound_is_inconclusive() -> None:
    found = measured()
    nan = math.nan
    holes = replace(found, mean_kl=Estimate(0.0, nan, nan, nan, (nan, nan), 40, True))
    assert judge(holes, Contract(max_kl=1.0)).status is Status.INCONCLUSIVE


def test_the_error_of_the_tail_is_that_of_drawing_documents_again() -> None:
    """Against np.quantile of the concatenated documents, drawn by another hand."""
    rng = np.random.default_rng(5)
    parts = [rng.exponential(scale, 400) for scale in rng.uniform(0.5, 2.0, 30)]
    slow = [
        float(np.quantile(np.concatenate([parts[i] for i in rng.integers(30, size=30)]), 0.999, method="higher"))
        for _ in range(600)
    ]
    assert float(resampled_tails(parts).std(ddof=1)) == pytest.approx(float(np.std(slow, ddof=1)), rel=0.12)
