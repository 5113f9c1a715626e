"""Running statistics of activations, and the frozen result that algorithms are handed."""

import hashlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.linear import Linear, Role

T = TypeVar("T")
SLICE = 256  # tokens converted to float64 at once


@dataclass(frozen=True)
class Moments:
    """What is known of the vectors x (in,) that enter a matrix, over `count` tokens; all arrays float32.

    `second_moment` (in,): mean x^2; 1 where count is 0. The others are None unless an algorithm needs them:
    `absolute_maximum` (in,): max |x|. `mean` (in,). `hessian` (in, in): mean of x x^T, the Hessian of half the mean
    squared output error. `cross` (in, in): mean of f x^T, where f is what would enter had nothing been quantized.
    """

    second_moment: Float32
    count: int
    absolute_maximum: Float32 | None = None
    mean: Float32 | None = None
    hessian: Float32 | None = None
    cross: Float32 | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, remembered under `key`: matrices with one input share what is derived from it (a Cholesky)."""
        if key not in self._memo:
            self._memo[key] = compute()
        found: T = self._memo[key]
        return found


class SecondMoments:
    """The running sum of squares of one activation, in float64. `place` names the activation in error messages."""

    def __init__(self, columns: int, place: str) -> None:
        self.place = place
        self.count = 0
        self.sums: npt.NDArray[np.float64] = np.zeros(columns)

    def add(self, activations: Float32) -> None:
        """Account for `activations` (tokens, in). Raises BadInputError when one of them is not finite."""
        for start in range(0, len(activations), SLICE):
            part = activations[start : start + SLICE].astype(np.float64)
            self.sums += np.square(part, out=part).sum(axis=0)
        self.count += len(activations)
        if not np.isfinite(self.sums).all():
            channel = int(np.flatnonzero(~np.isfinite(self.sums))[0])
            raise BadInputError(
                f"{self.place}: activation of channel {channel} is not finite; "
                "the model's weights are damaged, or it does not run in float32"
            )

    def result(self) -> Moments:
        """The mean so far. Raises UsageError when no token has been seen."""
        if not self.count:
            raise UsageError(f"{self.place}: no tokens to calibrate with; give a longer text")
        return Moments((self.sums / self.count).astype(np.float32), self.count)


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
        return total.hexdigest()
