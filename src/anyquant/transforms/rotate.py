"""Rotation, folded into the weights: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406).

R1 rotates the residual stream: RMSNorm without a gain commutes with it, so every matrix that writes the stream gets R
from the left and every one that reads it R^T from the right. R2 rotates each head between values and attention output.
Outliers of single channels are spread over all of them. What needs an operation while the model runs (R3, R4) is not
here: the model keeps its standard architecture.
"""

from collections.abc import Mapping
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UsageError
from anyquant.core.linear import Role
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.transforms import fold
from anyquant.transforms.base import Transform
from anyquant.transforms.checkpoint import RewrittenCheckpoint
from anyquant.transforms.operations import Operation, random_rotation
from anyquant.transforms.rewrites import Axis, Place, Rewrite, Rewrites, chain, gather, on_input, on_output, on_vector
from anyquant.transforms.sites import value_site
from anyquant.transforms.structure import HIDDEN_READERS, HIDDEN_WRITERS, biases, refuses_norms

DEFAULTS = {"r1": True, "r2": True, "seed": 0, "kind": "hadamard"}
KINDS = ("hadamard", "random")


def prepare(architecture: Architecture, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Rewrites:
    """Options: `r1`, `r2`; `seed`; `kind` "hadamard" (with random signs) or "random" (any orthogonal matrix).

    R1 folds the norms first. A tied head is stored on its own then, unless the gain of the final norm is 1.
    """
    if options["kind"] not in KINDS:
        raise UsageError(f"transform rotate: option kind is {options['kind']!r}; known: {', '.join(KINDS)}")
    steps = []
    if options["r1"]:
        steps.append(fold.prepare(architecture, checkpoint, {"untie": True}))
        folded = RewrittenCheckpoint(checkpoint, steps[0])
        hidden = architecture.dimensions.hidden
        rotation = random_rotation(hidden, hidden, options["seed"], options["kind"])
        steps.append(rotate_stream(detect(folded), folded, rotation))
    if options["r2"]:
        steps.append(_rotate_values(architecture, options["seed"], options["kind"]))
    return chain(steps)


def rotate_stream(architecture: Architecture, checkpoint: Checkpoint, rotation: Operation) -> Rewrites:
    """R1: the residual stream x becomes `rotation` x. The norms of `checkpoint` must have gain 1."""
    places: list[Place] = []
    for linear in architecture.linears:
        if linear.role in HIDDEN_READERS or linear.role is Role.HEAD:
            places.append(on_input(linear, rotation.dual))
        elif linear.role in HIDDEN_WRITERS:
            places.append(on_output(linear, rotation))
            places += [on_vector(bias, rotation) for bias in biases(architecture, [linear])]
        elif linear.role is Role.EMBEDDING:
            # its rows are themselves vectors of the stream
            places.append((linear.view.tensor, Rewrite(rotation, Axis.COLUMNS, 0, linear.view.rows)))
    if fold.HEAD_TENSOR in architecture.unused:
        # a tied head stored once more must stay equal to the embedding
        rows = checkpoint.spec(fold.HEAD_TENSOR).rows
        places.append((fold.HEAD_TENSOR, Rewrite(rotation, Axis.COLUMNS, 0, rows)))
    note = f"residual stream rotated: {rotation.kind}, {rotation.size} channels"
    return Rewrites(gather(places), notes=(note,))


def _rotate_values(architecture: Architecture, seed: int, kind: str) -> Rewrites:
    """R2: the same rotation for every head of a block, another one for each block."""
    steps, size = [], architecture.dimensions.head_dim
    for block in range(architecture.dimensions.blocks):
        site = value_site(architecture, block)
        rotation = random_rotation(site.channels, size, seed + 1 + block, kind)
        rewrites = site.rewrite(rotation)
        steps.append(Rewrites(rewrites.tensors))
    note = f"values rotated: {rotation.kind}, heads of {size}"
    return chain([*steps, Rewrites(notes=(note,))])


def refuses(architecture: Architecture, options: Mapping[str, Any]) -> str | None:
    """R1 needs norms that commute with a rotation; R2 alone is offered where they do not."""
    if not options["r1"] and not options["r2"]:
        return "neither r1 nor r2 is asked for"
    reason = refuses_norms(architecture) if options["r1"] else None
    if reason is None:
        return None
    return f"the residual stream cannot be rotated (r1): {reason}; values alone can: set r1 = false"


TRANSFORM = Transform("rotate", refuses, DEFAULTS, prepare=prepare)
