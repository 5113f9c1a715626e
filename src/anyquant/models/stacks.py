"""Experts of a model type without a row in models.families: matrices that its class stacks in one 3-D parameter."""

from collections.abc import Iterator, Sequence
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UnsupportedError
from anyquant.core.linear import Linear, Role, View
from anyquant.models.building import stacked_names, stored_names

SIDE = 8  # both sides of a matrix in a 3-D parameter are longer than this, of a convolution they are not


def expert_linears(checkpoint: Checkpoint, module: Any, path: str) -> Iterator[Linear]:
    """The matrices of all experts in the blocks at `path`, block by block.

    Raises UnsupportedError for a parameter that holds several matrices and is filled from the checkpoint in a way that
    is more than stacking: nothing is left in float in silence.
    """
    names = checkpoint.names()
    stored, separate = stored_names(module, names), stacked_names(module, names)
    for name, parameter in module.named_parameters():
        if not name.startswith(f"{path}.") or parameter.dim() < 3 or min(parameter.shape[-2:]) <= SIDE:
            continue
        owner, _, leaf = name.rpartition(".")
        block, _, inside = owner.removeprefix(f"{path}.").partition(".")
        for expert in range(parameter.shape[0]):
            views = _views(checkpoint, module.get_submodule(owner), parameter, stored.get(name, ""), expert)
            if name in separate:
                tensors = separate[name].get(expert, [])
                views = [View(tensor, 0, (spec := checkpoint.spec(tensor)).rows, spec.row_length) for tensor in tensors]
            covered = sum(view.rows * view.columns for view in views)
            if parameter.dim() > 3 or covered != parameter[0].numel():
                raise UnsupportedError(
                    f"{checkpoint.location}: {name} holds several matrices (experts) in one parameter, in a way that "
                    "is not known for this model type; nothing is left in float in silence"
                )
            for role, view in zip(_roles(leaf, len(views)), views, strict=True):
                own = f"blocks.{block}.{inside}.{expert}"
                yield Linear(f"{own}.{leaf}.{role}", role, view, int(block), f"{own}.{leaf}.input", owner, expert)


def _views(checkpoint: Checkpoint, owner: Any, parameter: Any, tensor: str, expert: int) -> list[View]:
    """Where the matrices of an expert lie in the stored tensor that equals the parameter; none without one.

    Gate and up are told apart where the class says that they lie one below the other.
    """
    if not tensor or parameter.dim() != 3:
        return []
    _, height, width = parameter.shape
    if getattr(owner, "is_transposed", False):
        return [View(tensor, expert * height, width, height, transposed=True)]
    split = getattr(owner, "is_concatenated", False) and "gate_up" in tensor
    rows = height // 2 if split else height
    return [View(tensor, start, rows, width) for start in range(expert * height, (expert + 1) * height, rows)]


def _roles(leaf: str, parts: int) -> Sequence[Role]:
    if parts == 2:
        return (Role.FFN_GATE, Role.FFN_UP)
    return (Role.FFN_DOWN if "down" in leaf or "output" in leaf else Role.FFN_UP,) * parts
