"""The multiple-choice knapsack on arrays: of every menu one line, least loss in sum, bytes in sum within a budget.

The relaxation that may mix two neighbours of a menu's lower convex hull is solved by taking hull steps in order of
what they gain per byte; its loss is a lower bound (Sinha & Zoltners, The multiple-choice knapsack problem, 1979). Its
price of a byte removes every line that cannot belong to a better solution than the one at hand. What remains is
solved by dynamic programming over menus on the list of undominated (bytes, loss) states, each bounded from below by
the relaxation of the menus to come (Pisinger, A minimal algorithm for the multiple-choice knapsack problem, 1995).
When the list grows beyond a cap the least promising states are dropped, and the least of their bounds tells what
could have been missed.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_EQUAL = 1e-9  # of the loss: solutions closer than this are taken to be equally good
_ROUNDING = 1e-13  # of the smallest choice's loss, from which gains are subtracted: what that may leave


@dataclass(frozen=True)
class Menu:
    """Undominated lines: `nbytes` rises strictly, `loss` falls strictly; `lines` are the caller's indices."""

    nbytes: Int64
    loss: Float64
    lines: Int64

    def only(self, kept: npt.NDArray[np.bool_]) -> "Menu":
        return Menu(self.nbytes[kept], self.loss[kept], self.lines[kept])


def menu(nbytes: Int64, loss: Float64) -> Menu:
    """The lines of a menu that none beats in both; of equal ones the first."""
    order = np.lexsort((loss, nbytes))
    kept = order[_falling(loss[order])]
    return Menu(nbytes[kept], loss[kept], kept.astype(np.int64))


