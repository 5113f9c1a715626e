"""GPTQ on any grid: rounding with error feedback under the Hessian of the input, refined by coordinate descent.

Frantar et al. 2022, arXiv 2210.17323. The objective is the mean squared error of the matrix's output, tr(D H D^T) with
D = weights - values; with `propagation` the output that the float model would have had, see algorithms.propagation.
With two `sides` it is tr(O D H D^T), see algorithms.output_side.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anyquant.algorithms.base import Algorithm, Task
from anyquant.algorithms.error_feedback import STEERINGS, GridRounder, feed_errors_back
from anyquant.algorithms.hessian import ORDERS, Factor, Order, Route, factor, hessian_of
from anyquant.algorithms.on_grid import OnGrid, parameter_span, refittable
from anyquant.algorithms.output_side import feed_errors_across, put_rows, row_unit
from anyquant.algorithms.propagation import KINDS, best_target, deviation_known
from anyquant.algorithms.refine import refine
from anyquant.core.corrections import Mask
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Params
from anyquant.core.options import complete_options
from anyquant.core.qtensor import QTensor

DEFAULTS = {
    "dampening": 0.01,
    "order": "auto",
    "groups": "dynamic",
    "steering": "conditional",
    "block": 128,
    "refine": 1,
    "propagation": "auto",
    "mixing": 1.0,
    "sides": 1,
    "output_dampening": 0.5,
}
CHOICES = {
    "order": ("auto", *ORDERS),
    "groups": ("dynamic", "static"),
    "steering": STEERINGS,
    "propagation": KINDS,
    "sides": (1, 2),
}


def quantize(task: Task) -> QTensor:
    """Options, all of which have a default:

    `dampening`: what is added to the Hessian's diagonal, relative to its mean. `order` in which columns are handled:
    "natural", "activation" (most important first), "groups" (whole groups, most important first, and so within them);
    "auto" is "groups", but "natural" with a mask, as in SparseGPT, which loses less there.
    `groups`: "dynamic" fits parameters when their columns are reached, "static" all beforehand, as it must be for
    parameters that reach over all columns, and for the first pass in order "activation". `steering` of dynamic fits:
    the importance is the Hessian's "diagonal", or "conditional": what is left of it once the columns behind adapt.
    `block`: columns handled between corrections of the rest. `refine`: sweeps that choose codes and, where groups are
    dynamic, parameters anew given all others. `propagation`: "none", "gptaq", "qronos", or "auto", which is the latter
    where the float model's inputs are known; and `mixing`, how much of what these add to the weights. `sides`: with 2,
    rows make up for each other's errors where the gradients at the output are known; `output_dampening` is added to the
    diagonal of their second moment, relative to its mean.

    Raises UsageError for a bad option or missing statistics, BadInputError for a Hessian that cannot be one,
    UnsupportedError when the shape cannot lie on the grid.
    """
    options = checked_options(task)
    task.grid.bits(task.shape)
    shared = _shared(task)
    route = _route(task, options)
    refit = options["groups"] == "dynamic" and refittable(task.grid, shared)
    found = find_factor(task, options, route)
    hessian = hessian_of(task.stats, task.shape[1], task.place, "gptq")
    importance = np.ascontiguousarray(hessian.diagonal())
    way = _Way(options, shared, found, importance, refit, refit and route.span > route.unit)
    target = best_target(task, found, options["propagation"], options["mixing"])
    if options["sides"] == 2 and task.output_hessian is not None:
        state = _both_sides(task, target, way)
    else:
        state, _ = _one_side(task, target, way)
    corrections = () if task.keep is None else (Mask(task.keep),)
    return QTensor(task.grid, task.shape, state.codes, state.params, corrections=corrections)


@dataclass(frozen=True)
class _Way:
    """How a matrix is quantized, and each part of its rows. `dynamic`: parameters are fitted when they are reached."""

    options: dict[str, Any]
    shared: Params | None
    factor: Factor
    importance: Float32
    refit: bool
    dynamic: bool


def _one_side(task: Task, target: Float32, way: _Way) -> tuple[OnGrid, Float32]:
    """Codes and values for `target` (rows, in), each row on its own."""
    keep, found = task.keep, way.factor
    params = None if way.dynamic else task.grid.fit(_masked(target, task), way.importance, way.shared)
    steering = (way.importance, way.options["steering"]) if way.dynamic else None
    state = OnGrid(task.grid, task.shape, params, way.shared)
    rounder = GridRounder(state, found.columns, None if keep is None else found.arranged(keep), steering)
    values = found.restored(feed_errors_back(found.arranged(target), found, rounder))
    if way.options["refine"]:
        refine(state, target, values, task, found.dampening, way.options["refine"], way.refit)
    return state, values


def _both_sides(task: Task, target: Float32, way: _Way) -> OnGrid:
    """Codes for `target` (rows, in), where rows make up for the errors of those that were handled before them."""
    assert task.output_hessian is not None  # noqa: S101
    whole = {p.name: np.zeros(p.shape(task.shape), p.dtype) for p in task.grid.parameters}
    state = OnGrid(task.grid, task.shape, whole, None)

    def round_rows(rows: Order, wanted: Float32) -> Float32:
        keep = None if task.keep is None else task.keep[rows]
        part = replace(task, weights=wanted, keep=keep, output_hessian=None)
        found, values = _one_side(part, wanted, way)
        put_rows(state, rows, found)
        return values

    dampening = float(way.options["output_dampening"])
    feed_errors_across(target, task.output_hessian, dampening, row_unit(task.grid), round_rows, task.place)
    return state


def notes(task: Task) -> tuple[str, ...]:
    """What a ledger should say besides: more dampening than was asked for, channels that never fired."""
    options = checked_options(task)
    found = find_factor(task, options, _route(task, options))
    said = []
    if found.dampening > options["dampening"]:
        said.append(f"dampening raised from {options['dampening']:g} to {found.dampening:g}")
    if options["propagation"] == "auto" and not deviation_known(task):
        said.append("the float model's inputs are unknown: errors of earlier layers are not made up for")
    if found.dead.any():
        said.append(f"{int(found.dead.sum())} input channels were always 0")
    return tuple(said)


def checked_options(task: Task) -> dict[str, Any]:
    """The options, complete. Raises UsageError."""
    options = complete_options("gptq", task.options, DEFAULTS)
    for name, known in CHOICES.items():
        if options[name] not in known:
            raise UsageError(
                f"algorithm gptq: option {name} is {options[name]!r}, expected {' or '.join(map(str, known))}"
            )
    for name, least in {"dampening": 0, "block": 1, "refine": 0, "mixing": 0, "output_dampening": 0}.items():
        if not least <= options[name] < np.inf:
            raise UsageError(f"algorithm gptq: option {name} is {options[name]}, expected at least {least}")
    return options


def find_factor(task: Task, options: dict[str, Any], route: Route) -> Factor:
    """The factor of the task's Hessian, shared by all matrices with this input."""
    hessian_of(task.stats, task.shape[1], task.place, "gptq")
    assert task.stats is not None  # noqa: S101
    return factor(task.stats, route, float(options["dampening"]), task.place)


def _route(task: Task, options: dict[str, Any]) -> Route:
    """Spans stay together unless they are static and the order breaks them up."""
    span = parameter_span(task.grid, task.shape[1])
    order, unit = options["order"], task.grid.vector
    if order == "auto":
        order = "groups" if task.keep is None else "natural"
    if order == "activation" or span == task.shape[1]:
        return Route(order, unit, unit, options["block"])
    return Route(order, unit, span, options["block"])


def _shared(task: Task) -> Params | None:
    """Tensor-wide parameters, from this matrix alone where none are given."""
    if task.shared is not None or not task.grid.tensor_wide:
        return task.shared
    return task.grid.prepare(float(np.abs(task.weights).max(initial=0))) or None


def _masked(target: Float32, task: Task) -> Float32:
    return target if task.keep is None else np.where(task.keep, target, np.float32(0))


CROSS = frozenset({"cross", "residual"})
ALGORITHM = Algorithm(
    "gptq",
    needs=frozenset({"hessian"}),
    options=DEFAULTS,
    quantize=quantize,
    notes=notes,
    check=checked_options,
    option_needs={
        "propagation": {"auto": CROSS, "gptaq": CROSS, "qronos": CROSS},
        "sides": {2: frozenset({"output"})},
    },
)
