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
    value costs in the artifact. A BLOCK parameter is shared by `rows` x `columns` weights, where the last block of a
    matrix may be smaller. A ROW or TENSOR parameter has `values` values (a codebook), else one. Its array has shape
    (ceil(out / rows), ceil(in / columns)) for BLOCK, (out, values) for ROW, (1, values) for TENSOR.
    """

    name: str
    dtype: str
    bits: int
    scope: Scope
    columns: int = 0
    rows: int = 1
    values: int = 1

    def shape(self, matrix: tuple[int, int]) -> tuple[int, int]:
        """Shape of its array for a matrix of shape (out, in)."""
        if self.scope is Scope.TENSOR:
            return 1, self.values
        if self.scope is Scope.ROW:
            return matrix[0], self.values
        return -(-matrix[0] // self.rows), -(-matrix[1] // self.columns)

    def slice(self, first: int, rows: int) -> slice:
        """Rows of its array that belong to the rows [first, first + rows) of the matrix."""
        if self.scope is Scope.TENSOR:
            return slice(0, 1)
        return slice(first // self.rows, -(-(first + rows) // self.rows))


@dataclass(frozen=True)
class Lattice:
    """The values that a scalar grid can take under frozen parameters.

    Value of code `codes[i]` at (row, column): scale[row, column // width] * levels[i] + shift[row, column // width],
    up to float rounding (`Grid.decode` alone says it exactly). `levels` (n,) ascending float32, or (rows, n) where each
    row has its own; `codes` (n,) in the grid's code type; `scale` and `shift` float32 (rows, ceil(in / width)), scale
    may be negative or 0. Of two codes with one value one is listed. `uniform`: the levels are consecutive integers.
    """

    levels: Float32
    codes: Codes
    scale: Float32
    shift: Float32
    width: int
    uniform: bool


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
        total = shape[0] * (shape[1] // self.vector) * self.code_bits
        for parameter in self.parameters:
            high, wide = parameter.shape(shape)
            total += high * wide * parameter.bits
        return total

    def prepare(self, absolute_maximum: float, tie_group: tuple[float, ...] = ()) -> Params:
        """Tensor-wide parameters from the largest |weight| of the tensor and of those that must share them."""
        return {}

    @property
    def tensor_wide(self) -> bool:
        """Whether some parameter reaches over the whole tensor: then `shared` is needed to quantize rows apart."""
        return any(parameter.scope is Scope.TENSOR for parameter in self.parameters)

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """Parameters that just cover the range of `weights`, without a search: what runtimes do with activations."""
        return self.fit(weights, None, shared)

    def lattice(self, params: Params) -> Lattice | None:
        """The values that each weight can take under `params`; None for grids that are not scalar (`vector` > 1)."""
        return None

    def hold(self, levels: npt.NDArray[np.int32], scale: Float32, shift: Float32) -> tuple[Params, Codes] | None:
        """Parameters and codes of the values scale * level + shift, without choosing levels anew.

        `levels` (rows, in); `scale`, which may be negative, and `shift` (rows, groups of neighbouring columns). What is
        stored is rounded to the types of the parameters. None where the grid has no place for these levels or groups.
        """
        return None

    def quantize(
        self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None
    ) -> tuple[Params, Codes]:
        """The fast joint search: parameters and codes of `weights` (rows, in), finite.

        `importance` (in,), non-negative, is the mean squared activation of each input channel, or None. Rows are
        independent: quantizing a slice of rows gives the slice of the result. This one is the nearest codes under the
        parameters of `fit`; grids that search for both together say so.
        """
        params = self.fit(weights, importance, shared)
        return params, self.encode(weights, params)

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
        """The weight of each squared error in the objective that `quantize` minimises, shape of `weights`; not to be
        written to: equal weights are one number seen everywhere."""
        if importance is None:
            return np.broadcast_to(np.float32(1), weights.shape)
        return np.broadcast_to(importance.astype(np.float32), weights.shape)
