"""Where each Linear lies in the parameters of the `transformers` model, which may hold matrices in another way than the
checkpoint does: the experts of a block, stored one by one, are one 3-D parameter there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyquant.core.errors import UnsupportedError
from anyquant.core.linear import Linear
from anyquant.models.architecture import Architecture


@dataclass(frozen=True)
class Place:
    """Rows [start, start + rows) of the matrix (out, in) in `parameter`, or in its slice `expert` when that is 3-D.

    Transposed: the parameter, or its slice, is (in, out).
    """

    parameter: str
    start: int
    rows: int
    expert: int | None = None
    transposed: bool = False

    def of(self, tensor: Any) -> Any:
        """The Linear (rows, in) as a view of `tensor`, a torch or numpy array with the shape of the parameter."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        matrix = matrix.T if self.transposed else matrix
        return matrix[self.start : self.start + self.rows]


def find_places(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> Mapping[str, Place]:
    """Linear name -> Place, for the Linears of all blocks; `shapes` are those of the model's parameters.

    Experts are found by shape: matrices with one input lie one below the other in a parameter of their module.
    Raises UnsupportedError when the model has no parameter that a Linear fits; `where` is for its message.
    """
    places: dict[str, Place] = {}
    inputs: dict[str, list[Linear]] = {}
    for linear in architecture.linears:
        if linear.block is None:
            continue
        if linear.expert is not None:
            inputs.setdefault(linear.input_group, []).append(linear)
            continue
        parameter = f"{linear.module}.weight"
        if parameter not in shapes:
            raise UnsupportedError(f"{where}: the transformers model has no module {linear.module}")
        view = linear.view
        places[linear.name] = Place(parameter, view.start, view.rows, None, view.transposed)
    stacks = _stacks(shapes)
    for linears in inputs.values():
        places |= _expert_places(linears, stacks, where)
    return places


def _stacks(shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[str, tuple[int, ...]], str]:
    """(module, shape of one matrix) -> 3-D parameter."""
    return {(name.rpartition(".")[0], shape[1:]): name for name, shape in shapes.items() if len(shape) == 3}


def _expert_places(
    linears: list[Linear], stacks: Mapping[tuple[str, tuple[int, ...]], str], where: str
) -> dict[str, Place]:
    """The matrices of one expert that share an input."""
    first = linears[0]
    height, width = sum(linear.shape[0] for linear in linears), first.shape[1]
    upright, lying = stacks.get((first.module, (height, width))), stacks.get((first.module, (width, height)))
    parameter = upright or lying
    if parameter is None:
        raise UnsupportedError(f"{where}: {first.module} of the transformers model has no parameter for {first.name}")
    places, start = {}, 0
    for linear in linears:
        places[linear.name] = Place(parameter, start, linear.shape[0], linear.expert, upright is None)
        start += linear.shape[0]
    return places
