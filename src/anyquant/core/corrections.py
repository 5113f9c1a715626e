"""Corrections: what is added to decoded weights, or masked out of them.

A correction belongs to some rows of a matrix, like the QTensor that carries it; `rows` gives that of fewer rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError


class Correction(Protocol):
    """`kind` names the class in files, `arrays` holds all of its data."""

    @property
    def kind(self) -> str: ...

    def apply(self, weights: Float32) -> Float32:
        """The corrected weights (rows, in); the input is not changed."""
        ...

    def rows(self, start: int, stop: int) -> "Correction":
        """The correction of these rows."""
        ...

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """What is stored. The first axis counts rows of the matrix, unless the name ends in "_shared"."""
        ...


@dataclass(frozen=True)
class Mask:
    """Weights that are zero. `keep` (rows, in) bool, True where the weight stays."""

    keep: npt.NDArray[np.bool_]
    kind: str = "mask"

    def apply(self, weights: Float32) -> Float32:
        """Zero where `keep` is False."""
        return np.where(self.keep, weights, np.float32(0))

    def rows(self, start: int, stop: int) -> "Mask":
        return Mask(self.keep[start:stop])

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """The mask, eight columns to a byte, first column in the highest bit (numpy.packbits)."""
        return {"mask": np.packbits(self.keep, axis=1)}


@dataclass(frozen=True)
class LowRank:
    """left @ right is added. `left` (rows, rank), `right` (rank, in), both float16."""

    left: npt.NDArray[np.float16]
    right: npt.NDArray[np.float16]
    kind: str = "low_rank"

    def apply(self, weights: Float32) -> Float32:
        """The product is formed in float32."""
        added: Float32 = weights + self.left.astype(np.float32) @ self.right.astype(np.float32)
        return added

    def rows(self, start: int, stop: int) -> "LowRank":
        return LowRank(self.left[start:stop], self.right)

    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        return {"left": self.left, "right_shared": self.right}


@dataclass(frozen=True)
class CorrectionSpec:
    """What a plan says of a correction: its `kind`, and the `rank` of a low-rank pair. `step` is what makes it."""

    kind: str
    rank: int = 0
    step: str = ""

    def arrays(self, matrix: tuple[int, int]) -> dict[str, tuple[str, tuple[int, int]]]:
        """Name to (numpy type, shape) of the arrays of a matrix of shape (out, in). Raises AnyQuantError."""
        rows, columns = matrix
        if self.kind == "mask":
            return {"mask": ("uint8", (rows, -(-columns // 8)))}
        if self.kind == "low_rank":
            return {"left": ("float16", (rows, self.rank)), "right_shared": ("float16", (self.rank, columns))}
        raise AnyQuantError(f"unknown correction {self.kind!r}; known: low_rank, mask")

    def bits(self, matrix: tuple[int, int]) -> int:
        """What it costs when stored."""
        return sum(8 * np.dtype(dtype).itemsize * high * wide for dtype, (high, wide) in self.arrays(matrix).values())


def spec_of(correction: Correction) -> CorrectionSpec:
    """The spec that a correction fits."""
    return CorrectionSpec(correction.kind, correction.right.shape[0] if isinstance(correction, LowRank) else 0)


def make_correction(kind: str, arrays: Mapping[str, npt.NDArray[Any]], columns: int) -> Correction:
    """The correction that `arrays` came from, of a matrix with `columns`. Raises AnyQuantError for an unknown kind."""
    if kind == "mask":
        return Mask(np.unpackbits(arrays["mask"], axis=1, count=columns).astype(np.bool_))
    if kind == "low_rank":
        return LowRank(arrays["left"], arrays["right_shared"])
    raise AnyQuantError(f"unknown correction {kind!r}; known: low_rank, mask")
