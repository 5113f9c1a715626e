"""QTensor: codes + parameters + grid. `decode` is the only definition of its value."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from anyquant.core.corrections import Correction
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError
from anyquant.core.grid import Codes, Grid, Params


@dataclass(frozen=True)
class QTensor:
    """A quantized matrix, or a slice of its rows.

    Invariants, checked on construction: codes have shape (rows, in // grid.vector) and the grid's code type, every
    parameter of the grid is present in its declared type and shape. `column_groups` (in,) int32 gives the group of
    each column when columns were reordered (act-order, `g_idx`); None means groups are consecutive. With it, codes are
    in logical order, and column c takes the parameters of the grid's group `column_groups[c]`; only grids whose BLOCK
    parameters all reach over the same number of columns of one row can be reordered, and every group has that many
    columns. Value = corrections(decode(codes, params)).
    """

    grid: Grid
    shape: tuple[int, int]
    codes: Codes
    params: Params
    column_groups: npt.NDArray[np.int32] | None = None
    corrections: tuple[Correction, ...] = field(default=())

    def __post_init__(self) -> None:
        rows, columns = self.shape
        self._expect("codes", self.codes, (rows, columns // self.grid.vector), self.grid.code_dtype)
        for parameter in self.grid.parameters:
            if parameter.name not in self.params:
                raise AnyQuantError(f"QTensor on {self.grid.name}: parameter {parameter.name} is missing")
            self._expect(parameter.name, self.params[parameter.name], parameter.shape(self.shape), parameter.dtype)

    def _expect(self, name: str, array: Codes, shape: tuple[int, int], dtype: str) -> None:
        if array.shape != shape or array.dtype != np.dtype(dtype):
            raise AnyQuantError(
                f"QTensor on {self.grid.name}: {name} is {array.dtype} {array.shape}, expected {dtype} {shape}"
            )

    def decode(self) -> Float32:
        """The weights, float32, shape (out, in)."""
        weights = self._decode()
        for correction in self.corrections:
            weights = correction.apply(weights)
        return weights

    def rows(self, start: int, stop: int) -> "QTensor":
        """The rows [start, stop), which begin at a block of the grid, and end at one or with the matrix."""
        params = {
            parameter.name: self.params[parameter.name][parameter.slice(start, stop - start)]
            for parameter in self.grid.parameters
        }
        corrections = tuple(correction.rows(start, stop) for correction in self.corrections)
        shape = (stop - start, self.shape[1])
        return QTensor(self.grid, shape, self.codes[start:stop], params, self.column_groups, corrections)

    def _decode(self) -> Float32:
        if self.column_groups is None:
            return self.grid.decode(self.codes, self.params)
        # columns of one group side by side, in their logical order: then groups are consecutive
        order = np.argsort(self.column_groups, kind="stable")
        weights = np.empty(self.shape, dtype=np.float32)
        weights[:, order] = self.grid.decode(np.ascontiguousarray(self.codes[:, order]), self.params)
        return weights
