"""AutoRound on any grid: roundings and scales of a block learned together, for what leaves the block.

SignRound, Cheng et al. 2023, arXiv 2309.05516: signed gradient descent with a rate that falls to zero, on the mean
squared difference from the float model's block output. It begins at GPTQ's solution, where the paper begins at
rounding to nearest. `algorithms.offsets` has what is learned; the grid is seen only through its functions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from anyquant.algorithms.base import Algorithm, Task, TunedBlock
from anyquant.algorithms.gptq import quantize as feed_errors_back
from anyquant.algorithms.offsets import Learned, Offsets, offsets_of
from anyquant.algorithms.rtn import quantize as round_to_nearest
from anyquant.core.errors import UsageError
from anyquant.core.extras import require
from anyquant.core.options import complete_options
from anyquant.core.qtensor import QTensor

DEFAULTS = {"iterations": 200, "rate": 0.0, "batch": 8, "seed": 0, "start": "gptq", "minmax": True}
SOLVER = {"refine": 1}  # how GPTQ is run to begin with
CHECKS = 3  # how often in a phase, evenly spread, the loss over all batches is looked at
HELD = 1 << 30  # bytes of target states that are kept rather than computed again


def tune(block: TunedBlock) -> Mapping[str, QTensor]:
    """The matrices of `block`, by name; deterministic.

    Options: `iterations`; `rate`, the change of an offset (in steps) or factor in the first one, 0: 1 / their number;
    `batch`, how many documents at least an iteration sees; `seed` of their order; `start`, "gptq" (needs the Hessian)
    or "rtn"; `minmax`, whether scales are learned, too, where they belong to single rows. One batch in eight is not
    learned from; now and then its loss is looked at, and that of all. Where both fell, the result is kept: it is never
    worse than the start, and not merely better on what it has seen.

    Raises UsageError for a bad option, or matrices of one block with different ones (but for `start` and `minmax`).
    """
    if not block.matrices:
        return {}
    options = _options(block.matrices)
    states = States(block, options["iterations"])
    found = {name: _start(task) for name, task in block.matrices.items()}
    best = states.judge(found)
    for phase in phases(options["iterations"], options["rate"]):
        best = learn(states, best, phase, _draws(states.seen, options["seed"]), options["batch"])
    return best.matrices


@dataclass(frozen=True)
class Phase:
    """`iterations` with a rate that falls from `rate` to 0, for scales and perhaps `roundings`."""

    iterations: int
    rate: float
    roundings: bool


@dataclass(frozen=True)
class Found:
    """Matrices, and the loss of the block with them, over all batches and those that are not learned from."""

    matrices: Mapping[str, QTensor]
    loss: float
    unseen: float

    def beats(self, other: "Found") -> bool:
        return self.loss < other.loss and self.unseen < other.unseen


def phases(iterations: int, rate: float) -> tuple[Phase, Phase]:
    """Roundings and scales together; then, from the best of that, a quarter of the iterations for scales alone, which
    gain a little even where the codes are as good as one can make them."""
    alone = iterations // 4
    first = rate or 1 / max(iterations - alone, 1)
    return Phase(iterations - alone, first, True), Phase(alone, first / 4, False)


def learn(states: "States", start: Found, phase: Phase, sampled: Iterator[int], documents: int) -> Found:
    """The best that one phase finds from `start` on."""
    matrices, best, iterations = states.block.matrices, start, phase.iterations
    wishes = {name: complete_options("autoround", task.options, DEFAULTS)["minmax"] for name, task in matrices.items()}
    if not phase.roundings and not any(wishes.values()):
        return start
    learned = {
        name: offsets_of(task, start.matrices[name], Learned(phase.roundings, wishes[name]))
        for name, task in matrices.items()
    }
    for iteration in range(iterations):
        descend(learned, states.draw(sampled, documents), phase.rate * (1 - iteration / iterations), states)
        states.block.worked(1 / states.iterations)
        if (iteration + 1) * CHECKS // iterations > iteration * CHECKS // iterations:
            found = states.judge({name: offsets.result() for name, offsets in learned.items()})
            best = found if found.beats(best) else best
    return best


@dataclass
class States:
    """What leaves the block, and what should; `iterations` is their number in all phases together."""

    block: TunedBlock
    iterations: int = 1
    _held: dict[int, Any] = field(default_factory=dict)
    _bytes: int = 0

    @property
    def seen(self) -> list[int]:
        """The batches that are learned from: all but one in eight, and all where there are fewer than four."""
        return [n for n in range(self.block.batches) if n % 8 != 3]

    def target(self, batch: int) -> Any:
        if batch in self._held:
            return self._held[batch]
        states = self.block.target(batch)
        size = states.numel() * states.element_size()
        if self._bytes + size <= HELD:
            self._held[batch] = states.clone()
            self._bytes += size
        return states

    def draw(self, numbers: Iterator[int], documents: int) -> list[int]:
        """The next batches that hold so many documents together, each at most once."""
        drawn: list[int] = []
        left = documents
        while left > 0 and len(drawn) < len(self.seen):
            number = next(numbers)
            if number in drawn:
                continue
            drawn.append(number)
            left -= len(self.target(number))
        return drawn

    def difference(self, batch: int, weights: Mapping[str, Any]) -> Any:
        """Sum of the squared differences of the outputs, a torch scalar."""
        target = self.target(batch)
        return (self.block.call(batch, weights) - target).square().sum()

    def judge(self, matrices: Mapping[str, QTensor]) -> Found:
        """The matrices with the loss they give; unseen batches count, or all where there are none."""
        torch = require("torch")
        weights = {name: torch.from_numpy(matrix.decode()) for name, matrix in matrices.items()}
        with torch.no_grad():
            losses = [float(self.difference(batch, weights)) for batch in range(self.block.batches)]
        unseen = [loss for number, loss in enumerate(losses) if number not in self.seen] or losses
        return Found(matrices, sum(losses), sum(unseen))


def descend(learned: Mapping[str, Offsets], batches: list[int], rate: float, states: States) -> None:
    """One step of signed gradient descent on the loss of `batches`."""
    weights = {name: offsets.values().detach().requires_grad_() for name, offsets in learned.items()}
    for batch in batches:
        states.difference(batch, weights).backward()
    for name, offsets in learned.items():
        if weights[name].grad is not None:  # an expert that no token was routed to has none
            offsets.step(weights[name].grad, rate)


def _start(task: Task) -> QTensor:
    start = complete_options("autoround", task.options, DEFAULTS)["start"]
    if start == "rtn":
        return round_to_nearest(replace(task, options={}))
    return feed_errors_back(replace(task, options=SOLVER))


def _draws(batches: list[int], seed: int) -> Iterator[int]:
    """Numbers of batches in ever new order."""
    generator = np.random.default_rng(seed)
    while batches:
        yield from generator.permutation(batches).tolist()


def _options(matrices: Mapping[str, Task]) -> dict[str, Any]:
    """The options of the loop, which all matrices of a block share."""
    common: dict[str, Any] = {}
    for task in matrices.values():
        options = complete_options("autoround", task.options, DEFAULTS)
        if options["start"] not in ("rtn", "gptq"):
            raise UsageError(f"algorithm autoround: option start is {options['start']!r}, expected rtn or gptq")
        for name, least in {"iterations": 0, "rate": 0, "batch": 1, "seed": 0}.items():
            if not least <= options[name] < np.inf:
                raise UsageError(f"algorithm autoround: option {name} is {options[name]}, expected at least {least}")
            if common.setdefault(name, options[name]) != options[name]:
                raise UsageError(
                    f"{task.place}: autoround's option {name} is {options[name]}, but {common[name]} for others of "
                    "the block; they are tuned together"
                )
    return common


ALGORITHM = Algorithm(
    "autoround",
    needs=frozenset({"second_moment"}),
    options=DEFAULTS,
    tune=tune,
    check=lambda task: _options({task.place: task}),
    option_needs={"start": {"gptq": frozenset({"hessian"})}},
)
