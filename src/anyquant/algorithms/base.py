"""What an algorithm is: a pure function that chooses, for each weight, a value of the grid."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Grid, Params
from anyquant.core.qtensor import QTensor
from anyquant.core.registry import suggest


class Quantize(Protocol):
    """The function of an algorithm. It sees a grid only through the grid's functions."""

    def __call__(
        self,
        weights: Float32,
        grid: Grid,
        importance: Float32 | None,
        options: Mapping[str, Any],
        shared: Params | None = None,
    ) -> QTensor:
        """`weights` (rows, in) float32, finite; `importance` (in,) mean squared activation per channel, or None.

        `shared` are the grid's tensor-wide parameters from `grid.prepare`. Raises UsageError for an unknown option.
        """
        ...


@dataclass(frozen=True)
class Algorithm:
    """`needs` names the statistics it uses when they are there ("second_moment"); `options` are its defaults."""

    name: str
    needs: frozenset[str]
    options: Mapping[str, Any]
    quantize: Quantize


def complete_options(algorithm: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` updated by `given`. Raises UsageError for a name without a default, or a value of another type."""
    for name, value in given.items():
        if name not in defaults:
            advice = suggest(name, list(defaults)) if defaults else "it takes none"
            raise UsageError(f"algorithm {algorithm} has no option {name!r}; {advice}")
        wanted = type(defaults[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise UsageError(f"algorithm {algorithm}: option {name} is {value!r}, expected a {wanted.__name__}")
    return {**defaults, **given}
