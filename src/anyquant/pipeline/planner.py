"""From a recipe to a plan: one decision per Linear, with its reason, before anything is read or written."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Algorithm, Task
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.corrections import CorrectionSpec
from anyquant.core.errors import AnyQuantError, UnsupportedError, UsageError
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import Decision, Layout, Plan, Step
from anyquant.core.registry import suggest
from anyquant.formats.base import Format, Rules
from anyquant.formats.payload import PayloadRules
from anyquant.grids import grid as find_grid
from anyquant.grids import names as grid_names
from anyquant.models.architecture import Architecture
from anyquant.pipeline.activations import input_activation, needs_maximum, parse_activation
from anyquant.pipeline.chain import Chain, parse_chain
from anyquant.pipeline.recipe import Recipe, Rule
from anyquant.transforms import TRANSFORMS

# outside the block Linears: what `--grid` does not touch
APART = (Role.EMBEDDING, Role.HEAD, Role.ROUTER)


@dataclass(frozen=True)
class Job:
    """All that a run needs: nothing in it depends on the clock, the host or the output path.

    `checkpoint` is what is quantized: the `source` checkpoint, rewritten by the transforms where there are any;
    `architecture` is the rewritten one's.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    format: Rules
    recipe: Recipe
    plan: Plan
    layout: Layout
    source: Checkpoint

    @property
    def weights(self) -> int:
        """Weights of all Linears."""
        return sum(linear.weights for linear in self.architecture.linears)


@dataclass(frozen=True)
class Model:
    """What is planned for: `source` is the model as it was given, `checkpoint` what transforms make of it."""

    architecture: Architecture
    checkpoint: Checkpoint
    source: Checkpoint

    def stored_grid(self, linear: Linear) -> str:
        """The float grid of the type in which the source stores the matrix, or the nearest one that holds it."""
        tensor = linear.view.tensor
        if tensor not in self.source.names():  # a head that is no longer tied
            tensor = next(one.view.tensor for one in self.architecture.linears if one.role is Role.EMBEDDING)
        dtype = self.source.spec(tensor).dtype.lower()
        return dtype if dtype in ("f32", "f16", "bf16") else "f32"


def _base(model: Model, target: Rules, recipe: Recipe, importance: bool) -> dict[str, tuple[str, str]]:
    """Linear name to (grid, reason) before rules."""
    architecture = model.architecture
    named = None if recipe.preset is None else target.preset(recipe.preset, architecture, importance)
    chosen: dict[str, tuple[str, str]] = {}
    for linear in architecture.linears:
        source = model.stored_grid(linear)
        if named is not None:
            grid, reason = named[linear.name]
            chosen[linear.name] = (grid or source, reason)
        elif recipe.grid is None:
            chosen[linear.name] = (source, "no rule names it: kept as stored")
        elif linear.role in APART:
            chosen[linear.name] = target.default_grid(linear, architecture, recipe.grid, source)
        else:
            chosen[linear.name] = (recipe.grid, "--grid")
    return chosen


def _override(chosen: dict[str, tuple[str, str]], architecture: Architecture, role: Role, name: str | None) -> None:
    if name is None:
        return
    found = [linear.name for linear in architecture.linears if linear.role is role]
    if not found:
        tied = " (the head is tied to the embedding: use --embedding)" if role is Role.HEAD else ""
        raise UsageError(f"--{role.value} {name}: this model has no {role.value}{tied}")
    for linear in found:
        chosen[linear] = (name, f"--{role.value}")


@dataclass(frozen=True)
class _Wish:
    """What was asked for one Linear, before it is seen whether it can be. `ruled`: by a rule that names it."""

    grid: str
    reason: str
    algorithm: str
    options: Mapping[str, Any]
    ruled: bool = False


def _apply_rules(wishes: dict[str, _Wish], architecture: Architecture, recipe: Recipe) -> None:
    for index, rule in enumerate(recipe.rules):
        matched = [linear for linear in architecture.linears if rule.matches(linear)]
        if not matched:
            raise UsageError(f"rule {index} ({rule.describe()}) matches no Linear of this model; remove or correct it")
        if rule.blocks is not None and rule.blocks[1] >= architecture.dimensions.blocks:
            raise UsageError(
                f"rule {index} ({rule.describe()}): the model's blocks are 0 to {architecture.dimensions.blocks - 1}"
            )
        for linear in matched:
            wishes[linear.name] = _ruled(wishes[linear.name], rule)


