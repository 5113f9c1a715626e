"""The contract's search in terms of recipes and measured artifacts: what `contract/` gets, and what comes of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anyquant.contract.allocate import Allocation, BudgetTooSmallError, Candidate, Choice, Group, allocate, curve
from anyquant.contract.measured import BOUND, Margin, Measured, at_least, at_most
from anyquant.contract.search import Effort, Outcome, Problem, Seen, best_within_bytes, smallest_within_limits
from anyquant.core.errors import UsageError
from anyquant.core.linear import Linear
from anyquant.evaluation.drops import Drop
from anyquant.evaluation.limits import Contract
from anyquant.evaluation.measures import Measures
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.pipeline.chain import parse_chain
from anyquant.pipeline.choice import Wanted, rules_of
from anyquant.pipeline.planner import Job
from anyquant.pipeline.recipe import Recipe, Rule
from anyquant.pipeline.scene import Rewriting
from anyquant.pipeline.sensitivity import Sensitivity

STRONGER = "gptq"  # what rounding is exchanged for where that is measured to pay
WORTH = 0.95  # of the loss of rounding: what a stronger algorithm must come down to
ENOUGH_BITS = 8.0  # per weight: from here on rounding loses next to nothing
PROBES = 2  # measurements that comparing two algorithms takes


@dataclass(frozen=True)
class Space:
    """What can be chosen: groups of Linears with their candidate grids, and the names of the Linears of each group."""

    groups: tuple[Group, ...]
    members: Mapping[str, tuple[str, ...]]

    def kinds(self, architecture: Architecture) -> Mapping[str, str]:
        """The role of each group's Linears: what predictions may be wrong about in common."""
        return {name: architecture.by_name[linears[0]].role.value for name, linears in self.members.items()}


