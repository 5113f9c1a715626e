"""Grids: the sets of values that a weight may take, one family per file, found by name and loaded when used.

A grid name tells its family: "f16" is floating, "q8_0" legacy, "q4_k" kquant, "int4-g128" integer. Third parties add
grids through the entry-point group `anyquant.grids`: the name is the grid's, the object a `core.grid.Grid`.
"""

import importlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.core.grid import Grid
from anyquant.core.registry import suggest

GROUP = "anyquant.grids"


@dataclass(frozen=True)
class Family:
    """A module with `make(name) -> Grid` for every name that `pattern` matches; `names` are the ones worth listing."""

    module: str
    pattern: str
    names: tuple[str, ...]


FAMILIES = (
    Family("anyquant.grids.floating", r"f32|f16|bf16", ("f32", "f16", "bf16")),
    Family("anyquant.grids.legacy", r"q8_0|q[45]_[01]", ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")),
    Family("anyquant.grids.kquant", r"q[2-6]_k", ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")),
    Family(
        "anyquant.grids.iquant", r"iq4_nl|iq4_xs|iq3_s|iq3_xxs|iq2_s", ("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s")
    ),
    Family(
        "anyquant.grids.integer",
        r"int[2-8]-(g(16|32|64|128|256)|channel|tensor)(-asym)?(-f16)?",
        tuple(
            f"int{bits}-{reach}{asymmetric}{half}"
            for bits in range(2, 9)
            for reach in ("g16", "g32", "g64", "g128", "g256", "channel", "tensor")
            for asymmetric in ("", "-asym")
            for half in ("", "-f16")
        ),
    ),
    Family(
        "anyquant.grids.affine",
        r"affine[234568]-g(32|64|128)",
        tuple(f"affine{bits}-g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    ),
    Family(
        "anyquant.grids.fp8",
        r"fp8_(e4m3|e5m2)-(tensor|channel|block|g128)",
        tuple(f"fp8_{kind}-{reach}" for kind in ("e4m3", "e5m2") for reach in ("tensor", "channel", "block", "g128")),
    ),
    Family(
        "anyquant.grids.microscaling",
        r"mxfp4|mxfp6_(e2m3|e3m2)|mxfp8_(e4m3|e5m2)|nvfp4(-bare)?",
        ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4", "nvfp4-bare"),
    ),
    Family(
        "anyquant.grids.fourbit",
        r"(nf4|fp4)-g(32|64|128|256)(-double)?",
        tuple(
            f"{kind}-g{group}{double}"
            for kind in ("nf4", "fp4")
            for group in (32, 64, 128, 256)
            for double in ("", "-double")
        ),
    ),
    # what the hqq package has made; nothing to choose
    Family("anyquant.grids.float_zero", r"hqq[1234568]-g[1-9]\d{0,5}", ()),
    Family("anyquant.grids.codebook", r"codebook[2-8]", tuple(f"codebook{bits}" for bits in range(2, 9))),
)


def names() -> list[str]:
    """Every grid name: built-in ones, then those of installed plug-ins."""
    builtin = [name for family in FAMILIES for name in family.names]
    return builtin + sorted({point.name for point in entry_points(group=GROUP)} - set(builtin))


@cache
def grid(name: str) -> Grid:
    """The grid called `name`. Raises UsageError with the nearest names, or one of each family, when there is none."""
    for family in FAMILIES:
        if re.fullmatch(family.pattern, name):
            made = importlib.import_module(family.module).make(name)
            return _checked(name, made)
    for point in entry_points(group=GROUP, name=name):
        return _checked(name, point.load())
    near = suggest(name, names())
    if near.startswith("known"):  # 200 of them
        near = f"there are {', '.join(family.names[0] for family in FAMILIES if family.names)} and others like them"
    raise UsageError(f"unknown grid {name!r}; {near}")


def _checked(name: str, candidate: object) -> Grid:
    if not isinstance(candidate, Grid):
        raise AnyQuantError(f"grid {name!r}: its module gives a {type(candidate).__name__}, expected a Grid")
    return candidate
