"""What a recipe says of activations: the grid on which the inputs of the matrices are rounded while the model runs."""

from collections.abc import Mapping

from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.grid import Scope
from anyquant.core.linear import Linear
from anyquant.core.plan import Activation, Plan
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.runtimes.activations import RoundedInput


def parse_activation(text: str) -> Activation:
    """ "int8-channel" or "int8-tensor:static". Raises UsageError for what is no such grid or mode."""
    name, _, mode = text.partition(":")
    mode = mode or "dynamic"
    grid = find_grid(name)
    if mode not in ("dynamic", "static"):
        raise UsageError(f"activations {text!r}: the mode is {mode!r}, expected dynamic or static")
    scopes = {parameter.scope for parameter in grid.parameters}
    if mode == "static" and scopes != {Scope.TENSOR}:
        raise UsageError(f"activations {text!r}: a static scale is one for all tokens; use a grid ending in -tensor")
    if mode == "dynamic" and Scope.TENSOR in scopes and Scope.BLOCK not in scopes:
        raise UsageError(f"activations {text!r}: each token finds its own scale; use a grid ending in -channel")
    if not scopes or any(parameter.rows > 1 for parameter in grid.parameters):
        raise UsageError(f"activations {text!r}: not a grid for activations; for instance int8-channel")
    return Activation(name, mode)


def needs_maximum(activation: Activation | None) -> bool:
    """Whether the largest magnitude has to be known beforehand: of a static scale, and of one over all tokens."""
    return activation is not None and (activation.mode == "static" or find_grid(activation.grid).tensor_wide)


def input_activation(activation: Activation | None, linear: Linear, grid: str) -> Activation | None:
    """What enters `linear`, a matrix of a block on `grid`; matrices that stay in float take float."""
    if activation is None or linear.block is None or find_grid(grid).family == "floating":
        return None
    if linear.expert is not None:
        raise UnsupportedError(f"{linear.name}: quantized activations of experts are not simulated yet")
    reason = find_grid(activation.grid).refuses((1, linear.shape[1]))
    if reason is not None:
        raise UnsupportedError(f"{linear.name}: its input does not lie on {activation.grid}: {reason}")
    return activation


def rounded_inputs(architecture: Architecture, plan: Plan, maxima: Mapping[str, float]) -> list[RoundedInput]:
    """How the inputs of the Linears are rounded while the model runs; `maxima` as calibration saw them."""
    found = []
    for name, decision in plan.decisions.items():
        if decision.input_activation is None:
            continue
        largest = max((maxima[other] for other in plan.tied(name) if other in maxima), default=None)
        found.append(RoundedInput(architecture.by_name[name].module, decision.input_activation.grid, largest))
    return found
