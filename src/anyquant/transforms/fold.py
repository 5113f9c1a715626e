"""Norm folding: the gain of an RMSNorm goes into the matrices that read it, and becomes 1.

W (g * x) = (W diag(g)) x. Alone it changes little; a rotation of the residual stream needs it (SliceGPT, arXiv
2401.15024, section 3).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.linear import Carried
from anyquant.models.architecture import Architecture
from anyquant.models.families import EMBEDDING, HEAD
from anyquant.transforms.base import Transform
from anyquant.transforms.operations import Replace, Scale
from anyquant.transforms.rewrites import Axis, Place, Rewrite, Rewrites, gather, on_input, on_vector
from anyquant.transforms.structure import NORM_READERS, norm_readers, refuses_norms

DEFAULTS = {"untie": False}
EMBEDDING_TENSOR, HEAD_TENSOR = f"{EMBEDDING}.weight", f"{HEAD}.weight"


def prepare(architecture: Architecture, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Rewrites:
    """Fold every norm before a matrix; norms of queries and keys stay.

    Option `untie`: where the head is the embedding, store it on its own and fold the final norm into it, which costs
    the bytes of one more such matrix; else that norm stays.
    """
    places: list[Place] = []
    untied: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    for norm in architecture.carried:
        if norm.role not in NORM_READERS:
            continue
        gain = read_tensor(checkpoint, norm.tensor)[norm.start : norm.start + norm.length]
        if (gain == 1).all():
            continue
        operation = Scale(gain)
        if norm.role == "output_norm" and architecture.tied:
            if not options["untie"]:
                kept = ("output_norm stays: the head is the embedding, which the gain must not enter",)
                continue
            size = checkpoint.spec(EMBEDDING_TENSOR).elements
            untied = (f"the head is stored apart from the embedding: {size} more weights",)
            rows = checkpoint.spec(EMBEDDING_TENSOR).rows
            places.append((HEAD_TENSOR, Rewrite(operation, Axis.COLUMNS, 0, rows)))
        places += [on_input(reader, operation) for reader in norm_readers(architecture, norm)]
        places.append(_ones(norm))
    if untied:
        return Rewrites(gather(places), {HEAD_TENSOR: EMBEDDING_TENSOR}, {"tie_word_embeddings": False}, notes=untied)
    return Rewrites(gather(places), notes=kept)


def _ones(norm: Carried) -> Place:
    return on_vector(norm, Replace(np.ones(norm.length, dtype=np.float32)))


def refuses(architecture: Architecture, options: Mapping[str, Any]) -> str | None:
    reason = refuses_norms(architecture)
    return None if reason is None else f"norms cannot be folded: {reason}"


TRANSFORM = Transform("fold_norms", refuses, DEFAULTS, prepare=prepare)