def space_of(found: Sensitivity, recipe: Recipe, architecture: Architecture) -> Space:
    """Where the recipe pins a matrix, its group has one candidate. Raises UsageError for a pin that matches nothing."""
    pinned: dict[str, str] = {}
    for rule in recipe.pinned:
        matched = [linear.name for linear in architecture.linears if rule.matches(linear)]
        if not matched or rule.grid is None:
            raise UsageError(f"--pin {rule.role or rule.pattern}: matches no matrix of this model")
        find_grid(rule.grid)
        pinned |= dict.fromkeys(matched, rule.grid)
    prepared = Rewriting.calibrated(parse_chain(recipe.chain, recipe.options).transforms)
    groups = []
    for portion, group in zip(found.portions, found.groups, strict=True):
        fixed = next((pinned[name] for name in portion.linears if name in pinned), None)
        if fixed is not None:
            bits = sum(find_grid(fixed).bits(architecture.by_name[name].shape) for name in portion.linears)
            known = [each for each in group.candidates if each.name == fixed]
            group = Group(group.name, tuple(known) or (Candidate(fixed, bits // 8, 0.0),))
        elif prepared and portion.block is not None:  # what prepares for rounding has nothing to do without any
            rounded = tuple(each for each in group.candidates if find_grid(each.name).family != "floating")
            group = Group(group.name, rounded or group.candidates)
        groups.append(group)
    return Space(tuple(groups), {portion.name: portion.linears for portion in found.portions})


@dataclass(frozen=True)
class Found:
    """What was measured of an artifact on *select*."""

    measures: Measures
    drops: Sequence[Drop] = ()


class Search:
    """One search. `plan` makes the job of a recipe; `measure` makes its artifact and measures it on *select*."""

    def __init__(
        self,
        space: Space,
        recipe: Recipe,
        contract: Contract,
        architecture: Architecture,
        plan: Callable[[Recipe], Job],
        measure: Callable[[Job], Found],
    ) -> None:
        self._space, self._recipe, self._contract = space, recipe, contract
        self._plan, self._measure = plan, measure
        self._algorithm: str | None = None
        self._jobs: dict[tuple[str, ...], Job] = {}
        self._measured: dict[tuple[str, ...], Measured] = {}
        self._architecture = architecture

    def run(self, effort: Effort, stronger: bool, say: Callable[[str], None]) -> Outcome:
        """The smallest plan within the limits, or the best within the bytes.

        `stronger`: rounding may be exchanged for error feedback, if that is measured to lose less.
        Raises BudgetTooSmallError when no plan is within the bytes.
        """
        groups: Sequence[Group] = self._space.groups
        limits, seen = self._contract, None
        self.refuse()
        if stronger and effort.evaluations > PROBES and not effort.expired():
            groups, seen = self._compared(groups, effort.expired, say)
            done = PROBES - (seen is not None)  # what was seen counts among the tries of the search itself
            effort = replace(effort, evaluations=effort.evaluations - done, earlier=done)
        kinds = self._space.kinds(self._architecture)
        problem = Problem(groups, self.nbytes, self.measured, limits.max_kl, limits.max_size, kinds, seen)
        search = smallest_within_limits if limits.needs_measures else best_within_bytes
        return search(problem, effort, say)

    def job(self, choice: Choice) -> Job:
        """The plan of a choice."""
        key = self._key(choice)
        if key not in self._jobs:
            self._jobs[key] = self._plan(replace(self._recipe, rules=(*self._rules(choice), *self._recipe.rules)))
        return self._jobs[key]

    def nbytes(self, choice: Choice) -> int:
        """Exact bytes of all files of its artifact."""
        return self.job(choice).layout.nbytes

    def measured(self, choice: Choice) -> Measured:
        """Its artifact on *select*."""
        key = self._key(choice)
        if key not in self._measured:
            self._measured[key] = measured_of(self._measure(self.job(choice)), self._contract)
        return self._measured[key]

    def _compared(
        self, groups: Sequence[Group], expired: Callable[[], bool], say: Callable[[str], None]
    ) -> tuple[Sequence[Group], Seen | None]:
        """Measure one choice rounded and with error feedback, keep what loses less, and correct the predictions.

        The better of the two is where the search goes on, unless it takes too many bytes.
        """
        probe = self._probe(groups)
        rounded = self.measured(probe.choice)
        seen, share = Seen(probe.choice, rounded, 1), 1.0
        if not expired():
            self._algorithm = STRONGER
            fed_back = self.measured(probe.choice)
            if fed_back.loss < WORTH * rounded.loss or (math.isfinite(fed_back.loss) and math.isnan(rounded.loss)):
                seen, share = Seen(probe.choice, fed_back, 2), fed_back.loss / rounded.loss
            else:
                self._algorithm = None
            say(
                f"{STRONGER} instead of rounding: mean KL {fed_back.loss:.4g} instead of {rounded.loss:.4g}, "
                f"{'kept' if self._algorithm else 'not worth its time'}"
            )
        scale = rounded.loss / probe.loss if probe.loss > 0 else 1.0
        scale, share = (factor if 0 < factor < math.inf else 1.0 for factor in (scale, share))
        fits = self._contract.max_size is None or self.nbytes(probe.choice) <= self._contract.max_size
        return [self._corrected(group, scale, share) for group in groups], seen if fits else None

    def refuse(self) -> None:
        """Raise BudgetTooSmallError before anything is made, UnsupportedError for a pin that the target cannot hold."""
        limit = self._contract.max_size
        groups = self._space.groups
        smallest = {group.name: min(group.candidates, key=lambda each: each.nbytes).name for group in groups}
        nbytes = self.nbytes(smallest)
        if limit is not None and nbytes > limit:
            raise BudgetTooSmallError(limit, nbytes)

    def _probe(self, groups: Sequence[Group]) -> Allocation:
        """A choice near where the search will end."""
        limits, predicted = self._contract, curve(groups)
        smallest = allocate(groups, int(predicted.nbytes[0]))
        budget = float(np.median(predicted.nbytes))
        if limits.max_kl is not None:
            budget = predicted.nbytes_for(limits.max_kl)
        if limits.max_size is not None:
            room = limits.max_size - (self.nbytes(smallest.choice) - smallest.nbytes)
            budget = min(budget, room) if limits.needs_measures else room  # a short search may end with it
        return allocate(groups, max(int(budget), smallest.nbytes))

    def _corrected(self, group: Group, scale: float, share: float) -> Group:
        """Predictions scaled to what was measured; `share` of that for candidates that take the stronger algorithm."""
        linear = self._architecture.by_name[self._space.members[group.name][0]]
        candidates = [
            replace(each, loss=each.loss * scale * (share if self._stronger(linear, each.name) else 1.0))
            for each in group.candidates
        ]
        return replace(group, candidates=tuple(candidates))

    def _rules(self, choice: Choice) -> tuple[Rule, ...]:
        wanted = {
            name: Wanted(grid, self._algorithm if self._stronger(self._architecture.by_name[name], grid) else None)
            for group, grid in choice.items()
            for name in self._space.members[group]
        }
        return rules_of(self._architecture, wanted)

    def _stronger(self, linear: Linear, grid: str) -> bool:
        """Whether the stronger algorithm is for this Linear on this grid, where it is used at all."""
        few = find_grid(grid).bits(linear.shape) < ENOUGH_BITS * linear.weights
        return few and linear.block is not None

    def _key(self, choice: Choice) -> tuple[str, ...]:
        return self._algorithm or "", *(choice[group.name] for group in self._space.groups)


def measured_of(found: Found, contract: Contract) -> Measured:
    """What was measured, with every limit on quality turned so that small values are good."""
    measures = found.measures
    margins: list[Margin] = []
    if contract.max_kl is not None:
        margins.append(at_most("mean KL", measures.mean_kl, contract.max_kl))
    if contract.max_kl_99_9 is not None:
        margins.append(_tail(measures, contract.max_kl_99_9))
    if contract.max_ppl_increase is not None:
        ratio = measures.ppl_ratio
        name, limit = "perplexity increase", contract.max_ppl_increase
        increase = Margin(name, ratio.value - 1, ratio.standard_error, limit, ratio.upper - 1, ratio.documents)
        margins.append(increase)
    if contract.min_same_top is not None:
        margins.append(at_least("share of other top tokens", measures.same_top, contract.min_same_top))
    margins += [_drop(drop) for drop in found.drops]
    rows = measures.per_document
    return Measured(
        measures.mean_kl.value,
        measures.mean_kl.standard_error,
        tuple(margins),
        np.array([row.kl for row in rows]),
        np.array([row.tokens for row in rows], dtype=np.float64),
    )


def _tail(measures: Measures, limit: float) -> Margin:
    upper = measures.kl_99_9_upper if measures.kl_99_9_certified else None
    return Margin("99.9 % KL", measures.kl_99_9, measures.kl_99_9_error, limit, upper, measures.documents)


def _drop(drop: Drop) -> Margin:
    """A metric without bounds counts by its value: *certify* will say that it allows no verdict."""
    bounded = not drop.hindrance
    error = (drop.upper - drop.value) / BOUND if bounded else 0.0
    return Margin(drop.limit.metric, drop.value, error, drop.limit.amount, drop.upper if bounded else None)
