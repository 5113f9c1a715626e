"""Running sums against plain float64 arithmetic, and the frozen statistics."""

import numpy as np
import pytest
import torch

from anyquant.calibrate import stats
from anyquant.calibrate.stats import Moments, Running, Statistics, average
from anyquant.core.errors import AnyQuantError, BadInputError, UsageError
from anyquant.core.linear import Linear, Role, View


def linear(name: str, group: str, role: Role = Role.ATTN_Q) -> Linear:
    return Linear(name, role, View(name, 0, 2, 3), 0, group, name)


ALL = frozenset({"absolute_maximum", "mean", "second_moment", "hessian", "cross"})


def test_sums_do_not_depend_on_how_tokens_arrive() -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((1000, 5)) * [1e-6, 1, 1e6, 1e15, 0]).astype(np.float32)
    running = Running(5, "here")
    for part in np.split(values, [1, 2, 300, 300, 999]):
        running.add(torch.from_numpy(part))
    moment = running.result()
    assert moment.count == 1000 and moment.second_moment.dtype == np.float32
    np.testing.assert_allclose(moment.second_moment, np.square(values.astype(np.float64)).mean(0), rtol=1e-6)
    assert moment.hessian is None and moment.cross is None and moment.mean is None and moment.absolute_maximum is None


def test_every_statistic_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "TILE", 16)  # several tiles to mirror
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((40, 40))
    values, floats = ((rng.standard_normal((900, 40)) @ mixing + 0.5).astype(np.float32) for _ in range(2))
    running = Running(40, "here", ALL)
    for part, other in zip(np.split(values, [1, 300]), np.split(floats, [1, 300]), strict=True):
        running.add(torch.from_numpy(part), torch.from_numpy(other))
    moment = running.result()
    x, f = values.astype(np.float64), floats.astype(np.float64)
    size = np.square(x).mean()
    for found, expected in (
        (moment.second_moment, np.square(x).mean(0)),
        (moment.mean, x.mean(0)),
        (moment.hessian, x.T @ x / 900),
        (moment.cross, f.T @ x / 900),
    ):
        assert found is not None and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * size)
    assert moment.hessian is not None and np.array_equal(moment.hessian, moment.hessian.T)
    np.testing.assert_array_equal(moment.absolute_maximum, np.abs(values).max(0))


def test_a_small_token_after_many_large_ones_still_counts() -> None:
    """float32 sums would stop growing at 2^24."""
    running = Running(1, "here")
    running.squares[:] = 2.0**24
    running.add(torch.ones(256, 1))
    assert running.squares[0] == 2.0**24 + 256


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_names_its_place(bad: float) -> None:
    values = torch.ones(2, 3)
    values[1, 2] = bad
    with pytest.raises(BadInputError, match="block 4: activation of channel 2 is not finite"):
        Running(3, "block 4").add(values)


def test_products_that_leave_float32_are_named() -> None:
    running = Running(2, "block 4", ALL - {"cross"})
    running.add(torch.full((1, 2), 1e30))
    with pytest.raises(BadInputError, match="block 4: activations are so large"):
        running.result()


def test_no_tokens() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        Running(3, "block 4").result()


def test_cross_needs_both_sides() -> None:
    with pytest.raises(AnyQuantError, match="block 4: cross statistics need"):
        Running(3, "block 4", frozenset({"cross"})).add(torch.ones(2, 3))
    with pytest.raises(AnyQuantError, match="unknown statistics"):
        Running(3, "block 4", frozenset({"median"}))


def test_the_average_of_moments_counts_nothing() -> None:
    one, two = (
        Moments(np.full(2, v, np.float32), 5, np.full(2, v, np.float32), None, np.full((2, 2), v, np.float32))
        for v in (1, 3)
    )
    found = average([one, two])
    assert found.count == 0 and found.mean is None and found.cross is None
    np.testing.assert_array_equal(found.second_moment, [2, 2])
    np.testing.assert_array_equal(found.absolute_maximum, [3, 3])
    np.testing.assert_array_equal(found.hessian, np.full((2, 2), 2))
    np.testing.assert_array_equal(one.second_moment, [1, 1])


def test_importance_is_found_by_group_or_by_name() -> None:
    shared, own = (Moments(np.full(3, value, np.float32), 1) for value in (2, 3))
    statistics = Statistics({"group": shared, "b": own, "short": Moments(np.ones(2, np.float32), 1)}, missing=("d",))
    assert statistics.importance(linear("a", "group")) is shared.second_moment
    assert statistics.importance(linear("b", "group")) is own.second_moment
    assert statistics.importance(linear("c", "tokens", Role.EMBEDDING)) is None
    assert statistics.importance(linear("d", "unread")) is None
    with pytest.raises(BadInputError, match=r"no statistics for e \(input elsewhere\)"):
        statistics.importance(linear("e", "elsewhere"))
    with pytest.raises(BadInputError, match="have 2 channels, the matrix has 3"):
        statistics.importance(linear("f", "short"))


def test_digest_sees_every_part_and_no_order() -> None:
    one, two = Moments(np.ones(3, np.float32), 1), Moments(np.ones(3, np.float32), 2)
    base = Statistics({"a": one, "b": two}).digest()
    assert base == Statistics({"b": two, "a": one}).digest()
    others = [{"a": two, "b": one}, {"a": one}, {"a": one, "c": two}, {"a": one, "b": Moments(np.zeros(3, "f4"), 2)}]
    extra = np.ones(3, np.float32)
    others += [{"a": one, "b": Moments(two.second_moment, 2, mean=extra)}]
    others += [{"a": one, "b": Moments(two.second_moment, 2, cross=extra)}]
    assert len({base, *(Statistics(moments).digest() for moments in others)}) == 1 + len(others)
