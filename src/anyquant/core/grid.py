"""Grid: the set of values that a weight may take, and the functions that search it.

A grid is frozen facts (block, parameters, exact bits) and five functions. Algorithms see a grid only through them;
formats see only codes, parameters and facts. Parameters are always the *stored* values (6-bit scales, fp16 d).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UnsupportedError

Codes = npt.NDArray[Any]
Params = Mapping[str, npt.NDArray[Any]]


class Scope(StrEnum):
    """How far one parameter value reaches."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"


@dataclass(frozen=True)
class Parameter:
    """One stored parameter of a grid.

    `dtype` is the numpy type of the array in memory (float16 d, uint8 holding a 6-bit scale ...), `bits` what one
    value costs in the artifact, `columns` how many weights of a row share one value (0: the whole row or tensor).
    Its array has shape (rows, in // columns) for BLOCK, (rows, 1) for ROW, (1, 1) for TENSOR.
    """

    name: str
    dtype: str
    bits: int
    scope: Scope
    columns: int = 0


@dataclass(frozen=True)
class Grid(ABC):
    """`block` is (rows, columns) of weights that are stored together; `vector` the weights per code.

    `family` names the layout file a format keeps for it. `code_dtype` is the numpy type of the unpacked codes, which
    have shape (rows, in // vector), logical order; `code_bits` is what one code costs in the artifact.
    """

    name: str
    family: str
    block: tuple[int, int]
    code_dtype: str
    code_bits: int
    parameters: tuple[Parameter, ...] = ()
    vector: int = 1

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape cannot lie on the grid, or None."""
        if shape[1] % self.block[1] or shape[0] % self.block[0]:
            return f"shape {shape[0]} x {shape[1]} is not a multiple of the {self.block[0]} x {self.block[1]} block"
        return None

    def bits(self, shape: tuple[int, int]) -> int:
        """Exact bits of codes and parameters for a matrix of shape (out, in). Raises UnsupportedError."""
        reason = self.refuses(shape)
        if reason is not None:
            raise UnsupportedError(f"{self.name}: {reason}")
        rows, columns = shape
        total = rows * (columns // self.vector) * self.code_bits
        for parameter in self.parameters:
            if parameter.scope is Scope.TENSOR:
                total += parameter.bits
            elif parameter.scope is Scope.ROW:
                total += rows * parameter.bits
            else:
                total += rows * (columns // parameter.columns) * parameter.bits
        return total

    def prepare(self, absolute_maximum: float, tie_group: tuple[float, ...] = ()) -> Params:
        """Tensor-wide parameters from the largest |weight| of the tensor and of those that must share them."""
        return {}

    @abstractmethod
    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        """The fast joint search: parameters and codes of `weights` (rows, in), finite.

        `importance` (in,), non-negative, is the mean squared activation of each input channel, or None. Rows are
        independent: quantizing a slice of rows gives the slice of the result.
        """

    @abstractmethod
    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """Parameters only, for algorithms that choose the codes themselves."""

    @abstractmethod
    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """Nearest codes under frozen `params`. `weights` covers `columns` (multiples of `vector`) of the rows."""

    @abstractmethod
    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """The values that the codes stand for, float32, exactly as the format's own reader computes them."""

    def weighting(self, weights: Float32, importance: Float32 | None = None) -> Float32:
        """The weight of each squared error in the objective that `quantize` minimises, shape of `weights`."""
        if importance is None:
            return np.ones_like(weights)
        return np.broadcast_to(importance.astype(np.float32), weights.shape)
