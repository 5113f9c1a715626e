"""Running sums against plain float64 arithmetic, and the frozen statistics."""

import numpy as np
import pytest

from anyquant.calibrate.stats import Moments, SecondMoments, Statistics
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.linear import Linear, Role, View


def linear(name: str, group: str, role: Role = Role.ATTN_Q) -> Linear:
    return Linear(name, role, View(name, 0, 2, 3), 0, group, name)


def test_sums_do_not_depend_on_how_tokens_arrive() -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((1000, 5)) * [1e-6, 1, 1e6, 1e15, 0]).astype(np.float32)
    running = SecondMoments(5, "here")
    for part in np.split(values, [1, 2, 300, 300, 999]):
        running.add(part)
    moment = running.result()
    assert moment.count == 1000 and moment.second_moment.dtype == np.float32
    np.testing.assert_allclose(moment.second_moment, np.square(values.astype(np.float64)).mean(0), rtol=1e-6)


def test_a_small_token_after_many_large_ones_still_counts() -> None:
    """float32 sums would stop growing at 2^24."""
    running = SecondMoments(1, "here")
    running.sums[:] = 2.0**24
    running.add(np.ones((256, 1), np.float32))
    assert running.sums[0] == 2.0**24 + 256


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_names_its_place(bad: float) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = bad
    with pytest.raises(BadInputError, match="block 4: activation of channel 2 is not finite"):
        SecondMoments(3, "block 4").add(values)


def test_no_tokens() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        SecondMoments(3, "block 4").result()


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
    assert base not in {Statistics(moments).digest() for moments in others}