def _ruled(now: _Wish, rule: Rule) -> _Wish:
    # another algorithm does not know the options of the one it replaces
    options = dict(rule.options) if rule.algorithm else {**now.options, **rule.options}
    return _Wish(rule.grid or now.grid, rule.describe(), rule.algorithm or now.algorithm, options, True)


def _decide(linear: Linear, wish: _Wish, importance: bool) -> Decision:
    """The decision on one Linear. Raises UsageError for an algorithm that cannot work on it."""
    chain = _matrix_chain(linear, wish)
    if linear.role in APART and not wish.ruled:
        chain = Chain(chain.quantize)  # the algorithm is for the matrices of the blocks: nothing else is pruned
    plain = find_grid(wish.grid).family == "floating" and chain.prune is None and chain.correct is None
    steps = [ALGORITHMS.get(step.name) for step in (chain.prune, chain.quantize, chain.correct) if step is not None]
    reason = wish.reason
    if plain:
        chain = Chain(Step("rtn", ALGORITHMS.get("rtn").options))
    elif not linear.input_group and any(not step.rows_apart or step.needs for step in steps):
        chain = Chain(Step("rtn", ALGORITHMS.get("rtn").options))
        reason = f"{reason}; its rows are looked up and meet no activations: rtn"
    elif linear.block is None and ALGORITHMS.get(chain.quantize.name).tune is not None:
        reason = f"{reason}; {chain.quantize.name} tunes the matrices of a block, and it is in none: rtn"
        chain = replace(chain, quantize=Step("rtn", ALGORITHMS.get("rtn").options))
    elif not importance and (needy := next((step for step in steps if _statistics(step)), None)) is not None:
        raise UsageError(
            f"{linear.name}: {needy.name} needs statistics of activations; leave out --data-free, or choose rtn or hqq"
        )
    return Decision(
        linear=linear.name,
        requested=wish.grid,
        grid=wish.grid,
        reason=reason,
        algorithm=chain.quantize.name,
        options=chain.quantize.options,
        prune=chain.prune,
        correct=chain.correct,
        corrections=tuple(_corrections(chain)),
    )


def _statistics(algorithm: Algorithm) -> bool:
    return bool(algorithm.needs) or algorithm.tune is not None


def _matrix_chain(linear: Linear, wish: _Wish) -> Chain:
    chain = parse_chain(wish.algorithm, wish.options)
    return Chain(chain.quantize, chain.prune, chain.correct)


def _corrections(chain: Chain) -> Iterator[CorrectionSpec]:
    if chain.prune is not None:
        yield CorrectionSpec("mask", 0, chain.prune.name)
    if chain.correct is not None:
        yield CorrectionSpec("low_rank", int(chain.correct.options["rank"]), chain.correct.name)


def _fit(decision: Decision, linear: Linear, target: Rules, stored: str) -> Decision:
    """The decision on the target's own variant of the grid, or its fallback where the shape does not lie on it.

    `stored` is the grid of the source.
    """
    own = target.own_grid(decision.grid)
    if own != decision.grid:
        decision = replace(decision, grid=own, reason=f"{decision.reason}; {target.name} holds {own}")
    reason = find_grid(decision.grid).refuses(linear.shape)
    if reason is None:
        return decision
    fallback = target.fallback(decision.grid, linear)
    if fallback is None:
        raise UnsupportedError(f"{linear.name}: {decision.grid} does not fit: {reason}; choose another grid for it")
    said = f"falls back to {fallback}" if fallback else f"stays {stored}, as stored"
    return replace(decision, grid=fallback or stored, reason=f"{decision.reason}; {reason}: {said}")


def _check(decision: Decision, linear: Linear) -> None:
    """Raise UsageError or UnsupportedError for what options, grid and shape rule out, before hours are spent."""
    nothing = np.broadcast_to(np.float32(0), linear.shape)
    for step in (decision.prune, Step(decision.algorithm, decision.options), decision.correct):
        check = None if step is None else ALGORITHMS.get(step.name).check
        if step is not None and check is not None:
            check(Task(nothing, find_grid(decision.grid), options=step.options, place=linear.name))


