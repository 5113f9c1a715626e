"""What an algorithm is: a pure function that chooses, for each weight, a value of the grid.

Three kinds besides it: a pruner chooses which weights stay, a corrector adds something to what was quantized, a tuner
works on the matrices of a whole block at once. A chain such as "wanda -> gptq -> eora" has at most one of each kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anyquant.calibrate.stats import Moments
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid, Params
from anyquant.core.plan import EMPTY
from anyquant.core.qtensor import QTensor


@dataclass(frozen=True)
class Task:
    """One matrix, or a slice of its rows, and where it shall go.

    `weights` (rows, in) float32, finite. `stats` are the statistics of its input, None where there are none. `options`
    are those of the algorithm. `shared` are the grid's tensor-wide parameters (`Grid.prepare`). `keep` (rows, in) bool
    says which weights may differ from zero, None: all. `place` names the matrix in error messages. `output_hessian`
    (rows, rows), or its diagonal blocks (blocks, size, size), is the second moment of the gradient of the model's
    log-likelihood at the output, as `calibrate.gradients` has it; None where it is not known.
    """

    weights: Float32
    grid: Grid
    stats: Moments | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    shared: Params | None = None
    keep: npt.NDArray[np.bool_] | None = None
    place: str = "the matrix"
    output_hessian: Float32 | None = None

    @property
    def importance(self) -> Float32 | None:
        """(in,) mean squared activation of each input channel, or None."""
        return None if self.stats is None else self.stats.second_moment

    @property
    def shape(self) -> tuple[int, int]:
        return self.weights.shape[0], self.weights.shape[1]


class TunedBlock(Protocol):
    """A block of the model while a tuner works on it: what enters it, what should leave it, and its module.

    `module` is the torch module with float weights. `matrices` are the tasks by Linear name. Batches are numbered.
    """

    @property
    def module(self) -> Any: ...

    @property
    def matrices(self) -> Mapping[str, Task]: ...

    @property
    def batches(self) -> int: ...

    def call(self, batch: int, weights: Mapping[str, Any]) -> Any:
        """Output states of the block, a torch tensor (documents, length, hidden), when the Linears named in `weights`
        have these weights (out, in), torch tensors that gradients flow to. Inputs come through the quantized blocks."""
        ...

    def target(self, batch: int) -> Any:
        """The output states that the float model has there."""
        ...

    def worked(self, share: float) -> None:
        """So much (0 to 1) of the work on this block has been done since the last call, for whoever watches.

        What is not reported counts as done when the tuner returns.
        """
        ...


@dataclass(frozen=True)
class Algorithm:
    """`needs` names the statistics it must have ("second_moment", "hessian", "cross", "absolute_maximum", "mean";
    "output" is `Task.output_hessian`), `uses` those it takes where there are any. `options` are its defaults, whose
    types are binding.

    Exactly one of the functions is set. `quantize` makes a QTensor; where `rows_apart`, quantizing a slice of rows
    gives the slice of the result and no statistics beyond the second moment are needed, so that rows may be handled one
    block at a time. `prune` returns `keep` (rows, in); `correct` returns the QTensor with a further correction (the
    task has the original weights); `tune` quantizes all matrices of a block. `finisher` is the quantizing algorithm
    that a pruner is followed by unless another one is named. `option_needs` names the statistics that single values of
    an option need besides: option -> value -> statistics. `notes` says what of a task did not go as usual. `check`
    raises UsageError or UnsupportedError for what options, grid and shape alone rule out; planning calls it, with a
    task whose weights are all 0 and that has no statistics.
    """

    name: str
    needs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=lambda: EMPTY)
    rows_apart: bool = False
    quantize: Callable[[Task], QTensor] | None = None
    prune: Callable[[Task], npt.NDArray[np.bool_]] | None = None
    correct: Callable[[Task, QTensor], QTensor] | None = None
    tune: Callable[[TunedBlock], Mapping[str, QTensor]] | None = None
    finisher: str = "rtn"
    notes: Callable[[Task], tuple[str, ...]] | None = None
    check: Callable[[Task], object] | None = None
    option_needs: Mapping[str, Mapping[Any, frozenset[str]]] = field(default_factory=lambda: EMPTY)

    def needed(self, options: Mapping[str, Any]) -> frozenset[str]:
        """The statistics that it needs under these options."""
        further = (by_value.get(options.get(name), frozenset()) for name, by_value in self.option_needs.items())
        return self.needs.union(*further)
