"""Rounding to nearest with the grid's own joint search of scales and codes, weighted by importance where there is one.

At four bits and above this is nearly all there is to gain; below, error feedback and tuning start to pay.
"""

import numpy as np

from anyquant.algorithms.base import Algorithm, Task
from anyquant.core.corrections import Mask
from anyquant.core.options import complete_options
from anyquant.core.qtensor import QTensor

DEFAULTS = {"search": True}


def quantize(task: Task) -> QTensor:
    """Rows are independent, so slices of rows may be quantized on their own.

    Option `search`: find the scales that lose least; without it they just cover the range of the weights. Raises
    UsageError for another option, UnsupportedError when the shape cannot lie on the grid.
    """
    options = complete_options("rtn", task.options, DEFAULTS)
    task.grid.bits(task.shape)
    weights = task.weights if task.keep is None else np.where(task.keep, task.weights, np.float32(0))
    if options["search"]:
        params, codes = task.grid.quantize(weights, task.importance, task.shared)
    else:
        params = task.grid.plain(weights, task.shared)
        codes = task.grid.encode(weights, params)
    corrections = () if task.keep is None else (Mask(task.keep),)
    return QTensor(task.grid, task.shape, codes, params, corrections=corrections)


ALGORITHM = Algorithm("rtn", uses=frozenset({"second_moment"}), options=DEFAULTS, rows_apart=True, quantize=quantize)