def _check_ties(decisions: Mapping[str, Decision], ties: Mapping[str, str]) -> dict[str, Decision]:
    """Decisions with their tie groups. Raises UsageError when a group would be split over grids."""
    first: dict[str, Decision] = {}
    tied = {}
    for name, decision in decisions.items():
        group = ties.get(name)
        if group is not None:
            leader = first.setdefault(group, decision)
            if leader.grid != decision.grid:
                raise UsageError(
                    f"{leader.linear} ({leader.grid}) and {name} ({decision.grid}) are one tensor in the target "
                    f"({group}) and must share a grid; make the rules agree"
                )
        tied[name] = replace(decision, tie_group=group)
    return tied


def refuse_unknown(names: Iterable[str], target: Rules, architecture: Architecture) -> None:
    """Raise UsageError for a name that no grid has, with the nearest that the target holds."""
    for name in dict.fromkeys(names):
        try:
            find_grid(name)
        except UsageError:
            near = suggest(name, [one for one in grid_names() if target.holds(one)])
            if near.startswith("known"):  # too many to read: those that a search chooses from
                offered = dict.fromkeys(grid for linear in architecture.linears for grid in target.candidates(linear))
                near = f"{target.name} has, among others, {', '.join(offered)}"
            raise UsageError(f"unknown grid {name!r}; {near}") from None


def make_plan(model: Model, target: Rules, recipe: Recipe, importance: bool) -> Plan:
    """Decide every Linear and every carried tensor, by the rules of the target.

    Raises UsageError for rules that match nothing or contradict each other, UnsupportedError for a matrix that has no
    place on its grid.
    """
    architecture = model.architecture
    asked = (recipe.grid, recipe.embedding, recipe.head, *(rule.grid for rule in recipe.rules))
    refuse_unknown(filter(None, asked), target, architecture)
    base = _base(model, target, recipe, importance)
    _override(base, architecture, Role.EMBEDDING, recipe.embedding)
    _override(base, architecture, Role.HEAD, recipe.head)
    wishes = {name: _Wish(grid, reason, recipe.chain, recipe.options) for name, (grid, reason) in base.items()}
    _apply_rules(wishes, architecture, recipe)
    for index, rule in enumerate(recipe.rules):
        if rule.algorithm and (moved := parse_chain(rule.algorithm, rule.options).transforms):
            raise UsageError(
                f"rule {index} ({rule.describe()}): {moved[0].name} changes the model as a whole; "
                "name it in the recipe's algorithm"
            )
    rounded = recipe.activations or (recipe.preset and target.activations(recipe.preset))
    activation = parse_activation(rounded) if rounded else None
    transforms = parse_chain(recipe.chain, recipe.options).transforms
    decisions = {}
    for linear in architecture.linears:
        fitted = _fit(_decide(linear, wishes[linear.name], importance), linear, target, model.stored_grid(linear))
        _check(fitted, linear)
        decisions[linear.name] = replace(fitted, input_activation=input_activation(activation, linear, fitted.grid))
    if activation is not None and not any(decision.input_activation for decision in decisions.values()):
        raise UsageError(f"--activations {recipe.activations}: no matrix of the blocks is quantized; give --grid")
    _expect_alike(architecture, decisions)
    # what transforms make of norms and biases does not lie in the source's type; the state keeps it as it is
    norms = target.default_carried or ("F32" if transforms and not isinstance(target, Format) else "")
    calibrated = next((step.name for step in transforms if TRANSFORMS.get(step.name).block is not None), None)
    if calibrated is not None and not importance:
        raise UsageError(f"{calibrated} is found from activations; leave out --data-free")
    blocks = [decisions[linear.name].grid for linear in architecture.linears if linear.block is not None]
    if calibrated is not None and all(find_grid(grid).family == "floating" for grid in blocks):
        raise UsageError(f"{calibrated} prepares for rounding, and no matrix of the blocks is quantized; give --grid")
    if needs_maximum(activation) and not importance:
        raise UsageError(
            f"--activations {recipe.activations}: a scale of all tokens is calibrated; leave out --data-free"
        )
    return Plan(
        family=architecture.family,
        decisions=_check_ties(decisions, target.ties(architecture)),
        carried={carried.name: norms for carried in architecture.carried},
        label=recipe.preset or recipe.grid or "mixture",
        importance=importance,
        kv_cache=recipe.kv_cache,
        transforms=transforms,
    )


