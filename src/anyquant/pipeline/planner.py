"""From a recipe to a plan: one decision per Linear, with its reason, before anything is read or written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import complete_options
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import AnyQuantError, UnsupportedError, UsageError
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import Decision, Layout, Plan
from anyquant.formats.base import Format, Rules
from anyquant.formats.payload import PayloadRules
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.pipeline.recipe import Recipe

# outside the block Linears: what `--grid` does not touch
APART = (Role.EMBEDDING, Role.HEAD, Role.ROUTER)


@dataclass(frozen=True)
class Job:
    """All that a run needs: nothing in it depends on the clock, the host or the output path."""

    checkpoint: Checkpoint
    architecture: Architecture
    format: Rules
    recipe: Recipe
    plan: Plan
    layout: Layout

    @property
    def weights(self) -> int:
        """Weights of all Linears."""
        return sum(linear.view.rows * linear.view.columns for linear in self.architecture.linears)


def stored_grid(checkpoint: Checkpoint, tensor: str) -> str:
    """The float grid that holds a source tensor exactly, or the nearest one that does."""
    dtype = checkpoint.spec(tensor).dtype.lower()
    return dtype if dtype in ("f32", "f16", "bf16") else "f32"


def _base(
    architecture: Architecture, checkpoint: Checkpoint, target: Rules, recipe: Recipe, importance: bool
) -> dict[str, tuple[str, str]]:
    """Linear name to (grid, reason) before rules."""
    named = None if recipe.preset is None else target.preset(recipe.preset, architecture, importance)
    chosen: dict[str, tuple[str, str]] = {}
    for linear in architecture.linears:
        source = stored_grid(checkpoint, linear.view.tensor)
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


def _apply_rules(decisions: dict[str, Decision], architecture: Architecture, recipe: Recipe) -> None:
    for index, rule in enumerate(recipe.rules):
        matched = [linear for linear in architecture.linears if rule.matches(linear)]
        if not matched:
            raise UsageError(f"rule {index} ({rule.describe()}) matches no Linear of this model; remove or correct it")
        if rule.blocks is not None and rule.blocks[1] >= architecture.dimensions.blocks:
            raise UsageError(
                f"rule {index} ({rule.describe()}): the model's blocks are 0 to {architecture.dimensions.blocks - 1}"
            )
        for linear in matched:
            now = decisions[linear.name]
            decisions[linear.name] = replace(
                now,
                requested=rule.grid or now.requested,
                grid=rule.grid or now.grid,
                algorithm=rule.algorithm or now.algorithm,
                options=rule.options or now.options,
                reason=rule.describe(),
            )


def _fit(decision: Decision, linear: Linear, target: Rules) -> Decision:
    """The decision, or the format's documented fallback where the shape does not lie on the grid."""
    reason = find_grid(decision.grid).refuses(linear.shape)
    if reason is None:
        return decision
    fallback = target.fallback(decision.grid, linear)
    if fallback is None:
        raise UnsupportedError(f"{linear.name}: {decision.grid} does not fit: {reason}; choose another grid for it")
    return replace(decision, grid=fallback, reason=f"{decision.reason}; {reason}: falls back to {fallback}")


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


def make_plan(
    architecture: Architecture, checkpoint: Checkpoint, target: Rules, recipe: Recipe, importance: bool
) -> Plan:
    """Decide every Linear and every carried tensor, by the rules of the target.

    Raises UsageError for rules that match nothing or contradict each other, UnsupportedError for a matrix that has no
    place on its grid.
    """
    base = _base(architecture, checkpoint, target, recipe, importance)
    _override(base, architecture, Role.EMBEDDING, recipe.embedding)
    _override(base, architecture, Role.HEAD, recipe.head)
    decisions = {
        name: Decision(name, grid, grid, reason, recipe.algorithm, recipe.options)
        for name, (grid, reason) in base.items()
    }
    _apply_rules(decisions, architecture, recipe)
    by_name = architecture.by_name
    for name, decision in decisions.items():
        algorithm = ALGORITHMS.get(decision.algorithm)
        complete_options(algorithm.name, decision.options, algorithm.options)
        decisions[name] = _fit(decision, by_name[name], target)
    return Plan(
        family=architecture.family,
        decisions=_check_ties(decisions, target.ties(architecture)),
        carried={carried.name: target.default_carried for carried in architecture.carried},
        label=recipe.preset or recipe.grid or "recipe",
        importance=importance,
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


def draft_job(
    architecture: Architecture, checkpoint: Checkpoint, target: Rules, recipe: Recipe, importance: bool
) -> tuple[Job, str]:
    """The plan with its layout, and why the target cannot hold it: all reasons in one line, "" when it can.

    When it cannot, the layout is the bare payload: the ledger of a model that cannot be written yet is complete and
    exact all the same. Raises as `make_plan`.
    """
    plan = make_plan(architecture, checkpoint, target, recipe, importance)
    reasons = target.refuses(architecture, plan, checkpoint)
    refusal = f"{target.name} cannot hold this plan: {_together(reasons, architecture)}" if reasons else ""
    form = PayloadRules(target.name) if reasons else target
    return Job(checkpoint, architecture, form, recipe, plan, form.layout(architecture, plan, checkpoint)), refusal


def make_job(
    architecture: Architecture, checkpoint: Checkpoint, target: Rules, recipe: Recipe, importance: bool
) -> Job:
    """A job that can be done. Raises UnsupportedError when the target cannot hold its plan, and as `make_plan`."""
    job, refusal = draft_job(architecture, checkpoint, target, recipe, importance)
    if refusal:
        raise UnsupportedError(refusal)
    return job


def writable(job: Job) -> Format:
    """The format of a job that is written through one. Raises AnyQuantError for the neutral state."""
    if not isinstance(job.format, Format):
        raise AnyQuantError(f"{job.format.name} is planned for, but not written through a format")
    return job.format
