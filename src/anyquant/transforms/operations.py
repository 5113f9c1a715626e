"""Invertible operations T on the channels of an activation x, and what they do to the matrices around it.

When x becomes T x, a matrix W that makes x becomes T W (its rows change), and one that reads x becomes W T^-1: each of
its rows w becomes `T.dual` w, where dual = transposed inverse. The model computes what it did.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.progress import Progress, Silent
from anyquant.transforms.hadamard import hadamard_factors, hadamard_product

Index = npt.NDArray[np.int64]
Signs = npt.NDArray[np.int8]


class Operation(Protocol):
    """`kind` names the class in files; `size` is the number of channels. Operations are compared by identity."""

    @property
    def kind(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def mixes(self) -> bool:
        """Whether a channel depends on others: then rows of a matrix can only be changed together."""
        ...

    def apply(self, vectors: Float32) -> Float32:
        """T x for each row x of `vectors` (count, size), float32; the input is not changed."""
        ...

    def apply_down(self, matrix: Float32) -> Float32:
        """T M for `matrix` M (size, any), float32; the input is not changed."""
        ...

    def part(self, start: int, stop: int) -> "Operation":
        """The operation on channels [start, stop) alone. Raises AnyQuantError when it mixes channels."""
        ...

    @property
    def inverse(self) -> "Operation":
        """Raises AnyQuantError when there is none."""
        ...

    @property
    def dual(self) -> "Operation":
        """The transposed inverse."""
        ...

    @property
    def transposed(self) -> "Operation": ...


@dataclass(frozen=True, eq=False)
class Scale:
    """x_j becomes values_j x_j. `values` (size,) float32, finite."""

    values: Float32
    kind: str = field(default="scale", init=False)
    mixes: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not np.isfinite(self.values).all():
            raise AnyQuantError("a channel scale is not finite")

    @property
    def size(self) -> int:
        return len(self.values)

    def apply(self, vectors: Float32) -> Float32:
        scaled: Float32 = vectors * self.values
        return scaled

    def apply_down(self, matrix: Float32) -> Float32:
        scaled: Float32 = matrix * self.values[:, None]
        return scaled

    def part(self, start: int, stop: int) -> "Scale":
        return Scale(self.values[start:stop])

    @cached_property
    def inverse(self) -> "Scale":
        if not self.values.all():
            raise AnyQuantError(
                f"channel {int(np.flatnonzero(self.values == 0)[0])} is scaled by 0, which nothing undoes"
            )
        return Scale((1.0 / self.values.astype(np.float64)).astype(np.float32))

    @property
    def dual(self) -> "Scale":
        return self.inverse

    @property
    def transposed(self) -> "Scale":
        return self


@dataclass(frozen=True, eq=False)
class Replace:
    """x becomes `values`, whatever it was: the gain of a norm that was folded into the matrices behind it."""

    values: Float32
    kind: str = field(default="replace", init=False)
    mixes: bool = field(default=False, init=False)

    @property
    def size(self) -> int:
        return len(self.values)

    def apply(self, vectors: Float32) -> Float32:
        return np.broadcast_to(self.values, vectors.shape).astype(np.float32)

    def apply_down(self, matrix: Float32) -> Float32:
        return np.broadcast_to(self.values[:, None], matrix.shape).astype(np.float32)

    def part(self, start: int, stop: int) -> "Replace":
        return Replace(self.values[start:stop])

    @property
    def inverse(self) -> Operation:
        raise AnyQuantError("what was replaced cannot be restored")

    dual = transposed = inverse


@dataclass(frozen=True, eq=False)
class Permute:
    """Channel j of the result is channel `index[j]` of x. `index` (size,) int64, a permutation."""

    index: Index
    kind: str = field(default="permute", init=False)
    mixes: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not np.array_equal(np.sort(self.index), np.arange(len(self.index))):
            raise AnyQuantError("a channel permutation names a channel twice, or one that does not exist")

    @property
    def size(self) -> int:
        return len(self.index)

    def apply(self, vectors: Float32) -> Float32:
        moved: Float32 = vectors[:, self.index]
        return moved

    def apply_down(self, matrix: Float32) -> Float32:
        moved: Float32 = matrix[self.index]
        return moved

    def part(self, start: int, stop: int) -> Operation:
        raise AnyQuantError("a permutation has no parts")

    @cached_property
    def inverse(self) -> "Permute":
        return Permute(np.argsort(self.index).astype(np.int64))

    @property
    def transposed(self) -> "Permute":
        return self.inverse

    @property
    def dual(self) -> "Permute":
        return self


@dataclass(frozen=True, eq=False)
class Hadamard:
    """Each run of len(signs) channels, x, becomes H (signs * x) / sqrt(len(signs)), H of `hadamard_factors`.

    A Hadamard matrix with random signs spreads an outlier evenly (QuaRot, arXiv 2404.00456). `signs` int8, +1 or -1.
    `backward`: the transposed operation.
    """

    size: int
    signs: Signs
    backward: bool = False
    kind: str = field(default="hadamard", init=False)
    mixes: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.size % len(self.signs) or hadamard_factors(len(self.signs)) is None:
            raise AnyQuantError(f"no Hadamard rotation of {len(self.signs)} channels divides {self.size}")

    def apply(self, vectors: Float32) -> Float32:
        return self._turn(vectors, 1)

    def apply_down(self, matrix: Float32) -> Float32:
        return self._turn(matrix, matrix.shape[1])

    def _turn(self, values: Float32, width: int) -> Float32:
        """Turn runs of consecutive vectors of `width` values each; with width 1, of single values."""
        order = len(self.signs)
        factors = hadamard_factors(order) or ()
        signs = (self.signs.astype(np.float32) / np.float32(math.sqrt(order)))[:, None]
        runs = np.ascontiguousarray(values).reshape(-1, order, width)
        if self.backward:
            mixed = hadamard_product(runs, tuple(factor.T for factor in factors)) * signs
        else:
            mixed = hadamard_product(runs * signs, factors)
        result: Float32 = mixed.reshape(values.shape)
        return result

    def part(self, start: int, stop: int) -> Operation:
        raise AnyQuantError("a rotation has no parts")

    @cached_property
    def inverse(self) -> "Hadamard":
        return Hadamard(self.size, self.signs, not self.backward)

    @property
    def transposed(self) -> "Hadamard":
        return self.inverse

    @property
    def dual(self) -> "Hadamard":
        return self


class Awaited:
    """A matrix (order, order) that `find` computes when it is first asked for, once: planning needs its order alone.

    `work`: how far `find` advances its progress.
    """

    def __init__(self, order: int, find: Callable[[Progress], Float32], work: float = 0.0) -> None:
        self.shape = (order, order)
        self.work = work
        self._find = find
        self._lock = Lock()
        self._found: Float32 | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def get(self, progress: Progress) -> Float32:
        """Safe to call from threads: the others wait for the first."""
        with self._lock:
            if self._found is None:
                self._found = self._find(progress)
            return self._found


@dataclass(frozen=True, eq=False)
class Rotate:
    """Each run of len(source) channels, x, becomes matrix @ x; `source` is the matrix, orthogonal, float32, or gives it
    later.
    """

    size: int
    source: Float32 | Awaited
    kind: str = field(default="rotate", init=False)
    mixes: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        order = len(self.source)
        if self.source.shape != (order, order) or self.size % order:
            raise AnyQuantError(f"a rotation of shape {self.source.shape} does not divide {self.size} channels")

    @property
    def matrix(self) -> Float32:
        """It is found now where it was not before."""
        return self.found(Silent())

    def found(self, progress: Progress) -> Float32:
        """The matrix; where it must be found first, `progress` hears of it."""
        return self.source.get(progress) if isinstance(self.source, Awaited) else self.source

    def apply(self, vectors: Float32) -> Float32:
        order = len(self.source)
        mixed: Float32 = np.ascontiguousarray(vectors).reshape(-1, order) @ self.matrix.T
        return mixed.reshape(vectors.shape)

    def apply_down(self, matrix: Float32) -> Float32:
        runs = np.ascontiguousarray(matrix).reshape(-1, len(self.source), matrix.shape[1])
        mixed: Float32 = np.matmul(self.matrix, runs)
        return mixed.reshape(matrix.shape)

    def part(self, start: int, stop: int) -> Operation:
        raise AnyQuantError("a rotation has no parts")

    @cached_property
    def inverse(self) -> "Rotate":
        if isinstance(self.source, Awaited):
            return Rotate(self.size, Awaited(len(self.source), lambda p: np.ascontiguousarray(self.found(p).T)))
        return Rotate(self.size, np.ascontiguousarray(self.source.T))

    @property
    def transposed(self) -> "Rotate":
        return self.inverse

    @property
    def dual(self) -> "Rotate":
        return self


def random_rotation(size: int, order: int, seed: int, kind: str = "hadamard") -> Operation:
    """A rotation of each run of `order` channels, drawn from `seed`.

    "hadamard" with random signs, or where no such matrix is known, as with "random", a random orthogonal matrix,
    uniform over all (QR of a Gaussian one, its signs fixed).
    """
    rng = np.random.default_rng([seed, order])
    if kind == "hadamard" and hadamard_factors(order) is not None:
        return Hadamard(size, (2 * rng.integers(0, 2, order) - 1).astype(np.int8))
    q, r = np.linalg.qr(rng.standard_normal((order, order)))
    return Rotate(size, (q * np.sign(np.diag(r))).astype(np.float32))


def repeat_heads(operation: Operation, head_dim: int, repeats: int) -> Operation:
    """The operation on query heads that belongs to one on key-value heads, of which each serves `repeats` in a row.

    Raises AnyQuantError for a permutation that moves channels from one head to another.
    """
    if repeats == 1:
        return operation
    if isinstance(operation, Scale):
        return Scale(np.repeat(operation.values.reshape(-1, head_dim), repeats, axis=0).reshape(-1))
    if isinstance(operation, Permute):
        heads = operation.index.reshape(-1, head_dim)
        within = heads - head_dim * np.arange(len(heads))[:, None]
        if within.min() < 0 or within.max() >= head_dim:
            raise AnyQuantError("a permutation moves channels from one head to another")
        wide = np.repeat(within, repeats, axis=0)
        return Permute((wide + head_dim * np.arange(len(wide))[:, None]).reshape(-1))
    if isinstance(operation, Hadamard) and head_dim % len(operation.signs) == 0:
        return Hadamard(operation.size * repeats, operation.signs, operation.backward)
    if isinstance(operation, Rotate) and head_dim % len(operation.source) == 0:
        return Rotate(operation.size * repeats, operation.source)
    raise AnyQuantError(f"{operation.kind} of {operation.size} channels does not stay within heads of {head_dim}")


def to_arrays(operation: Operation) -> tuple[dict[str, Any], npt.NDArray[Any]]:
    """(description for JSON, the one array) of an operation; `from_arrays` undoes it."""
    if isinstance(operation, Scale | Replace):
        return {"kind": operation.kind}, operation.values
    if isinstance(operation, Permute):
        return {"kind": operation.kind}, operation.index
    if isinstance(operation, Hadamard):
        described = {"kind": operation.kind, "size": operation.size, "backward": operation.backward}
        return described, operation.signs
    if isinstance(operation, Rotate):
        return {"kind": operation.kind, "size": operation.size}, operation.matrix
    raise AnyQuantError(f"operation {operation.kind!r} cannot be stored")


def from_arrays(described: dict[str, Any], array: npt.NDArray[Any]) -> Operation:
    """The operation that `to_arrays` described. Raises AnyQuantError for an unknown kind."""
    kind = described.get("kind")
    if kind == "scale":
        return Scale(array)
    if kind == "replace":
        return Replace(array)
    if kind == "permute":
        return Permute(array)
    if kind == "hadamard":
        return Hadamard(described["size"], array, described["backward"])
    if kind == "rotate":
        return Rotate(described["size"], array)
    raise AnyQuantError(f"unknown operation {kind!r}; known: hadamard, permute, replace, rotate, scale")