def _expect_alike(architecture: Architecture, decisions: Mapping[str, Decision]) -> None:
    """Raise UsageError when matrices of one block that are tuned together have different options."""
    first: dict[tuple[int | None, str], Decision] = {}
    for linear in architecture.linears:
        decision = decisions[linear.name]
        if ALGORITHMS.get(decision.algorithm).tune is None:
            continue
        leader = first.setdefault((linear.block, decision.algorithm), decision)
        if dict(leader.options) != dict(decision.options):
            raise UsageError(
                f"{leader.linear} and {linear.name} are tuned together by {decision.algorithm}: one set of options"
            )


def _together(reasons: Sequence[str], architecture: Architecture) -> str:
    """One line; the same reason against many Linears is said once, for the first and the number of the others."""
    grouped: dict[str, list[str]] = {}
    for reason in reasons:
        name, _, why = reason.partition(": ")
        grouped.setdefault(why if name in architecture.by_name else reason, []).append(name)
    said = []
    for why, names in grouped.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        said.append(f"{names[0]}{more}: {why}" if names[0] in architecture.by_name else why)
    return "; ".join(said)


def draft_job(model: Model, target: Rules, recipe: Recipe, importance: bool) -> tuple[Job, str]:
    """The plan with its layout, and why the target cannot hold it: all reasons in one line, "" when it can.

    When it cannot, the layout is the bare payload: the ledger of a model that cannot be written yet is complete and
    exact all the same. Raises as `make_plan`.
    """
    architecture, checkpoint = model.architecture, model.checkpoint
    plan = make_plan(model, target, recipe, importance)
    reasons = [*target.refuses(architecture, plan, checkpoint), *_inexact_masks(plan, target)]
    refusal = f"{target.name} cannot hold this plan: {_together(reasons, architecture)}" if reasons else ""
    form = PayloadRules(target.name) if reasons else target
    layout = form.layout(architecture, plan, checkpoint)
    return Job(checkpoint, architecture, form, recipe, plan, layout, model.source), refusal


def make_job(model: Model, target: Rules, recipe: Recipe, importance: bool) -> Job:
    """A job that can be done. Raises UnsupportedError when the target cannot hold its plan, and as `make_plan`."""
    job, refusal = draft_job(model, target, recipe, importance)
    if refusal:
        raise UnsupportedError(refusal)
    return job


def _inexact_masks(plan: Plan, target: Rules) -> list[str]:
    """Pruned matrices on grids without an exact zero, which only a state with room for the mask can hold."""
    if not isinstance(target, Format):
        return []
    return [
        f"{decision.linear}: pruned weights are not zero on {decision.grid}, and {target.name} has no place for a mask"
        for decision in plan.decisions.values()
        if any(correction.kind == "mask" for correction in decision.corrections) and not holds_zero(decision.grid)
    ]


@cache
def holds_zero(name: str) -> bool:
    """Whether weights that are zero among others stay exactly zero on a grid, seen on a sample."""
    grid = find_grid(name)
    random = np.random.default_rng(0)
    sample = random.standard_normal((grid.block[0] * 4, max(256, grid.block[1]))).astype(np.float32)
    zero = random.random(sample.shape) < 0.5
    sample[zero] = 0
    params, codes = grid.quantize(sample)
    return not grid.decode(codes, params)[zero].any()


def chain_of(job: Job) -> str:
    """What is done to the matrices that leave float, as one writes it; several chains are separated by semicolons."""
    rounded = {
        linear: job.plan.decisions[linear.name]
        for linear in job.architecture.linears
        if find_grid(job.plan.decisions[linear.name].grid).family != "floating" or job.plan.decisions[linear.name].prune
    }
    # an embedding is mostly rounded whatever was asked for; its line of the ledger says so
    chains = [one.chain for linear, one in rounded.items() if linear.role is not Role.EMBEDDING or len(rounded) == 1]
    before = [step.name for step in job.plan.transforms]
    return "; ".join(" -> ".join([*before, chain]) for chain in dict.fromkeys(chains)) or " -> ".join(before) or "none"


def writable(job: Job) -> Format:
    """The format of a job that is written through one. Raises AnyQuantError for the neutral state."""
    if not isinstance(job.format, Format):
        raise AnyQuantError(f"{job.format.name} is planned for, but not written through a format")
    return job.format
