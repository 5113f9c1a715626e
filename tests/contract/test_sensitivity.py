"""Estimates from inner products: unbiased, with honest errors, against simulation and by hand."""

import numpy as np
import pytest

from anyquant.contract.sensitivity import Estimate, affordable, carried_over, from_documents, from_products
from anyquant.core.errors import AnyQuantError


def test_by_hand() -> None:
    # two documents of 2 and 4 tokens; half mean squares 1 and 4: 5 nats on 6 tokens
    found = from_products(np.array([[1.0, 2.0], [3.0**0.5, 12.0**0.5]]), [2, 4])
    assert found.loss == pytest.approx(5 / 6)
    spread = 2 * ((1 - 2 * 5 / 6) ** 2 + (4 - 4 * 5 / 6) ** 2)
    assert found.error == pytest.approx(spread**0.5 / 6)
    assert from_products(np.array([[2.0]]), [4]) == Estimate(0.5, 0.5)


def test_the_standard_error_covers_what_it_should() -> None:
    random = np.random.default_rng(0)
    lengths, inside = [10, 20, 30, 40] * 10, 0
    for _ in range(400):
        products = random.standard_normal((3, 40)) * np.sqrt(2 * 0.01 * np.array(lengths))
        found = from_products(products, lengths)
        inside += abs(found.loss - 0.01) < 2 * found.error
    assert 0.88 < inside / 400 < 0.99


def test_shapes_are_checked() -> None:
    with pytest.raises(AnyQuantError, match="documents"):
        from_products(np.zeros((2, 3)), [1, 2])
    with pytest.raises(AnyQuantError, match="documents"):
        from_products(np.zeros((0, 2)), [1, 2])


def test_what_one_candidate_loses_says_what_the_others_do() -> None:
    measured = from_documents(np.array([1.0, 3.0]), [100, 100])
    assert measured.loss == 0.02
    found = carried_over(measured, {"coarse": 8.0, "fine": 0.5}, together=4.0)
    assert found["coarse"].loss == pytest.approx(0.04) and found["fine"].loss == pytest.approx(0.0025)
    assert found["fine"].error == pytest.approx(measured.error / 8)
    assert carried_over(measured, {"same": 0.0}, 0.0) == {"same": Estimate(0.0, 0.0)}


def test_as_many_documents_as_are_affordable() -> None:
    assert affordable([1.0, 0.5, 0.5], documents=100, forwards=20) == 100
    assert affordable([0.5] * 200, documents=100, forwards=20) == 20
    assert affordable([1.0] * 5000, documents=100, forwards=20) == 1
