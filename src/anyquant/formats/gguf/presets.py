"""llama.cpp's named mixtures (Q4_K_M and the others): presets.toml, and the interpreter of its rules.

The tensor types equal those of llama.cpp's own quantizer; tests/golden/presets holds what it chose.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from anyquant.core.errors import UsageError
from anyquant.core.linear import Linear, Role
from anyquant.core.registry import suggest
from anyquant.models.architecture import Architecture

FUSED = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)


@dataclass(frozen=True)
class Alternative:
    """One way in which a condition on the model holds: everything that is given must hold.

    `least_group` is the number of query heads per key-value head, rounded down.
    """

    families: tuple[str, ...] = ()
    blocks: int | None = None
    least_group: int | None = None
    experts: int | None = None
    importance: bool | None = None

    def holds(self, architecture: Architecture, importance: bool) -> bool:
        sizes = architecture.dimensions
        return (
            (not self.families or architecture.family in self.families)
            and self.blocks in (None, sizes.blocks)
            and (self.least_group is None or sizes.heads // max(1, sizes.kv_heads) >= self.least_group)
            and self.experts in (None, sizes.experts)
            and self.importance in (None, importance)
        )


@dataclass(frozen=True)
class Rule:
    """Matrices of `role`, in `blocks`, on models where all of `when` hold, now on one of `source`, go to `grid`."""

    role: str
    grid: str
    blocks: str = ""
    when: tuple[str, ...] = ()
    source: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        parts = [self.role, f"{self.blocks} of the blocks" if self.blocks else "", *self.when]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Preset:
    """`file_type` is `general.file_type` in the metadata; `grid` is the base, changed by `rules`, the last one wins.

    `needs_importance`: llama.cpp makes this one with importance only, since it is poor without.
    """

    name: str
    file_type: int
    grid: str
    rules: tuple[Rule, ...]
    needs_importance: bool


@dataclass(frozen=True)
class Tables:
    """All of presets.toml.

    `fallback` maps a grid to (row multiple that it needs, the grid to take otherwise), `apart` a grid that no preset is
    based on to the grids of head and embedding, by role. `candidates` are the grids among which a search chooses.
    """

    presets: Mapping[str, Preset]
    conditions: Mapping[str, tuple[Alternative, ...]]
    fallback: Mapping[str, tuple[int, str]]
    apart: Mapping[str, Mapping[str, str]]
    router: str
    candidates: tuple[str, ...]


@cache
def tables() -> Tables:
    """The data file, read once."""
    raw = tomllib.loads((files("anyquant.formats.gguf") / "presets.toml").read_text(encoding="utf-8"))
    common = tuple(map(_rule, raw["common"]))
    return Tables(
        presets={
            name: Preset(
                name,
                row["file_type"],
                row["grid"],
                (*map(_rule, row.get("rules", ())), *common),
                row.get("needs_importance", False),
            )
            for name, row in raw["preset"].items()
        },
        conditions={
            name: tuple(Alternative(**{**row, "families": tuple(row.get("families", ()))}) for row in rows)
            for name, rows in raw["condition"].items()
        },
        fallback={grid: (row["multiple"], row["grid"]) for grid, row in raw["fallback"].items()},
        apart=raw["apart"],
        router=raw["router"],
        candidates=tuple(raw["candidates"]),
    )


def _rule(row: Mapping[str, object]) -> Rule:
    def words(key: str) -> tuple[str, ...]:
        value = row.get(key, ())
        return tuple(map(str, value)) if isinstance(value, Sequence) else ()

    return Rule(str(row["role"]), str(row["grid"]), str(row.get("blocks", "")), words("when"), words("from"))


def preset_names() -> list[str]:
    """Every preset, from the largest to the smallest kind, as llama.cpp spells them."""
    return list(tables().presets)


def preset(name: str) -> Preset:
    """The preset called `name`, in any case. Raises UsageError with the nearest names."""
    known = tables().presets
    found = known.get(name.upper())
    if found is None:
        raise UsageError(f"unknown preset {name!r}; {suggest(name.upper(), list(known))}")
    return found


def resolve(name: str, architecture: Architecture, importance: bool) -> dict[str, tuple[str, str]]:
    """Linear name to (grid, reason) for every Linear of the architecture, in its order.

    `importance` tells whether importance will steer the rounding; some mixtures depend on it. Matrices that the GGUF
    keeps in one fused qkv tensor get one grid. Raises UsageError for an unknown preset.
    """
    chosen = preset(name)
    facts = {
        condition: any(alternative.holds(architecture, importance) for alternative in alternatives)
        for condition, alternatives in tables().conditions.items()
    }
    holding = {condition if held else f"not {condition}" for condition, held in facts.items()}
    roles = _effective_roles(architecture)
    return {
        linear.name: _choose(chosen, linear, roles[linear.name], architecture.dimensions.blocks, holding)
        for linear in architecture.linears
    }


def fallback(grid: str, columns: int) -> str | None:
    """The grid that llama.cpp takes instead of `grid` for rows of `columns` weights, or None when `grid` fits."""
    taken = grid
    while taken in tables().fallback and columns % tables().fallback[taken][0]:
        taken = tables().fallback[taken][1]
    return None if taken == grid else taken


def beside(grid: str, linear: Linear, architecture: Architecture) -> tuple[str, str] | None:
    """(grid, reason) of a head or embedding beside blocks on `grid`, which no preset is based on; None when unknown."""
    role = _effective_roles(architecture)[linear.name]
    chosen = tables().apart.get(grid, {}).get(role)
    return None if chosen is None else (chosen, f"llama.cpp's {role} beside {grid}")


def _choose(chosen: Preset, linear: Linear, role: str, blocks: int, holding: set[str]) -> tuple[str, str]:
    """(grid, reason) of one matrix that counts as `role`."""
    if role == Role.ROUTER:
        return tables().router, f"{chosen.name}: routers stay in float"
    grid, reason = chosen.grid, f"{chosen.name}: base grid"
    # base grids of float presets are no rule's business: they say "store as", not "quantize to"
    for rule in chosen.rules if chosen.grid in tables().fallback else ():
        if (
            rule.role == role
            and (not rule.blocks or _covers(rule.blocks, linear.block or 0, blocks))
            and holding.issuperset(rule.when)
            and (not rule.source or grid in rule.source)
        ):
            grid, reason = rule.grid, f"{chosen.name}: {rule.reason}"
    columns = linear.view.columns
    instead = fallback(grid, columns)
    if instead is None:
        return grid, reason
    multiple = tables().fallback[grid][0]
    return instead, f"{reason}; {instead} instead of {grid}: rows of {columns} are no multiple of {multiple}"


def _effective_roles(architecture: Architecture) -> dict[str, str]:
    """Linear name to the role that the rules see: a tied embedding is the head, a fused qkv is attn_v."""
    sources: dict[str, set[Role]] = {}
    for linear in architecture.linears:
        sources.setdefault(linear.view.tensor, set()).add(linear.role)
    roles: dict[str, str] = {}
    for linear in architecture.linears:
        role = linear.role
        if role is Role.EMBEDDING and architecture.tied:
            role = Role.HEAD
        elif role in FUSED and sources[linear.view.tensor].issuperset(FUSED):
            role = Role.ATTN_V
        roles[linear.name] = role
    return roles


def _covers(blocks: str, index: int, count: int) -> bool:
    """Whether block `index` of `count` is one of "more bits", "first K" or "first 1/K"."""
    if blocks == "more bits":
        eighth = count // 8
        return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2
    match = re.fullmatch(r"first (1/)?(\d+)", blocks)
    if match is None:
        raise ValueError(f"presets.toml: unknown blocks {blocks!r}")
    return index < (count // int(match[2]) if match[1] else int(match[2]))
