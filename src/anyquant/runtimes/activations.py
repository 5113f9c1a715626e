"""Rounded activations, simulated: what enters a module is rounded to a grid before the module uses it.

Rows of the grid are tokens. Dynamic: each token's parameters just cover its own range, as kernels do. Static: one
scale for all tokens, from the largest magnitude that calibration saw.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.errors import UnsupportedError
from anyquant.core.extras import require
from anyquant.grids import grid as find_grid


@dataclass(frozen=True)
class RoundedInput:
    """The input of `module` (its path in the model) on `grid`. `maximum`: the largest magnitude of a static scale."""

    module: str
    grid: str
    maximum: float | None = None


def rounding_of(rounded: RoundedInput) -> Callable[[Any], Any]:
    """A function from a torch tensor (..., in) to what is left of it after rounding, of the same type."""
    torch, grid = require("torch"), find_grid(rounded.grid)
    shared = None if rounded.maximum is None else grid.prepare(rounded.maximum)

    def apply(values: Any) -> Any:
        rows = np.ascontiguousarray(values.detach().reshape(-1, values.shape[-1]).float().cpu().numpy())
        params = grid.plain(rows, shared)
        left = torch.from_numpy(grid.decode(grid.encode(rows, params), params))
        return left.reshape(values.shape).to(values.dtype)

    return apply


@contextmanager
def rounding_inputs(model: Any, inputs: Sequence[RoundedInput]) -> Iterator[None]:
    """While active, modules of the torch `model` get rounded inputs. Raises UnsupportedError for an unknown module."""
    handles = []
    try:
        for path, rounded in {one.module: one for one in inputs}.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise UnsupportedError(f"the transformers model has no module {path}") from None
            round_input = rounding_of(rounded)
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, given, round_input=round_input: (round_input(given[0]), *given[1:])
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
