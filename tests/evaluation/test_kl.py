"""Divergence, agreement and likelihood against torch's formulas and hand-computed cases."""

import math

import numpy as np
import pytest
import torch

from anyquant.core.errors import BadInputError
from anyquant.evaluation.agreement import same_top
from anyquant.evaluation.kl import divergence, kl_divergence, log_softmax, tail_quantile
from anyquant.evaluation.perplexity import negative_log_likelihood, perplexity


def test_divergence_equals_torch() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=(50, 300)) * 5
    for noise in (1e-3, 0.1, 3.0):
        candidate = reference + random.normal(size=reference.shape) * noise
        p, q = (torch.log_softmax(torch.from_numpy(x), -1) for x in (reference, candidate))
        oracle = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()
        np.testing.assert_allclose(kl_divergence(reference, candidate), oracle, rtol=1e-9, atol=1e-15)


def test_divergence_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.5, 1e-300], [0.9, 0.05, 0.05]]))
    candidate = np.log(np.array([[0.25, 0.75, 1e-300], [0.9, 0.05, 0.05]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    np.testing.assert_allclose(kl_divergence(reference, candidate), [expected, 0.0], atol=1e-15)


def test_divergence_is_not_symmetric_and_never_negative() -> None:
    sharp, flat = np.array([[5.0, 0.0, 0.0]]), np.array([[1.0, 0.0, 0.0]])
    assert kl_divergence(sharp, flat)[0] != pytest.approx(kl_divergence(flat, sharp)[0], rel=0.1)
    same = np.random.default_rng(1).normal(size=(200, 50)).astype(np.float32)
    assert (kl_divergence(same, same) == 0).all()
    assert (kl_divergence(same, same + np.float32(100)) >= 0).all()


def test_huge_logits_are_stable_and_float16_is_widened() -> None:
    logits = np.array([[60000.0, 59999.0, -60000.0]])
    expected = log_softmax(np.array([[1.0, 0.0, -1e9]]))
    np.testing.assert_allclose(log_softmax(logits)[0, :2], expected[0, :2], rtol=1e-12)
    assert log_softmax(np.zeros((1, 70000), dtype=np.float16))[0, 0] == pytest.approx(-math.log(70000))


def test_values_that_are_not_finite_stay_visible() -> None:
    reference = np.zeros((5, 3))
    candidate = np.zeros((5, 3))
    candidate[0, 1] = np.nan
    candidate[1, 1] = np.inf
    candidate[2, 1] = -np.inf
    reference[3, 0] = np.nan
    values = kl_divergence(reference, candidate)
    assert np.isnan(values[[0, 1, 3]]).all() and values[2] == np.inf and values[4] == 0


def test_a_token_ruled_out_by_both_costs_nothing() -> None:
    both = np.array([[0.0, 1.0, -np.inf]])
    assert kl_divergence(both, both)[0] == 0
    assert divergence(log_softmax(both), log_softmax(np.array([[0.0, 1.0, 0.0]])))[0] > 0


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"320 entries, the reference's 300.*padding"):
        kl_divergence(np.zeros((4, 300)), np.zeros((4, 320)))
    with pytest.raises(BadInputError, match="shapes"):
        kl_divergence(np.zeros((4, 300)), np.zeros((5, 300)))


def test_same_top_counts_ties_of_the_reference() -> None:
    reference = np.array([[1.0, 2.0, 2.0], [3.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    candidate = np.array([[0.0, 1.0, 5.0], [1.0, 2.0, 0.0], [0.0, 1.0, 1.5]])
    assert same_top(reference, candidate).tolist() == [True, False, True]


def test_likelihood_equals_torch() -> None:
    random = np.random.default_rng(2)
    logits, ids = random.normal(size=(40, 100)), random.integers(100, size=40)
    oracle = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(ids), reduction="none")
    np.testing.assert_allclose(negative_log_likelihood(log_softmax(logits), ids), oracle.numpy(), rtol=1e-12)
    assert perplexity(3 * math.log(7.0), 3) == pytest.approx(7.0)
    assert math.isnan(perplexity(0.0, 0)) and perplexity(1e9, 1) == math.inf
    with pytest.raises(BadInputError, match=r"token id 100.*vocabulary of 100"):
        negative_log_likelihood(log_softmax(logits), np.array([100]))


def test_tail_quantile() -> None:
    assert tail_quantile(np.arange(1001.0)) == 999.0
    assert math.isnan(tail_quantile(np.array([1.0, np.inf])))
