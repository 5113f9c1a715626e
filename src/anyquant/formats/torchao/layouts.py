"""How torchao stores a weight on integers: a byte for each, with a scale and a zero-point per group or row.

Source: torchao 0.18, quantization/quantize_/workflows (Int8Tensor, IntxUnpackedToInt8Tensor) and
prototype/safetensors/safetensors_support.py (flatten_tensor_state_dict); torchao itself is the oracle of the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.dtypes import Bytes, from_float32_exactly, to_float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.integers import IntegerGridName, parse, signed, unsigned
from anyquant.formats.folder.modules import FLOATS, Stored, refuse_reordered
from anyquant.grids import grid as find_grid

ROW, INTX = "Int8Tensor", "IntxUnpackedToInt8Tensor"
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class ByteLayout:
    """weight = (qdata - zero_point) * scale; of an asymmetric grid both are lower by the middle level than ours.

    `kind` is torchao's class: Int8Tensor has float32 scales whatever the type of the model, the other one the `dtype`
    of the weights that it stands for. `scale` is the type in which the scales are stored.
    """

    name: IntegerGridName
    dtype: str
    kind: str
    scale: str
    quantized: bool = True
    row_multiple: int = 1

    @property
    def grid(self) -> str:
        return self.name.grid

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        groups = (rows, self.name.groups(columns))
        return [
            Stored("_weight_qdata", "I8", (rows, columns)),
            Stored("_weight_scale", self.scale, groups),
            Stored("_weight_zero_point", "I8", groups),
        ]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for scales that the stored type does not hold."""
        refuse_reordered(rows, "torchao")
        scale = rows.params["scale"]
        stored, lost = from_float32_exactly(scale, self.scale)
        if lost.any():
            raise UnsupportedError(
                f"a scale of the grid is not a number of the model's type {self.scale}, in which torchao stores it"
            )
        if not self.name.asymmetric:
            return [np.ascontiguousarray(rows.codes).view(np.uint8), stored, np.zeros(scale.shape, dtype=np.uint8)]
        codes, zero = (signed(values, self.name.bits) for values in (rows.codes, rows.params["zero"]))
        return [codes.view(np.uint8), stored, zero.view(np.uint8)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        codes, zero = raw[0].view(np.int8).reshape(rows, -1), raw[2].view(np.int8).reshape(rows, -1)
        scale = to_float32(raw[1], self.scale).reshape(rows, -1)
        bits, middle = self.name.bits, self.name.middle
        if codes.size and not -middle <= int(codes.min()) <= int(codes.max()) < middle:
            raise BadInputError(f"_weight_qdata holds integers that {bits} bits do not")
        grid = find_grid(self.grid)
        if not self.name.asymmetric:
            if zero.any():
                raise BadInputError("_weight_zero_point is not 0, though the settings call the weights symmetric")
            return QTensor(grid, codes.shape, codes, {"scale": scale})
        if zero.size and not -middle <= int(zero.min()) <= int(zero.max()) < middle:
            raise BadInputError(f"_weight_zero_point lies beyond the levels of {bits} bits")
        ours, zeros = (unsigned(values, bits) for values in (codes, zero))
        return QTensor(grid, codes.shape, ours, {"scale": scale, "zero": zeros})

    def facts(self, columns: int) -> dict[str, Any]:
        """The entry of the module's weight in the metadata of the file."""
        dtype = {"_type": "torch.dtype", "_data": TORCH_NAMES[self.dtype]}
        size = [1, self.name.group or columns]
        if self.kind == ROW:
            data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": size, "dtype": dtype}
        else:
            target = {"_type": "torch.dtype", "_data": f"int{self.name.bits}"}
            data = {"target_dtype": target, "block_size": size, "dtype": dtype, "activation_quantization": None}
        return {"_type": self.kind, "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]}


def layout(name: str) -> ByteLayout:
    """The layout of a grid in a model whose type stands behind it, "int4-g64:bf16".

    Raises UnsupportedError for a grid that the format cannot hold.
    """
    grid, _, kept = name.partition(":")
    found, dtype = parse(grid), FLOATS.get(kept or "f32")
    if found is None or dtype is None:
        raise UnsupportedError(
            f"torchao has no place for grid {grid!r}; it holds: {', '.join(FLOATS)} and int2 to int8 "
            "(-gN or -channel, each with -asym and -f16)"
        )
    row = found.bits == 8 and found.reach == "channel" and not found.asymmetric
    kind, scale = (ROW, "F32") if row else (INTX, dtype)
    return ByteLayout(found, dtype, kind, scale)