def _falling(loss: Float64) -> npt.NDArray[np.bool_]:
    """Where a loss is lower than all before it."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    falling: npt.NDArray[np.bool_] = loss < before
    return falling


@dataclass(frozen=True)
class Steps:
    """Steps up the hulls of all menus, the one that gains most per byte first; a menu's own stay in order.

    Step i takes menu `owner[i]` to its position `target[i]`, costs `nbytes[i]` and lowers the loss by `gain[i]`.
    """

    owner: Int64
    target: Int64
    nbytes: Int64
    gain: Float64

    def of(self, chosen: npt.NDArray[np.bool_]) -> "Steps":
        return Steps(self.owner[chosen], self.target[chosen], self.nbytes[chosen], self.gain[chosen])

    def curve(self, nbytes: int, loss: float) -> tuple[Int64, Float64]:
        """Bytes and loss after 0, 1, 2 ... steps from a start."""
        return (
            nbytes + np.concatenate([np.zeros(1, np.int64), np.cumsum(self.nbytes)]),
            loss - np.concatenate([[0.0], np.cumsum(self.gain)]),
        )

    def picks(self, count: int, menus: int) -> Int64:
        """The position of every menu after the first `count` steps."""
        picks = np.zeros(menus, np.int64)
        np.maximum.at(picks, self.owner[:count], self.target[:count])
        return picks


def steps(menus: list[Menu]) -> Steps:
    """All hull steps of the menus in order."""
    owner, target, nbytes, gain = [], [], [], []
    for index, entry in enumerate(menus):
        corners = _hull(entry)
        for low, high in pairwise(corners):
            owner.append(index)
            target.append(high)
            nbytes.append(int(entry.nbytes[high] - entry.nbytes[low]))
            gain.append(float(entry.loss[low] - entry.loss[high]))
    costs, gains = np.array(nbytes, np.int64), np.array(gain, np.float64)
    owners, targets = np.array(owner, np.int64), np.array(target, np.int64)
    order = np.lexsort((targets, owners, -gains / costs))
    return Steps(owners[order], targets[order], costs[order], gains[order])


def _hull(entry: Menu) -> list[int]:
    """Positions of the corners of the lower convex hull: along them the gain per byte falls strictly."""
    nbytes, loss = entry.nbytes.tolist(), entry.loss.tolist()

    def slope(low: int, high: int) -> float:
        return float((loss[low] - loss[high]) / (nbytes[high] - nbytes[low]))

    corners: list[int] = []
    for index in range(len(nbytes)):
        while len(corners) > 1 and slope(corners[-2], corners[-1]) <= slope(corners[-1], index):
            corners.pop()
        corners.append(index)
    return corners


def solve(menus: list[Menu], budget: int, most_states: int) -> tuple[Int64, float]:
    """The position taken in every menu, and a lower bound of the loss of any solution.

    The bound lies one part in 10^9 below the solution's loss at most, unless states were dropped. The budget must
    allow the smallest line of every menu.
    """
    ascent = steps(menus)
    spent, losses = ascent.curve(_total([m.nbytes[:1] for m in menus]), float(sum(m.loss[0] for m in menus)))
    taken = int(np.searchsorted(spent, budget, side="right")) - 1
    picks = ascent.picks(taken, len(menus))
    if taken == len(ascent.owner):
        return picks, _loss(menus, picks)
    _fill(menus, picks, budget)
    price = float(ascent.gain[taken] / ascent.nbytes[taken])
    relaxed = float(losses[taken]) - price * (budget - int(spent[taken]))
    best = _loss(menus, picks)
    tolerance = max(_EQUAL * abs(best), _ROUNDING * abs(float(losses[0])))
    positions, reduced = [], []
    for entry in menus:
        costs = entry.loss + price * (entry.nbytes - entry.nbytes[0])
        kept = costs - costs.min() < best - relaxed + tolerance
        positions.append(np.flatnonzero(kept))
        reduced.append(entry.only(kept))
    found, bound = _states(reduced, budget, best, tolerance, most_states)
    if found is not None:
        picks = np.array([p[f] for p, f in zip(positions, found, strict=True)], np.int64)
    return picks, min(bound, _loss(menus, picks) - tolerance)


def _total(parts: list[Int64]) -> int:
    return int(sum(int(part.sum()) for part in parts))


def _loss(menus: list[Menu], picks: Int64) -> float:
    return float(sum(float(entry.loss[pick]) for entry, pick in zip(menus, picks, strict=True)))


def _fill(menus: list[Menu], picks: Int64, budget: int) -> None:
    """Spend what is left, each time on the change of one menu that fits and gains most; changes `picks`."""
    left = budget - _total([entry.nbytes[pick : pick + 1] for entry, pick in zip(menus, picks, strict=True)])
    offers = sorted(
        (
            (float(entry.loss[pick] - entry.loss[to]), index, to)
            for index, (entry, pick) in enumerate(zip(menus, picks, strict=True))
            for to in range(int(pick) + 1, len(entry.nbytes))
            if entry.nbytes[to] - entry.nbytes[pick] <= left
        ),
        reverse=True,
    )
    for _, index, to in offers:
        more = int(menus[index].nbytes[to] - menus[index].nbytes[picks[index]])
        if to > picks[index] and more <= left:
            picks[index] = to
            left -= more


@dataclass
class _Found:
    """The best solution met: `state` of layer `layer` for the menus before, the first `count` steps for the rest."""

    loss: float
    layer: int = -1
    state: int = 0
    count: int = 0


def _states(
    menus: list[Menu], budget: int, best: float, tolerance: float, most_states: int
) -> tuple[Int64 | None, float]:
    """Dynamic programming. Positions of a solution better than `best`, or None; and the bound that dropping left."""
    open_menus = [index for index, entry in enumerate(menus) if len(entry.nbytes) > 1]
    # coarse menus first: the fine ones that remain make the bound of what is to come nearly tight
    order = sorted(open_menus, key=lambda index: -int(menus[index].nbytes[-1] - menus[index].nbytes[0]))
    ascent = steps(menus)
    rank = np.full(len(menus), -1)
    rank[order] = np.arange(len(order))
    nbytes = np.array([_total([m.nbytes[:1] for m in menus])])
    loss = np.array([sum(float(m.loss[0]) for m in menus)])
    found, bound = _Found(best), np.inf
    layers: list[tuple[Int64, Int64, Int64]] = []
    for layer, index in enumerate(order):
        entry = menus[index]
        # a state counts the smallest line of every menu to come
        grown_bytes = (nbytes[:, None] + (entry.nbytes - entry.nbytes[0])).ravel()
        grown_loss = (loss[:, None] + (entry.loss - entry.loss[0])).ravel()
        rest = ascent.of(rank[ascent.owner] > layer)
        costs, gains = rest.curve(0, 0.0)
        lower = grown_loss + np.interp(budget - grown_bytes, costs, gains)
        kept = np.flatnonzero((grown_bytes <= budget) & (lower < found.loss - tolerance))
        kept = kept[np.lexsort((grown_loss[kept], grown_bytes[kept]))]
        kept = kept[_falling(grown_loss[kept])]
        if not len(kept):
            break
        count = np.searchsorted(costs, budget - grown_bytes[kept], side="right") - 1
        rounded = grown_loss[kept] + gains[count]
        least = int(rounded.argmin())
        if rounded[least] < found.loss - tolerance:
            found = _Found(float(rounded[least]), layer, least, int(count[least]))
        promising = np.flatnonzero(lower[kept] < found.loss - tolerance)
        if len(promising) > most_states:
            by_bound = promising[np.argsort(lower[kept[promising]], kind="stable")]
            bound = min(bound, float(lower[kept[by_bound[most_states]]]))
            promising = np.sort(by_bound[:most_states])
        # a later layer counts its parents among the kept ones of this, so that the best found stays reachable
        layers.append((kept // len(entry.nbytes), kept % len(entry.nbytes), promising))
        nbytes, loss = grown_bytes[kept[promising]], grown_loss[kept[promising]]
        if not len(promising):
            break
    if found.layer < 0:
        return None, bound
    return _trace(menus, order, layers, found, ascent.of(rank[ascent.owner] > found.layer)), bound


def _trace(
    menus: list[Menu], order: list[int], layers: list[tuple[Int64, Int64, Int64]], found: _Found, rest: Steps
) -> Int64:
    """The positions behind the best solution met."""
    picks = rest.picks(found.count, len(menus))
    state = found.state
    for layer in range(found.layer, -1, -1):
        parents, positions, _ = layers[layer]
        picks[order[layer]] = positions[state]
        if layer:
            state = int(layers[layer - 1][2][parents[state]])
    return picks
