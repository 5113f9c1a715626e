"""Corrections in formats that store nothing but grid values: a mask is held where masked weights decode to zero."""

from dataclasses import replace

import numpy as np

from anyquant.core.corrections import Mask
from anyquant.core.errors import UnsupportedError
from anyquant.core.plan import Decision
from anyquant.core.qtensor import QTensor


def refuse_corrections(decision: Decision, format_name: str) -> list[str]:
    """Reasons why a format without room for corrections cannot hold those of a decision; masks are tried."""
    return [
        f"{decision.linear}: {format_name} has no place for the {correction.kind} correction of {correction.step}"
        for correction in decision.corrections
        if correction.kind != "mask"
    ]


def without_masks(rows: QTensor, linear: str) -> QTensor:
    """`rows` without its masks, which must change nothing. Raises UnsupportedError for any other correction."""
    if not rows.corrections:
        return rows
    bare = replace(rows, corrections=())
    for correction in rows.corrections:
        if not isinstance(correction, Mask) or np.any(bare.decode()[~correction.keep]):
            raise UnsupportedError(
                f"{linear}: the {correction.kind} correction cannot be expressed by {rows.grid.name} alone"
            )
    return bare
