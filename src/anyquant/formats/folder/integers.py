"""Weights as plain 8-bit integers beside their scales: what ModelOpt and Quark folders have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.errors import BadInputError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.extra import Extra
from anyquant.formats.folder.modules import Along, Stored
from anyquant.grids import grid as find_grid


@dataclass(frozen=True)
class Int8Layout:
    """Symmetric integers with one scale per row or for the matrix ("int8-channel", "int8-tensor"): `weight` I8 (out,
    in), `weight_scale` F32 (out,) or ()."""

    grid: str = "int8-channel"
    extras: tuple[Extra, ...] = ()
    quantized: bool = True
    row_multiple: int = 1

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        whole = self.grid == "int8-tensor"
        return [
            Stored("weight", "I8", (rows, columns)),
            Stored("weight_scale", "F32", () if whole else (rows,), Along.ONCE if whole else Along.ROWS),
            *(extra.stored(rows, columns) for extra in self.extras),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        scale = np.ascontiguousarray(rows.params["scale"], dtype="<f4").reshape(-1).view(np.uint8)
        return [np.ascontiguousarray(rows.codes).view(np.uint8), scale, *(extra.bytes(shape) for extra in self.extras)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        """Raises BadInputError for a scale that is no number."""
        codes = raw[0].view(np.int8).reshape(rows, shape[1])
        scale = finite_scales(raw[1], 1 if self.grid == "int8-tensor" else rows)
        return QTensor(find_grid(self.grid), codes.shape, codes, {"scale": scale})


def finite_scales(raw: Bytes, rows: int) -> Float32:
    """Scales (rows, groups) from float32 bytes. Raises BadInputError for one that is no number."""
    scale: Float32 = raw.view("<f4").reshape(rows, -1)
    if not np.isfinite(scale).all():
        raise BadInputError("weight_scale holds a value that is not finite")
    return scale
