"""What other packers made of drawn codes: tests/golden/packed.npz, recorded by tools/record_packed.py."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.core.qtensor import QTensor
from anyquant.formats.folder.modules import Stored
from anyquant.grids import grid as find_grid

GOLDEN = Path(__file__).parent.parent / "golden" / "packed.npz"
NAME = re.compile(r"(.+)-(int(\d)-(?:g\d+|channel)(-asym)?)(-order)?(-from\d+)?")


@dataclass(frozen=True)
class Packed:
    """One case. `tensors`: the packer's own. `weight` (out, in): what its kernel multiplies with in float16."""

    name: str
    packer: str
    bits: int
    asymmetric: bool
    ordered: bool
    grid: str
    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[np.uint8]
    tensors: Mapping[str, npt.NDArray[Any]]
    weight: npt.NDArray[np.float16] | None

    def rows(self) -> QTensor:
        """The drawn codes on their grid."""
        order = self.tensors["g_idx"] if self.ordered else None
        if self.asymmetric:
            params = {"scale": self.scale, "zero": self.zero}
            return QTensor(find_grid(self.grid), self.codes.shape, self.codes, params, order)
        codes = (self.codes.astype(np.int16) - (1 << (self.bits - 1))).astype(np.int8)
        return QTensor(find_grid(self.grid), self.codes.shape, codes, {"scale": self.scale}, order)

    def raw(self, stored: Sequence[Stored]) -> list[npt.NDArray[np.uint8]]:
        """The bytes of its tensors in the order of a layout."""
        return [np.ascontiguousarray(self.tensors[one.suffix]).reshape(-1).view(np.uint8) for one in stored]


@cache
def _golden() -> dict[str, dict[str, npt.NDArray[Any]]]:
    found: dict[str, dict[str, npt.NDArray[Any]]] = {}
    with np.load(GOLDEN) as arrays:
        for key in arrays.files:
            case, name = key.rsplit("/", 1)
            found.setdefault(case, {})[name] = arrays[key]
    return found


def packed_cases(*packers: str) -> list[Packed]:
    """The cases of these packers."""
    cases = []
    for name, arrays in _golden().items():
        match = NAME.fullmatch(name)
        assert match is not None, name
        if match[1] not in packers:
            continue
        tensors = {key: arrays[key] for key in ("qweight", "qzeros", "scales", "g_idx")}
        drawn = (arrays["codes"], arrays["scale"], arrays["zero"])
        ordered, weight = match[5] is not None, arrays.get("weight")
        cases.append(
            Packed(name, match[1], int(match[3]), match[4] is not None, ordered, match[2], *drawn, tensors, weight)
        )
    assert {case.packer for case in cases} == set(packers)
    return cases
