import itertools
import math

import numpy as np
import pytest

from anyquant.contract.allocate import BudgetTooSmallError, Candidate, Group, allocate, curve, frontier
from anyquant.core.errors import AnyQuantError, UsageError

Pair = tuple[int, float]


def build(menus: list[list[Pair]]) -> list[Group]:
    return [
        Group(f"g{i}", tuple(Candidate(f"c{j}", nbytes, loss) for j, (nbytes, loss) in enumerate(menu)))
        for i, menu in enumerate(menus)
    ]


def random_menus(rng: np.random.Generator, groups: int, most: int, awkward: bool) -> list[list[Pair]]:
    """Awkward ones have few distinct values, so ties, zeros, dominated lines, and single lines."""
    menus = []
    for _ in range(groups):
        count = int(rng.integers(1, most + 1))
        if awkward:
            menus.append([(int(rng.integers(0, 6)), float(rng.integers(0, 5))) for _ in range(count)])
        else:
            menus.append([(int(rng.integers(1, 10**12)), float(rng.lognormal(0, 3))) for _ in range(count)])
    return menus


def best_of_all(menus: list[list[Pair]], budget: int) -> tuple[float, int] | None:
    """Every choice there is."""
    sums = ((math.fsum(p[1] for p in pick), sum(p[0] for p in pick)) for pick in itertools.product(*menus))
    return min((each for each in sums if each[1] <= budget), default=None)


def by_bytes(menus: list[list[Pair]], budget: int) -> float:
    """The least loss for every number of bytes, one group after another."""
    table = np.zeros(budget + 1)
    for menu in menus:
        grown = np.full(budget + 1, np.inf)
        for nbytes, loss in menu:
            grown[nbytes:] = np.minimum(grown[nbytes:], table[: budget + 1 - nbytes] + loss)
        table = grown
    return float(table[-1])


def model(rng: np.random.Generator, groups: int) -> list[Group]:
    """As a model would be: fourteen grids, losses that fall fourfold per bit, a few sizes of tensors."""
    bits = np.array([2.06, 2.31, 2.56, 2.63, 3.06, 3.44, 3.5, 4.25, 4.5, 5.0, 5.5, 6.56, 8.5, 16.0])
    menus = []
    for _ in range(groups):
        size, weight = float(rng.choice([1e6, 4e6, 1.4e7])), rng.lognormal(0, 1.5)
        losses = weight * size * 1e-9 * 4.0**-bits * rng.lognormal(0, 0.3, len(bits))
        menus.append([(int(size * b / 8), float(loss)) for b, loss in zip(bits, losses, strict=True)])
    return build(menus)


def within(groups: list[Group], share: float) -> int:
    smallest = sum(min(c.nbytes for c in group.candidates) for group in groups)
    largest = sum(max(c.nbytes for c in group.candidates) for group in groups)
    return int(smallest + share * (largest - smallest))


@pytest.mark.parametrize("awkward", [False, True])
@pytest.mark.parametrize("most_states", [1, 3, 20_000])
def test_against_every_choice(awkward: bool, most_states: int) -> None:
    rng = np.random.default_rng(4)
    for _ in range(150):
        menus = random_menus(rng, int(rng.integers(1, 6)), 6, awkward)
        groups, budget = build(menus), 0
        budget = int(rng.integers(0, within(build(menus), 1.0) + 2))
        truth = best_of_all(menus, budget)
        if truth is None:
            with pytest.raises(BudgetTooSmallError) as raised:
                allocate(groups, budget)
            assert raised.value.smallest == sum(min(p[0] for p in menu) for menu in menus)
            continue
        found = allocate(groups, budget, most_states=most_states)
        taken = [next(c for c in g.candidates if c.name == found.choice[g.name]) for g in groups]
        assert found.nbytes == sum(c.nbytes for c in taken) <= budget
        assert found.loss == math.fsum(c.loss for c in taken)
        assert found.bound <= truth[0] * (1 + 1e-9) <= found.loss * (1 + 2e-9)
        if most_states > 3:
            assert found.loss == pytest.approx(truth[0], rel=3e-9)
            assert found.bound == pytest.approx(found.loss, rel=3e-9)


def test_against_a_table_over_bytes() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        menus = [[(int(rng.integers(5, 60)), float(rng.lognormal(0, 1))) for _ in range(8)] for _ in range(40)]
        budget = within(build(menus), float(rng.uniform(0.02, 0.6)))
        assert allocate(build(menus), budget).loss == pytest.approx(by_bytes(menus, budget), rel=3e-9)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_large_models(share: float) -> None:
    rng = np.random.default_rng(6)
    small, large = model(rng, 60), model(rng, 1000)
    exact = allocate(small, within(small, share))
    assert exact.bound == pytest.approx(exact.loss, rel=3e-9)
    found = allocate(large, within(large, share))
    assert found.loss - found.bound <= 1e-3 * found.loss
    assert found.bound >= curve(large).loss_at(within(large, share)) * (1 - 3e-9)


def test_a_gap_is_proven_when_states_are_dropped() -> None:
    """A byte is worth the same everywhere: hardly a state is dominated and every bound is alike."""
    rng, missed = np.random.default_rng(7), 0
    for _ in range(20):
        values = rng.integers(1, 10**6, (8, 4))
        menus = [[(int(value), float(10**6 - value)) for value in row] for row in values]
        budget = within(build(menus), 0.5)
        sums = values[0]
        for row in values[1:]:
            sums = (sums[:, None] + row).ravel()
        truth = 8e6 - float(sums[sums <= budget].max())
        exact, thin = allocate(build(menus), budget), allocate(build(menus), budget, most_states=1)
        assert exact.loss == pytest.approx(truth, rel=3e-9)
        assert exact.bound == pytest.approx(truth, rel=3e-9)
        assert thin.bound <= truth <= thin.loss
        missed += thin.loss > truth
    assert missed


def test_frontier_is_the_hull() -> None:
    groups = model(np.random.default_rng(8), 30)
    ladder = frontier(groups, 12)
    assert len(ladder) == 12
    assert ladder[0].nbytes == within(groups, 0.0)
    assert ladder[-1].loss == pytest.approx(math.fsum(min(c.loss for c in g.candidates) for g in groups))
    predicted = curve(groups)
    for low, high in itertools.pairwise(ladder):
        assert low.nbytes < high.nbytes and low.loss > high.loss
    for each in ladder:
        assert allocate(groups, each.nbytes).loss == pytest.approx(each.loss, rel=3e-9)
        assert predicted.loss_at(each.nbytes) == pytest.approx(each.loss, rel=3e-9)
        assert predicted.nbytes_for(each.loss) == pytest.approx(each.nbytes, rel=1e-6)


def test_edges() -> None:
    assert allocate([], 0).choice == {}
    pinned = build([[(10, 0.5)], [(1, 0.0), (2, 0.0), (3, 0.0)]])
    assert allocate(pinned, 100).choice == {"g0": "c0", "g1": "c0"}
    assert [each.nbytes for each in frontier(pinned, 5)] == [11]
    with pytest.raises(UsageError, match=r"10 bytes are too few.*takes 11"):
        allocate(pinned, 10)
    for wrong in ([[]], [[(1, math.nan)]], [[(-1, 0.0)]]):
        with pytest.raises(AnyQuantError, match="g0"):
            allocate(build(wrong), 10)
    with pytest.raises(AnyQuantError, match="one name"):
        allocate([pinned[0], pinned[0]], 100)
