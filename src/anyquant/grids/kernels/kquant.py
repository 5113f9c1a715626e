"""The fast twin of grids/kquant_reference.py: arrays in, stored parameters and codes out.

Numba caches each kernel on disk by the file it is written in. After changing kquant_chunk.py, which the others inline,
delete `__pycache__` (or touch them): Numba does not see the change.
"""

import numpy as np
import numpy.typing as npt

from anyquant.core.dtypes import Float32
from anyquant.grids.kernels import kquant_affine, kquant_symmetric
from anyquant.grids.kquant_search import SUPER, Layout

NO_IMPORTANCE = np.ones(1, dtype=np.float32)


def quantize(
    layout: Layout, weights: Float32, importance: Float32 | None
) -> tuple[dict[str, npt.NDArray[np.generic]], npt.NDArray[np.uint8]]:
    """Parameters and codes of `weights` (rows, in), one thread, without the interpreter lock while it works.

    `importance` comes from `relative_importance`. Rows are independent and results do not depend on how they are cut.
    """
    rows, columns = weights.shape
    effort = layout.plain_effort if importance is None else layout.important_effort
    objective = layout.plain if importance is None else layout.important
    integers = (rows, columns // layout.width)
    d = np.empty((rows, columns // SUPER), dtype=np.float32)
    codes = np.empty((rows, columns), dtype=np.uint8)
    arguments = (
        np.ascontiguousarray(weights, dtype=np.float32),
        NO_IMPORTANCE if importance is None else importance,
        objective.kind,
        np.float32(objective.search_factor),
        (layout.width, layout.highest, layout.most),
        np.asarray(effort.steps, dtype=np.float32),
        np.asarray(layout.trials, dtype=np.float32) * np.float32(layout.most),
        effort.rounds,
    )
    if layout.symmetric:
        scale = np.empty(integers, dtype=np.int8)
        kquant_symmetric.quantize(*arguments, (d, scale), codes)
        return {"d": d.astype(np.float16), "scale": scale}, codes
    minimum_d = np.empty_like(d)
    scale, minimum = np.empty(integers, dtype=np.uint8), np.empty(integers, dtype=np.uint8)
    kquant_affine.quantize(*arguments, (d, minimum_d, scale, minimum), codes)
    params = {"d": d.astype(np.float16), "dmin": minimum_d.astype(np.float16), "scale": scale, "minimum": minimum}
    return params, codes
