"""How limits are written, and which make no sense."""

import re
from typing import Any

import pytest

from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.evaluation.limits import Contract, size_limit, with_quality
from anyquant.evaluation.verdict import Status, judge, rounded


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("13200000B", "max_size", 13_200_000),
        ("13200000", "max_size", 13_200_000),
        ("4.6GB", "max_size", 4_600_000_000),
        ("4.6 gb", "max_size", 4_600_000_000),
        ("1.1kB", "max_size", 1_100),
        ("0.29kB", "max_size", 290),  # 289.999... as floats
        ("2GiB", "max_size", 2 << 30),
        ("4.5bpw", "max_bpw", 4.5),
        ("4 BPW", "max_bpw", 4.0),
    ],
)
def test_sizes(text: str, field: str, value: float) -> None:
    assert size_limit(text) == {field: value}


@pytest.mark.parametrize("text", ["", "GB", "4.6", "-4GB", "4.6XB", "4iB", "1e9", "bpw", "4,5bpw"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--max-size {text}")):
        size_limit(text)


def test_bits_per_weight_become_bytes_of_the_model() -> None:
    contract = Contract(max_bpw=4.5)
    assert contract.resolved(1001) == Contract(max_size=563)  # 563.06
    assert Contract(max_bpw=4.5, max_size=100).resolved(1000).max_size == 100
    assert Contract(max_bpw=4.5, max_size=10_000).resolved(1000).max_size == 562
    assert not contract.needs_measures and not contract.empty
    with pytest.raises(AnyQuantError, match="resolved"):
        judge(None, contract, 1)
    assert judge(None, contract.resolved(16), 9).status is Status.PASS
    assert judge(None, contract.resolved(16), 10).status is Status.FAIL


def test_a_quality_with_further_limits() -> None:
    found = with_quality(Contract(min_same_top=0.9, max_size=7), "balanced")
    assert found == Contract(max_kl=0.011, min_same_top=0.9, max_size=7)
    with pytest.raises(UsageError, match=r"--quality balanced means --max-kl 0\.011, and --max-kl 0\.5 was given too"):
        with_quality(Contract(max_kl=0.5), "balanced")


def test_a_limit_below_the_noise_names_the_nearest_that_can_be_judged() -> None:
    for name in ("max_kl", "max_kl_99_9"):
        with pytest.raises(UsageError, match="nearest limit that can be judged is 1e-06"):
            Contract(**{name: 0.0})
        assert not Contract(**{name: 1e-6}).empty


@pytest.mark.parametrize(
    "table",
    [{"max_kl": "a"}, {"max_fun": 1.0}, {"max_drop": 3}, {"max_kl": True}, [1], "max_kl", {"max_size": 10**400}],
)
def test_what_is_no_contract(table: Any) -> None:
    """A report may come from anyone."""
    with pytest.raises(UsageError):
        Contract.from_dict(table)


def test_the_nearest_contract_is_one_that_would_have_held() -> None:
    assert [rounded(0.012345), rounded(0.012345, down=True), rounded(-0.0012345), rounded(0.0)] == [
        "0.0124",
        "0.0123",
        "-0.00123",
        "0",
    ]
    assert judge(None, Contract(max_size=5), 7).nearest == "--max-size 7B"
    assert judge(None, Contract(max_size=8), 7).nearest == ""
    assert judge(None, Contract(max_size=5, max_kl=0.1), 7).nearest == ""  # nothing is shown of the loss
