"""A gpt-oss folder as a Checkpoint with the tensor names of the float model.

    NAME_blocks  U8 (experts, out, in / 32, 16)    two E2M1 codes a byte, the even column in the low half
    NAME_scales  U8 (experts, out, in / 32)        biased exponents of two
    NAME         F32 (experts, in, out)            what the model multiplies with: matrices transposed

Source: transformers 5.17, integrations/mxfp4.py (convert_moe_packed_tensors), by which the tests judge it. The format
describes nothing but these parameters of one model type, so there is no writer of it for other models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.packing import unpack_bits
from anyquant.formats.folder.stored import StoredFolder
from anyquant.grids import grid as find_grid

METHOD = "mxfp4"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP, PACKED, NAN = 32, 16, 255


@dataclass(frozen=True, eq=False)
class ExpertsFolder(StoredFolder):
    """Stacked experts are float32, all else as stored."""

    _last: dict[tuple[str, int], Float32] = field(default_factory=dict)  # the matrix decoded last

    @cached_property
    def experts(self) -> Mapping[str, tuple[int, int, int]]:
        """Name of a stack to (experts, out, in). Raises BadInputError for tensors that are missing or misshapen."""
        names, found = frozenset(self.stored.names()), {}
        for name in self.stored.names():
            base, _, kind = name.rpartition("_")
            if kind not in ("blocks", "scales"):
                continue
            for other in (base + BLOCKS, base + SCALES):
                if other not in names:
                    raise BadInputError(f"{self.location}: {name} is without {other}; neither can be decoded alone")
            blocks, scales = self.stored.spec(base + BLOCKS), self.stored.spec(base + SCALES)
            fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, PACKED)
            if not fits or (blocks.dtype, scales.dtype) != ("U8", "U8"):
                raise BadInputError(
                    f"{self.location}: {base + BLOCKS} is {blocks.dtype} {list(blocks.shape)} beside scales of "
                    f"{scales.dtype} {list(scales.shape)}; expected U8 (experts, out, in / 32, 16) and (experts, out, "
                    "in / 32)"
                )
            found[base] = (blocks.shape[0], blocks.shape[1], blocks.shape[2] * GROUP)
        return found

    def names(self) -> Sequence[str]:
        packed = {base + kind for base in self.experts for kind in (BLOCKS, SCALES)}
        return [*self.experts, *(name for name in self.stored.names() if name not in packed)]

    def spec(self, name: str) -> TensorSpec:
        if name not in self.experts:
            return self.stored.spec(name)
        experts, rows, columns = self.experts[name]
        return TensorSpec(name, "F32", (experts, columns, rows), 4 * experts * rows * columns)

    def matrix(self, name: str, expert: int) -> QTensor:
        """One expert's matrix (out, in) on the grid mxfp4. Raises BadInputError for a scale that is NaN."""
        _, rows, columns = self.experts[name]
        groups = columns // GROUP
        packed = np.empty(rows * groups * PACKED, dtype=np.uint8)
        scale = np.empty(rows * groups, dtype=np.uint8)
        # a row of a tensor is one vector of its last axis
        self.stored.read_into(name + BLOCKS, expert * rows * groups, (expert + 1) * rows * groups, packed)
        self.stored.read_into(name + SCALES, expert * rows, (expert + 1) * rows, scale)
        if np.any(scale == NAN):
            raise BadInputError(f"{self.location}: {name}{SCALES} of expert {expert} holds a scale that is no number")
        codes = unpack_bits(packed.reshape(rows, -1), 4, columns)
        return QTensor(find_grid("mxfp4"), (rows, columns), codes, {"scale": scale.reshape(rows, groups)})

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        """See core.checkpoint.Checkpoint. A row is an input channel of an expert: its whole matrix is decoded."""
        if name not in self.experts:
            self.stored.read_into(name, start, stop, buffer)
            return
        experts, rows, columns = self.experts[name]
        if not 0 <= start <= stop <= experts * columns or buffer.nbytes != (stop - start) * rows * 4:
            raise AnyQuantError(f"{name}: rows [{start}, {stop}) do not fit the tensor or the buffer")
        values = buffer.reshape(-1).view(np.float32).reshape(stop - start, rows)
        for expert in range(start // columns, -(-stop // columns)):
            low, high = max(start, expert * columns), min(stop, (expert + 1) * columns)
            decoded = self._decoded(name, expert)
            values[low - start : high - start] = decoded[:, low - expert * columns : high - expert * columns].T

    def _decoded(self, name: str, expert: int) -> Float32:
        if (name, expert) not in self._last:
            self._last.clear()
            self._last[name, expert] = self.matrix(name, expert).decode()
        return self._last[name, expert]


def read(stored: Checkpoint) -> ExpertsFolder:
    """A folder under `quant_method: mxfp4` as the model that it stands for. Raises UnsupportedError for another."""
    settings = stored.config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") != METHOD:
        raise UnsupportedError(f"{stored.location}: quantization_config is not {METHOD}")
    return ExpertsFolder(stored)
