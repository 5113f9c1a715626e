"""How a weight on a grid lies in the tensors of an MLX module: codes in 32-bit words, scales, and biases.

The codes of a row are one stream of bits, the lowest first. Modes (mlx 0.32, mlx/ops.cpp, `mx.quantize`):

    affine   q * scale + bias, groups of 32, 64 or 128; scales and biases are floats
    mxfp4    e2m1 * 2^(scale - 127), groups of 32; scales are bytes, there are no biases
    mxfp8    e4m3 * 2^(scale - 127), groups of 32
    nvfp4    e2m1 * e4m3(scale), groups of 16; mlx-lm stores no scale of the whole tensor for a Linear

`mx.dequantize` and mlx-lm are the oracles of the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyquant.core.dtypes import Bytes, Float32
from anyquant.core.errors import UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.integers import middle_of, parse, signed, unsigned
from anyquant.formats.folder.modules import FLOATS, OWN, Stored, refuse_reordered
from anyquant.formats.folder.packing import pack_bits, unpack_bits
from anyquant.grids import grid as find_grid
from anyquant.grids.affine import GROUPS, WIDTHS
from anyquant.grids.affine import PATTERN as AFFINE

# grid -> mode, bits, group
SMALL_FLOATS = {
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp8_e4m3": ("mxfp8", 8, 32),
    "nvfp4-bare": ("nvfp4", 4, 16),
}
BARE = {"nvfp4": "nvfp4-bare"}
HELD = "affineN-gG, intN-gG and intN-gG-asym (N 2, 3, 4, 5, 6, 8; G 32, 64, 128), mxfp4, mxfp8_e4m3, nvfp4"


@dataclass(frozen=True)
class MlxLayout:
    """What the modes have in common."""

    grid: str
    mode: str
    bits: int
    group: int
    quantized: bool = True
    row_multiple: int = 1

    def settings(self) -> dict[str, Any]:
        """The entry of config.json."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def _words(self, rows: int, columns: int) -> Stored:
        return Stored("weight", "U32", (rows, columns * self.bits // 32))


@dataclass(frozen=True)
class AffineLayout(MlxLayout):
    """Any affine parameters."""

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        return _affine(self._words(rows, columns), (rows, columns // self.group), OWN)

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        refuse_reordered(rows, "mlx")
        return [pack_bits(rows.codes, self.bits), _raw(rows.params["scale"]), _raw(rows.params["bias"])]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        codes = unpack_bits(raw[0].reshape(rows, -1), self.bits, shape[1])
        scale, bias = (_values(one, rows) for one in raw[1:])
        return QTensor(find_grid(self.grid), (rows, shape[1]), codes, {"scale": scale, "bias": bias})


@dataclass(frozen=True)
class IntegerLayout(MlxLayout):
    """scale * (level - zero) as q * scale - zero * scale.

    Symmetric: the code of zero is 2^(bits - 1), so that the bias is as exact as the scale. Asymmetric: the bias has up
    to eight bits more than the scale, too many for 16-bit types; both are float32 then, which holds every bias, and
    MLX computes with such a module in float32.
    """

    asymmetric: bool = False

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        groups = rows, columns // self.group
        return _affine(self._words(rows, columns), groups, "F32" if self.asymmetric else OWN)

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for scales of more bits than the grid's own search gives them."""
        refuse_reordered(rows, "mlx")
        scale = rows.params["scale"]
        zero = rows.params["zero"].astype(np.float32) if self.asymmetric else np.float32(middle_of(self.bits))
        bias = -(scale * zero)
        if not np.array_equal(bias.astype(np.float64), -(scale.astype(np.float64) * zero)):
            raise UnsupportedError(f"{self.grid}: a product of scale and zero-point is not a float32 number")
        return [pack_bits(unsigned(rows.codes, self.bits), self.bits), _raw(scale), _raw(bias)]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        codes = unpack_bits(raw[0].reshape(rows, -1), self.bits, shape[1])
        scale, bias = (_values(one, rows) for one in raw[1:])
        params = {"scale": scale}
        if self.asymmetric:
            zero = np.divide(-bias, scale, out=np.zeros_like(scale), where=scale != 0)
            params["zero"] = np.rint(zero).astype(np.uint8)
        ours = codes if self.asymmetric else signed(codes, self.bits)
        return QTensor(find_grid(self.grid), (rows, shape[1]), ours, params)


@dataclass(frozen=True)
class SmallFloatLayout(MlxLayout):
    """Small floats with scales of one byte."""

    def tensors(self, rows: int, columns: int) -> Sequence[Stored]:
        return [self._words(rows, columns), Stored("scales", "U8", (rows, columns // self.group))]

    def pack(self, rows: QTensor, shape: tuple[int, int]) -> Sequence[Bytes]:
        """Raises UnsupportedError for NVFP4 with a scale of the whole tensor."""
        refuse_reordered(rows, "mlx")
        whole = rows.params.get("global_scale")
        if whole is not None and (whole != 1).any():
            raise UnsupportedError(
                f"{rows.grid.name} with a global scale of {float(whole.flat[0]):g}: MLX stores none; quantize for this "
                "target (nvfp4-bare), or choose mxfp4"
            )
        return [pack_bits(rows.codes, self.bits), np.ascontiguousarray(rows.params["scale"])]

    def unpack(self, raw: Sequence[Bytes], rows: int, shape: tuple[int, int]) -> QTensor:
        codes = unpack_bits(raw[0].reshape(rows, -1), self.bits, shape[1])
        return QTensor(find_grid(self.grid), (rows, shape[1]), codes, {"scale": raw[1].reshape(rows, -1)})


Kind = AffineLayout | IntegerLayout | SmallFloatLayout


def layout(grid_name: str) -> Kind:
    """The layout of a grid. Raises UnsupportedError for a grid that MLX cannot hold."""
    name = BARE.get(grid_name, grid_name)
    if name in SMALL_FLOATS:
        return SmallFloatLayout(name, *SMALL_FLOATS[name])
    if match := AFFINE.fullmatch(name):
        return AffineLayout(name, "affine", int(match[1]), int(match[2]))
    whole = parse(name)
    if whole is not None and whole.bits in WIDTHS and whole.group in GROUPS and not whole.half:
        return IntegerLayout(name, "affine", whole.bits, whole.group, asymmetric=whole.asymmetric)
    raise UnsupportedError(f"mlx has no place for grid {grid_name!r}; it holds: {', '.join(FLOATS)}, {HELD}")


def layout_of(mode: str, bits: int, group: int) -> Kind | None:
    """The layout of settings, or None for settings that MLX does not know."""
    if mode == "affine":
        name = f"affine{bits}-g{group}"
        return layout(name) if AFFINE.fullmatch(name) else None
    wanted = mode, bits, group
    return next((layout(name) for name, facts in SMALL_FLOATS.items() if facts == wanted), None)


def _affine(words: Stored, groups: tuple[int, int], dtype: str) -> Sequence[Stored]:
    return [words, Stored("scales", dtype, groups), Stored("biases", dtype, groups)]


def _raw(values: Float32) -> Bytes:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint8)


def _values(raw: Bytes, rows: int) -> Float32:
    found: Float32 = raw.reshape(-1).view(np.float32).reshape(rows, -1)
    return found
