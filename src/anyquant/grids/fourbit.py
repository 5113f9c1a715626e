"""Tables of sixteen levels with one float32 maximum per group: NF4 and FP4 as in bitsandbytes, "nf4-g64".

w = absmax * table[code]. NF4 are quantiles of the normal distribution (QLoRA, arXiv 2305.14314, section 3 and appendix
E), FP4 is a sign and eight magnitudes; both in bitsandbytes' order of codes. The groups of bitsandbytes run over the
flattened tensor; where the number of columns is a multiple of the group, as here, these are the same groups.

With "-double" the maxima are quantized, too: absmax = nested * map[code] + offset, with bitsandbytes' dynamic 8-bit
map, one float32 `nested` per 256 maxima and an offset, their mean. There the blocks of 256 run over the flattened
tensor and the offset is the tensor's; here both belong to a row, so that rows are independent. What can be converted
exactly: from bitsandbytes, a tensor where columns / group divides 256 or is a multiple of it (a block of maxima then
holds whole rows or lies in one); to bitsandbytes, always, as float32 maxima without double quantization, and with it
where columns / group is a multiple of 256 and all rows have the same offset.
"""

import re
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Codes, Grid, Lattice, Parameter, Params, Scope
from anyquant.grids.groups import gathered, scale_up, touched
from anyquant.grids.scales import usable_importance

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # twelfths
FP4 = tuple(sign * magnitude / 12 for sign in (1, -1) for magnitude in FP4_MAGNITUDES)
TABLES = {"nf4": NF4, "fp4": FP4}
NESTED = 256
# candidates of the search, 1 / scale in units of the largest magnitude: down to where that comes to lie on the second
# level of FP4 or below the second of NF4, and up to where it is clipped because other weights are important
LADDER = np.concatenate([np.linspace(0.5, 1.6, 26), np.geomspace(1.7, 5, 10)]).astype(np.float32)
LARGEST = np.float32(1e38)  # weights beyond saturate, so that no maximum overflows


