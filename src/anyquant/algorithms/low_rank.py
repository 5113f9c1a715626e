"""The best low-rank pair beside quantized weights, stored in half precision.

Of all L R of rank r, the one that minimises tr((E - L R) H (E - L R)^T) is U U^T E, where U are the r leading
eigenvectors of E H E^T (Eckart-Young for E S with H = S S^T, and S cancels in R): no inverse of H is formed, so H may
be singular.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anyquant.algorithms.base import Task
from anyquant.core.corrections import LowRank
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.extras import require
from anyquant.core.options import complete_options
from anyquant.core.qtensor import QTensor

DEFAULTS = {"rank": 32}
LARGEST = float(np.finfo(np.float16).max)


def checked_rank(name: str, task: Task) -> int:
    """The option `rank`. Raises UsageError for another option, or when a matrix of this shape has no such rank."""
    rank: int = complete_options(name, task.options, DEFAULTS)["rank"]
    rows, columns = task.shape
    if not 1 <= rank <= min(rows, columns):
        raise UsageError(
            f"{task.place}: {name} with rank {rank}, but a {rows} x {columns} matrix takes 1 to {min(rows, columns)}"
        )
    return rank


def corrected(task: Task, quantized: QTensor, rank: int, root: npt.NDArray[np.float64] | None) -> QTensor:
    """`quantized` with the pair of `rank` that best makes up for its error; `root` (in, in) is S of H = S S^T, or None
    for the identity.
    """
    torch = require("torch")
    error = torch.from_numpy(task.weights.astype(np.float64) - quantized.decode())
    directions = _directions(torch, error, rank, None if root is None else torch.from_numpy(root))
    pair = _stored(torch, error, directions)
    return replace(quantized, corrections=(*quantized.corrections, pair))


def _directions(torch: Any, error: Any, rank: int, root: Any) -> Any:
    """The leading left singular vectors (rows, rank) of error @ root, from the smaller of its two Gram matrices."""
    weighted = error if root is None else error @ root
    rows, columns = weighted.shape
    if rows <= columns:
        return torch.linalg.eigh(weighted @ weighted.T)[1][:, -rank:].flip(1)
    right = torch.linalg.eigh(weighted.T @ weighted)[1][:, -rank:].flip(1)
    # where singular values are 0, columns of the product are, too: Q is orthonormal all the same
    return torch.linalg.qr(weighted @ right)[0]


def _stored(torch: Any, error: Any, left: Any) -> LowRank:
    """float16 factors of like magnitude; the right one is the best for the left one as it was rounded."""
    right = left.T @ error
    reach = right.abs().amax(dim=1).div(left.abs().amax(dim=0)).sqrt()
    reach = torch.where(reach > 0, reach, torch.ones_like(reach))
    rounded = _half(left * reach)
    wide = torch.from_numpy(rounded.astype(np.float64))
    right = torch.linalg.lstsq(wide, error, driver="gelsd").solution
    return LowRank(rounded, _half(right))


def _half(matrix: Any) -> npt.NDArray[np.float16]:
    values: Float32 = matrix.clamp(-LARGEST, LARGEST).numpy().astype(np.float16)
    return np.ascontiguousarray(values)
