"""Running statistics of activations, and the frozen result that algorithms are handed."""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from anyquant.core.arithmetic import fast_products
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UsageError
from anyquant.core.extras import require
from anyquant.core.linear import Linear, Role

T = TypeVar("T")
NEEDS = frozenset({"absolute_maximum", "mean", "second_moment", "hessian", "cross", "residual"})
SLICE = 256  # tokens converted to float64 at once
TILE = 1024  # rows of a matrix mirrored at once
PANEL = 256  # rows of a symmetric product computed at once


@dataclass(frozen=True)
class Moments:
    """What is known of the vectors x (in,) that enter a matrix, over `count` tokens; all arrays float32.

    Count 0 marks an expert that no token was routed to: its statistics are assumed, not seen (1, or `average`).
    `second_moment` (in,): mean x^2. The others are None unless an algorithm needs them:
    `absolute_maximum` (in,): max |x|. `mean` (in,). `hessian` (in, in): mean of x x^T, the Hessian of half the mean
    squared output error. `cross` (in, in): mean of f x^T, where f is what would enter had nothing been quantized.
    `residual` (out, in): mean of (r_f - r_x) x^T, for a matrix whose output is added to a stream r, which would be r_f
    had nothing been quantized.
    """

    second_moment: Float32
    count: int
    absolute_maximum: Float32 | None = None
    mean: Float32 | None = None
    hessian: Float32 | None = None
    cross: Float32 | None = None
    residual: Float32 | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, remembered under `key`: matrices with one input share what is derived from it (a Cholesky)."""
        if key not in self._memo:
            self._memo[key] = compute()
        found: T = self._memo[key]
        return found


class Running:
    """Running sums over the vectors x (in,) that enter a matrix, for the statistics named in `needs` (see Moments).

    The second moment is always summed, in float64; products of whole batches in float32, their sum too. `place` names
    the activation in error messages. `stream`: the width of the stream that "residual" is about. Memory: 4 in^2 bytes
    for each of "hessian" and "cross", 4 in out for "residual".
    """

    def __init__(self, columns: int, place: str, needs: frozenset[str] = frozenset(), stream: int = 0) -> None:
        unknown = needs - NEEDS
        if unknown:
            raise AnyQuantError(f"{place}: unknown statistics {sorted(unknown)}; known: {sorted(NEEDS)}")
        self._torch = require("torch")
        self.place = place
        self.needs = needs
        self.count = 0
        self.squares = self._torch.zeros(columns, dtype=self._torch.float64)
        self._largest, self._sums = (self._zeros(columns, need) for need in ("absolute_maximum", "mean"))
        self._hessian, self._cross = (self._zeros((columns, columns), need) for need in ("hessian", "cross"))
        self._residual = self._zeros((stream, columns), "residual") if stream else None
        self.streams = self._residual is not None
        if self._sums is not None:
            self._sums = self._sums.double()

    def add(self, activations: Any, unquantized: Any = None, stream: Any = None) -> None:
        """Account for `activations`, torch float32 (tokens, in).

        `unquantized`, of the same shape, is what would enter had nothing been quantized: "cross" needs it. `stream`
        (tokens, out) is r_f - r_x for "residual". Raises BadInputError when an activation is not finite.
        """
        for start in range(0, len(activations), SLICE):
            part = activations[start : start + SLICE].double()
            if self._sums is not None:
                self._sums += part.sum(dim=0)
            self.squares += part.square().sum(dim=0)
        self.count += len(activations)
        finite = self._torch.isfinite(self.squares)
        if not finite.all():
            raise BadInputError(
                f"{self.place}: activation of channel {int((~finite).nonzero()[0])} is not finite; "
                "the model's weights are damaged, or it does not run in float32"
            )
        if self._largest is not None and len(activations):
            self._torch.maximum(self._largest, activations.abs().amax(dim=0), out=self._largest)
        if self._cross is not None and (unquantized is None or unquantized.shape != activations.shape):
            raise AnyQuantError(f"{self.place}: cross statistics need the unquantized activations beside these")
        with fast_products():
            if self._hessian is not None:
                _add_square(self._hessian, activations)
            for total, other in ((self._cross, unquantized), (self._residual, stream)):
                if total is not None:
                    total.addmm_(other.T, activations)

    def result(self) -> Moments:
        """The means so far; the sums are given away with them. Raises UsageError when no token has been seen."""
        if not self.count:
            raise UsageError(f"{self.place}: no tokens to calibrate with; give a longer text")
        for product in (self._hessian, self._cross, self._residual):
            if product is not None and not self._torch.isfinite(product.div_(self.count).sum()):
                raise BadInputError(f"{self.place}: activations are so large that their products leave float32")
        if self._hessian is not None:
            _symmetrise(self._hessian)
        largest, mean, hessian, cross, residual = (
            None if array is None else array.float().numpy()
            for array in (
                self._largest,
                None if self._sums is None else self._sums / self.count,
                self._hessian,
                self._cross,
                self._residual,
            )
        )
        self._hessian = self._cross = self._residual = None
        second = (self.squares / self.count).float().numpy()
        return Moments(second, self.count, largest, mean, hessian, cross, residual)

    def _zeros(self, shape: Any, need: str) -> Any:
        return self._torch.zeros(shape) if need in self.needs else None


def _add_square(total: Any, rows: Any) -> None:
    """total += rows^T rows, in and below the diagonal tiles only: a third less work."""
    for start in range(0, len(total), PANEL):
        stop = start + PANEL
        total[start:stop, :stop].addmm_(rows[:, start:stop].T, rows[:, :stop])


def _symmetrise(matrix: Any) -> None:
    """Copy the lower triangle of a square torch matrix over the upper one, tile by tile."""
    for start in range(0, len(matrix), TILE):
        stop = start + TILE
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)


def average(moments: Sequence[Moments]) -> Moments:
    """What is assumed of an input that no token reached: the mean over its `moments` of others, with count 0.

    All have the same arrays. The absolute maximum is the largest of theirs.
    """

    def mean(arrays: Sequence[Float32 | None]) -> Float32 | None:
        total: Float32 | None = None
        for array in arrays:
            if array is None:
                return None
            total = array.copy() if total is None else np.add(total, array, out=total)
        return None if total is None else total / np.float32(len(arrays))

    second = mean([moment.second_moment for moment in moments])
    if second is None:
        raise AnyQuantError("no moments to average")
    ranges = [moment.absolute_maximum for moment in moments if moment.absolute_maximum is not None]
    return Moments(
        second,
        0,
        np.max(ranges, axis=0) if ranges else None,
        mean([moment.mean for moment in moments]),
        mean([moment.hessian for moment in moments]),
        mean([moment.cross for moment in moments]),
    )


def assumed(columns: int, needs: frozenset[str]) -> Moments:
    """What is assumed of an input of which nothing is known, with count 0: independent channels of mean square 1."""
    one, unit = np.ones(columns, dtype=np.float32), np.eye(columns, dtype=np.float32)
    return Moments(
        one,
        0,
        one if "absolute_maximum" in needs else None,
        np.zeros_like(one) if "mean" in needs else None,
        unit if "hessian" in needs else None,
        unit if "cross" in needs else None,
    )


@dataclass(frozen=True)
class Statistics:
    """`moments` by input group; statistics read from a file that keeps one entry per tensor are by Linear name.

    `missing` names the Linears that such a file says nothing about; they are rounded without importance.
    """

    moments: Mapping[str, Moments]
    missing: tuple[str, ...] = ()

    def moment(self, linear: Linear) -> Moments | None:
        """What is known about the input of `linear`.

        None for an embedding that is only looked up, as its rows meet no activation, and for a `missing` Linear.
        Raises BadInputError when there is no entry for the Linear or its length is wrong.
        """
        found = self.moments.get(linear.name) or self.moments.get(linear.input_group)
        if found is None:
            if linear.role is Role.EMBEDDING or linear.name in self.missing:
                return None
            raise BadInputError(f"no statistics for {linear.name} (input {linear.input_group}); calibrate again")
        if found.second_moment.shape != (linear.shape[1],):
            raise BadInputError(
                f"statistics of {linear.name} have {found.second_moment.size} channels, "
                f"the matrix has {linear.shape[1]}"
            )
        return found

    def importance(self, linear: Linear) -> Float32 | None:
        """Mean square of each input channel, float32 (in,), or None; see `moment`."""
        found = self.moment(linear)
        return None if found is None else found.second_moment

    def digest(self) -> str:
        """sha256 over names, counts and values: equal statistics have equal digests."""
        total = hashlib.sha256()
        for name in sorted(self.moments):
            moment = self.moments[name]
            values = np.ascontiguousarray(moment.second_moment, dtype="<f4")
            total.update(f"{len(name)}:{name}:{moment.count}:{values.size}:".encode())
            total.update(values.tobytes())
            for need in ("absolute_maximum", "mean", "hessian", "cross"):
                array = getattr(moment, need)
                if array is not None:
                    total.update(f"{need}:".encode())
                    total.update(np.ascontiguousarray(array, dtype="<f4").data)
        return total.hexdigest()
