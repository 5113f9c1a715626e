"""Targets: what `--for` may name, and which format and runtime that means. Facts in runtimes/data/engines.toml."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from importlib.util import find_spec

from anyquant.core.errors import UsageError
from anyquant.core.extras import require
from anyquant.core.registry import suggest
from anyquant.formats import STATE

MEASURING = ("tokenizers", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Target:
    """`runtime` is what proves the artifact here, "" where nothing does; `default_preset` what is made when nothing is
    asked for.

    `libraries` are those that the proof needs. `exact_grids`: grids on which the runtime computes exactly, without
    rounding activations, or patterns of their names. `serve`: how a server is started, with
    {artifact}, {context} and {cache}; or "". `search` is "decoded" where choices are compared by their decoded weights,
    because the runtime is slow here.
    """

    name: str
    format: str
    runtime: str
    default_preset: str
    presets: tuple[str, ...]
    exact_grids: tuple[str, ...]
    libraries: tuple[str, ...]
    note: str
    serve: str = ""
    search: str = ""

    @property
    def schema_only(self) -> bool:
        """Whether nothing here runs its artifacts: they are written as the engine's own tools lay them out, read back
        byte for byte, and measured by running the decoded weights in transformers."""
        return not self.runtime and not self.neutral

    @property
    def neutral(self) -> bool:
        """Whether it is no engine's, but the neutral state."""
        return self.format == STATE

    def exact(self, grid: str) -> bool:
        """Whether the runtime's arithmetic on this grid is exact but for float rounding."""
        return any(fnmatchcase(grid, pattern) for pattern in self.exact_grids)


@cache
def targets() -> dict[str, Target]:
    """All targets by name."""
    table = tomllib.loads((files("anyquant.runtimes") / "data" / "engines.toml").read_text(encoding="utf-8"))
    return {
        name: Target(
            name=name,
            format=row["format"],
            runtime=row["runtime"],
            default_preset=row["default_preset"],
            presets=tuple(row["presets"]),
            exact_grids=tuple(row["exact_grids"]),
            libraries=tuple(row["libraries"]),
            note=row["note"],
            serve=row["serve"],
            search=row.get("search", ""),
        )
        for name, row in table["engine"].items()
    }


def expect_libraries(libraries: Sequence[str]) -> None:
    """Raise MissingExtraError now for what measuring would miss after the work; nothing is imported.

    `libraries` are those of the runtime, beside what every measurement needs.
    """
    for library in (*MEASURING, *libraries):
        if find_spec(library) is None:
            require(library)


def target(name: str) -> Target:
    """The target called `name`. Raises UsageError with the nearest names."""
    known = targets()
    if name not in known:
        raise UsageError(f"unknown target {name!r}; {suggest(name, list(known))}")
    return known[name]


def target_or_format(name: str) -> Target:
    """The target called `name`, or the first one whose format is. Raises UsageError with the nearest names."""
    known = targets()
    by_format = {one.format: one for one in reversed(known.values())}
    found = known.get(name) or by_format.get(name)
    if found is None:
        raise UsageError(f"unknown target or format {name!r}; {suggest(name, list(known | by_format))}")
    return found


def neutral() -> Target:
    """No target: the neutral quantized state, which every format can be written from; nothing runs it as it is."""
    return Target(
        STATE,
        STATE,
        "",
        "",
        (),
        ("*",),
        (),
        "judged by running the decoded weights in transformers: nothing runs the neutral state itself",
    )
