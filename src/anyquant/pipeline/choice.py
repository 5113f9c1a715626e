"""A choice of the contract's search, as rules of a recipe: what was found can be read, kept and run again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape

from anyquant.core.linear import Linear, Role
from anyquant.models.architecture import Architecture
from anyquant.pipeline.recipe import Rule


@dataclass(frozen=True)
class Wanted:
    """How one Linear is to be stored. `algorithm` is a chain, or None for that of the recipe."""

    grid: str
    algorithm: str | None = None


def rules_of(architecture: Architecture, wanted: Mapping[str, Wanted]) -> tuple[Rule, ...]:
    """Rules under which every Linear of `wanted` (by name) gets what is wanted, and no other Linear is touched.

    Few and legible: a role over a run of blocks where that says it, else the Linears by name.
    """
    rules: list[Rule] = []
    by_role: dict[Role, list[Linear]] = {}
    for linear in architecture.linears:
        by_role.setdefault(linear.role, []).append(linear)
    for role, linears in by_role.items():
        for wish, first, last, names in _runs(linears, wanted):
            if names:
                rules += [Rule(pattern=escape(name), grid=wish.grid, algorithm=wish.algorithm) for name in names]
            else:
                blocks = None if first is None or last is None else (first, last)
                rules.append(Rule(role=role.value, blocks=blocks, grid=wish.grid, algorithm=wish.algorithm))
    return tuple(rules)


def _runs(
    linears: Sequence[Linear], wanted: Mapping[str, Wanted]
) -> Iterator[tuple[Wanted, int | None, int | None, list[str]]]:
    """(what, first block, last block, names): neighbouring blocks that want the same; names where they must be told.

    `linears` are those of one role.
    """
    together: dict[int | None, list[Linear]] = {}
    for linear in linears:
        together.setdefault(linear.block, []).append(linear)
    run: tuple[Wanted, int, int] | None = None
    for block, members in together.items():
        wishes = {wanted.get(linear.name) for linear in members}
        alike = next(iter(wishes)) if len(wishes) == 1 else None
        if run is not None and (alike != run[0] or block != run[2] + 1):
            yield *run, []
            run = None
        if alike is not None and block is None:
            yield alike, None, None, []
        elif alike is not None and block is not None:
            run = (alike, block if run is None else run[1], block)
        else:
            yield from ((wanted[one.name], None, None, [one.name]) for one in members if one.name in wanted)
    if run is not None:
        yield *run, []