@dataclass(frozen=True)
class TableGrid(Grid):
    """Codes are uint8 places in `table`; the parameter "absmax" is float32 (rows, in / group)."""

    table: tuple[float, ...] = field(default=NF4)

    @property
    def group(self) -> int:
        return self.block[1]

    @property
    def values(self) -> Float32:
        """The value of each code, (16,)."""
        return np.array(self.table, dtype=np.float32)

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """The maxima of least weighted error that the search finds, never worse than max |w|."""
        return {"absmax": self.searched(weights, self.lanes(weights, importance))}

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """max |w| of every group."""
        return {"absmax": largest_of(weights, self.group)}

    def lanes(self, weights: Float32, importance: Float32 | None) -> Float32:
        """Importance by place in the group, then group, repeated beyond the end of the row as the kernels read it."""
        from anyquant.grids.kernels import symmetric

        groups = weights.shape[1] // self.group
        steering = usable_importance(importance, weights.shape[1], self.group).reshape(groups, self.group)
        return np.ascontiguousarray(steering.T[:, np.arange(groups + symmetric.LANES) % groups])

    def searched(self, weights: Float32, lanes: Float32) -> Float32:
        """The best scale of each group, (rows, in / group)."""
        from anyquant.grids.kernels import table

        flat = np.clip(weights, -LARGEST, LARGEST, dtype=np.float32).reshape(-1)
        found = np.empty(flat.size // self.group, dtype=np.float32)
        table.search(flat, lanes, facts_of(self.table)[0], LADDER, found)
        return found.reshape(len(weights), -1)

    def errors(self, weights: Float32, lanes: Float32, scale: Float32) -> Float32:
        """Weighted squared error of each group under `scale` (rows, in / group), in units of the largest weight."""
        from anyquant.grids.kernels import table

        flat = np.clip(weights, -LARGEST, LARGEST, dtype=np.float32).reshape(-1)
        lost = np.empty(scale.size, dtype=np.float32)
        table.errors(flat, lanes, facts_of(self.table)[0], np.ascontiguousarray(scale).reshape(-1), lost)
        return lost.reshape(scale.shape)

    def encode(self, weights: Float32, params: Params, columns: slice | None = None) -> Codes:
        """The codes of the levels nearest to w / scale, that of 0 where the scale is 0; compiled."""
        from anyquant.grids.kernels import table

        groups, first = touched(columns, self.group)
        scale = self.scales(params, groups)
        codes = np.empty(weights.shape, dtype=np.uint8)
        whole = np.ascontiguousarray(weights, dtype=np.float32)
        table.encode(whole, scale, (first, self.group), *facts_of(self.table), codes)
        return codes

    def decode(self, codes: Codes, params: Params, columns: slice | None = None) -> Float32:
        """scale * table[code] in float32, as bitsandbytes' kernels compute it."""
        groups, first = touched(columns, self.group)
        return scale_up(gathered(self.values, codes), self.scales(params, groups), first, self.group)

    def scales(self, params: Params, groups: slice) -> Float32:
        """What the table is multiplied with in these groups, (rows, groups)."""
        return np.ascontiguousarray(params["absmax"][:, groups])

    def lattice(self, params: Params) -> Lattice:
        """The sixteen levels, of two zeros one."""
        levels, codes = np.unique(self.values, return_index=True)
        scale = self.scales(params, slice(None))
        return Lattice(levels, codes.astype(np.uint8), scale, np.zeros_like(scale), self.group, uniform=False)


@dataclass(frozen=True)
class DoubleGrid(TableGrid):
    """The parameters are "absmax", uint8 places in the dynamic map (rows, in / group), "nested", float32 (rows, groups
    / 256, rounded up), and "offset", float32 (rows, 1)."""

    def fit(self, weights: Float32, importance: Float32 | None = None, shared: Params | None = None) -> Params:
        """The searched scales, quantized; of three neighbouring 8-bit codes the best one for the weights. Rows for
        which the plain parameters are better keep those."""
        lanes = self.lanes(weights, importance)
        found = nested_of(self.searched(weights, lanes))
        best, least = found["absmax"], self.errors(weights, lanes, self.scales(found, slice(None)))
        for step in (-1, 1):
            code = np.clip(found["absmax"].astype(np.int16) + step, 0, 255).astype(np.uint8)
            lost = self.errors(weights, lanes, self.scales({**found, "absmax": code}, slice(None)))
            best, least = np.where(lost < least, code, best), np.minimum(lost, least)
        plain = self.plain(weights)
        lost = self.errors(weights, lanes, self.scales(plain, slice(None)))
        unit = np.maximum(largest_of(weights, self.group).astype(np.float64), np.finfo(np.float64).tiny)
        unit /= unit.max(axis=1, keepdims=True)
        worse = ((least - lost.astype(np.float64)) * unit**2).sum(axis=1, keepdims=True) > 0
        found = {**found, "absmax": best}
        return {name: np.where(worse, plain[name], found[name]) for name in found}

    def plain(self, weights: Float32, shared: Params | None = None) -> Params:
        """max |w| of every group, quantized: bitsandbytes' rule, row by row."""
        return nested_of(largest_of(weights, self.group))

    def scales(self, params: Params, groups: slice) -> Float32:
        first, last, _ = groups.indices(params["absmax"].shape[1])
        owners = slice(first // NESTED, -(-last // NESTED))
        scale = gathered(dynamic_map(), params["absmax"][:, first:last])
        scale_up(scale, params["nested"][:, owners], first % NESTED, NESTED)
        scale += params["offset"]
        return scale


def largest_of(weights: Float32, group: int) -> Float32:
    """max |w| of every group, (rows, in / group)."""
    magnitudes = np.abs(weights, dtype=np.float32).reshape(len(weights), -1, group)
    largest: Float32 = np.minimum(magnitudes.max(axis=2), LARGEST)
    return largest


def nested_of(absmax: Float32) -> Params:
    """Maxima (rows, groups) as 8-bit codes, one maximum per 256 and row, and an offset per row: their mean."""
    offset = absmax.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    centred = absmax - offset
    blocks = np.arange(0, absmax.shape[1], NESTED)
    nested = np.maximum.reduceat(np.abs(centred), blocks, axis=1)
    wide = np.repeat(nested, NESTED, axis=1)[:, : absmax.shape[1]]
    relative = np.divide(centred, wide, out=np.zeros_like(centred), where=wide > 0)
    table = dynamic_map()
    middles = (table[1:] + table[:-1]) / 2
    return {"absmax": np.searchsorted(middles, relative).astype(np.uint8), "nested": nested, "offset": offset}


@cache
def dynamic_map() -> Float32:
    """bitsandbytes' signed dynamic map (256,), ascending: seven decades, the k-th from below with 2^k middles of equal
    parts of [0.1, 1] times 10^(k - 6), both signs; 0 and 1 (8-bit optimizers, arXiv 2110.02861, section 1.3)."""
    positive = []
    for decade in range(7):
        parts = 2**decade
        step = float((np.float32(1) - np.float32(0.1)) / np.float32(parts))
        place = np.arange(parts + 1)
        # from either end, rounded to float32 once: what torch.linspace gives
        up, down = float(np.float32(0.1)) + step * place, 1 - step * (parts - place)
        edges = np.where(place < (parts + 1) // 2, up, down).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive += [10.0 ** (decade - 6) * float(middle) for middle in middles]
    values = np.array(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), dtype=np.float32)
    values.setflags(write=False)
    return values


@cache
def facts_of(table: tuple[float, ...]) -> tuple[Float32, npt.NDArray[np.uint8]]:
    """Levels in ascending order followed by the middles between them, (31,), and the code of each level, (16,).

    Both places of a zero have the code of the positive one.
    """
    values = np.array(table, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    levels = values[order]
    middles = (levels[1:] + levels[:-1]) / 2
    codes = np.where(levels == 0, order[levels == 0][0], order).astype(np.uint8)
    return np.concatenate([levels, middles]).astype(np.float32), codes


def make(name: str) -> TableGrid:
    """The grid "{nf4|fp4}-g{32|64|128|256}", or with "-double" at the end."""
    match = re.fullmatch(r"(nf4|fp4)-g(32|64|128|256)(-double)?", name)
    if match is None:
        raise UsageError(f"unknown 4-bit grid {name!r}; expected nf4 or fp4 and -g32 to -g256, such as nf4-g64-double")
    group, kind = int(match[2]), DoubleGrid if match[3] else TableGrid
    parameters: tuple[Parameter, ...] = (Parameter("absmax", "float32", 32, Scope.BLOCK, group),)
    if kind is DoubleGrid:
        parameters = (
            Parameter("absmax", "uint8", 8, Scope.BLOCK, group),
            Parameter("nested", "float32", 32, Scope.BLOCK, group * NESTED),
            Parameter("offset", "float32", 32, Scope.ROW),
        )
    return kind(name, "fourbit", (1, group), "uint8", 4, parameters, table=TABLES[match[1]])
