"""Byte layouts of GGUF tensors, one file per grid family: how codes and parameters of a row lie on disk.

Source: the block structures of ggml (ggml-common.h). `gguf` itself is only the oracle of the tests.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from anyquant.core.dtypes import Bytes
from anyquant.core.errors import UnsupportedError
from anyquant.core.grid import Codes, Params

MODULES = {
    "floating": "anyquant.formats.gguf.layouts.floating",
    "legacy": "anyquant.formats.gguf.layouts.legacy",
    "kquant": "anyquant.formats.gguf.layouts.kquant",
    "iquant": "anyquant.formats.gguf.layouts.iquant",
}

# grid -> (ggml type, family of its layout)
TYPES = {
    "f32": ("F32", "floating"),
    "f16": ("F16", "floating"),
    "bf16": ("BF16", "floating"),
    "q8_0": ("Q8_0", "legacy"),
    "q4_0": ("Q4_0", "legacy"),
    "q4_1": ("Q4_1", "legacy"),
    "q5_0": ("Q5_0", "legacy"),
    "q5_1": ("Q5_1", "legacy"),
    "q2_k": ("Q2_K", "kquant"),
    "q3_k": ("Q3_K", "kquant"),
    "q4_k": ("Q4_K", "kquant"),
    "q5_k": ("Q5_K", "kquant"),
    "q6_k": ("Q6_K", "kquant"),
    "iq4_nl": ("IQ4_NL", "iquant"),
    "iq4_xs": ("IQ4_XS", "iquant"),
    "iq3_s": ("IQ3_S", "iquant"),
    "iq3_xxs": ("IQ3_XXS", "iquant"),
    "iq2_s": ("IQ2_S", "iquant"),
}


@dataclass(frozen=True)
class RowLayout:
    """How rows on a grid lie in a GGUF tensor of type `ggml_type`: `block` weights in `block_bytes` bytes.

    `pack(codes, params)` gives contiguous uint8 (rows, row_bytes); `unpack` is its exact inverse, (params, codes).
    """

    grid: str
    ggml_type: str
    block: int
    block_bytes: int
    pack: Callable[[Codes, Params], Bytes]
    unpack: Callable[[Bytes], tuple[Params, Codes]]

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row. Raises UnsupportedError when blocks do not divide it."""
        if columns % self.block:
            raise UnsupportedError(f"{self.ggml_type}: a row of {columns} weights is not a multiple of {self.block}")
        return columns // self.block * self.block_bytes


def layout(grid_name: str) -> RowLayout:
    """The layout of a grid. Raises UnsupportedError for a grid that GGUF has no tensor type for."""
    if grid_name not in TYPES:
        raise UnsupportedError(f"GGUF has no tensor type for grid {grid_name!r}; it holds: {', '.join(TYPES)}")
    _, family = TYPES[grid_name]
    found: RowLayout = importlib.import_module(MODULES[family]).LAYOUTS[grid_name]
    return found


def layout_of_type(ggml_type: str) -> RowLayout:
    """The layout of a GGUF tensor type such as "Q4_K". Raises UnsupportedError for one that no grid describes."""
    for grid_name, (known, _) in TYPES.items():
        if known == ggml_type:
            return layout(grid_name)
    known_types = ", ".join(known for known, _ in TYPES.values())
    raise UnsupportedError(f"GGUF tensor type {ggml_type!r} is not supported; supported: {known_types}")
