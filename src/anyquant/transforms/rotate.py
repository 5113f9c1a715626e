"""Rotation, folded into the weights: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406).

R1 rotates the residual stream: RMSNorm without a gain commutes with it, so every matrix that writes the stream gets R
from the left and every one that reads it R^T from the right. R2 rotates each head between values and attention output.
Outliers of single channels are spread over all of them. Both are drawn, or learned from there on (`learn`). What needs
an operation while the model runs (R3, R4) is not here: the model keeps its standard architecture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from anyquant.core.checkpoint import Checkpoint, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.grid import Grid
from anyquant.core.linear import Linear, Role
from anyquant.core.progress import Progress
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.transforms import fold
from anyquant.transforms.base import Transform
from anyquant.transforms.checkpoint import RewrittenCheckpoint
from anyquant.transforms.learn import Problem, Turned, learn
from anyquant.transforms.operations import Awaited, Operation, Rotate, random_rotation
from anyquant.transforms.rewrites import Axis, Place, Rewrite, Rewrites, chain, gather, on_input, on_output, on_vector
from anyquant.transforms.sites import value_site
from anyquant.transforms.structure import HIDDEN_READERS, HIDDEN_WRITERS, biases, refuses_norms

DEFAULTS = {"r1": True, "r2": True, "seed": 0, "kind": "hadamard", "grid": "auto", "steps": 300}
KINDS = ("hadamard", "random", "learned")
STREAM_RATE, VALUE_RATE = 0.05, 0.1  # what did best on integers of 3 bits and NVFP4
PROXY = "int4-g128"  # what rotations are learned for when no grid is named


def prepare(architecture: Architecture, checkpoint: Checkpoint, options: Mapping[str, Any]) -> Rewrites:
    """Options: `r1`, `r2`; `seed`; `kind` "hadamard" (with random signs), "random" (any orthogonal one) or "learned":
    from the Hadamard one on, in `steps` steps, on the error of rounding to `grid`. That is done when a tensor is first
    read, or `settle` is called.

    R1 folds the norms first. A tied head is stored on its own then, unless the gain of the final norm is 1.
    """
    learned, seed = options["kind"] == "learned", options["seed"]
    kind = "hadamard" if learned else options["kind"]
    steps: list[Rewrites] = []
    values = _rotate_values(architecture, seed, kind) if options["r2"] else []
    if options["r1"]:
        steps.append(fold.prepare(architecture, checkpoint, {"untie": True}))
        folded = RewrittenCheckpoint(checkpoint, steps[0])
        hidden = architecture.dimensions.hidden
        rotation = random_rotation(hidden, hidden, seed, kind)
        if learned:
            turned = _stream_matrices(architecture, RewrittenCheckpoint(folded, chain(values)))
            rotation = _learned_stream(_problem(rotation, turned, options, 0))
        steps.append(rotate_stream(detect(folded), folded, rotation))
        checkpoint = RewrittenCheckpoint(folded, steps[1])
    if options["r2"]:
        steps += _learned_values(architecture, checkpoint, options) if learned else values
        note = f"values rotated: {options['kind']}, heads of {architecture.dimensions.head_dim}"
        steps.append(Rewrites(notes=(note,)))
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


def _rotate_values(architecture: Architecture, seed: int, kind: str) -> list[Rewrites]:
    """R2: the same rotation for every head of a block, another one for each block."""
    steps, size = [], architecture.dimensions.head_dim
    for block in range(architecture.dimensions.blocks):
        site = value_site(architecture, block)
        rewrites = site.rewrite(random_rotation(site.channels, size, seed + 1 + block, kind))
        steps.append(Rewrites(rewrites.tensors))
    return steps


def _learned_values(architecture: Architecture, checkpoint: Checkpoint, options: Mapping[str, Any]) -> list[Rewrites]:
    """R2, learned for the matrices that R1 leaves."""
    steps, size = [], architecture.dimensions.head_dim
    for block in range(architecture.dimensions.blocks):
        site = value_site(architecture, block)
        start = random_rotation(size, size, options["seed"] + 1 + block)
        matrices = [(linear, True) for linear in site.makers] + [(linear, False) for linear in site.readers]
        outline = _problem(start, [_turned(*one, checkpoint) for one in matrices], options, 1 + block)

        def find(progress: Progress, outline: Problem = outline, block: int = block) -> Float32:
            progress.place(f"values of block {block + 1}")
            # read once: rows that R1 mixes can only be had together
            return learn(replace(outline, turned=[_in_memory(one) for one in outline.turned]), progress).matrix

        rotation = Rotate(site.channels, Awaited(size, find, outline.steps * outline.weights))
        steps.append(Rewrites(site.rewrite(rotation).tensors))
    return steps


def _learned_stream(problem: Problem) -> Rotate:
    """R1, learned."""

    def find(progress: Progress) -> Float32:
        progress.place("residual stream")
        found = learn(problem, progress)
        progress.say(f"residual stream: rotated, {found.ratio:.3f} of the error of rounding to {problem.grid.name}")
        return found.matrix

    return Rotate(problem.order, Awaited(problem.order, find, problem.steps * problem.weights))


def _problem(start: Operation, turned: Sequence[Turned], options: Mapping[str, Any], index: int) -> Problem:
    """What is to be learned, of the matrices that can lie on the grid. `index` tells it from others of the seed."""
    grid = _proxy(options["grid"])
    fit = [one for one in turned if grid.refuses(one.linear.shape) is None]
    return Problem(start, fit, grid, options["steps"], VALUE_RATE if index else STREAM_RATE, (options["seed"], index))


def _stream_matrices(architecture: Architecture, checkpoint: Checkpoint) -> list[Turned]:
    """The matrices of the blocks that read or write the residual stream. Routers are left out: they stay in float."""
    blocks = [linear for linear in architecture.linears if linear.block is not None and linear.role is not Role.ROUTER]
    stream = HIDDEN_READERS | HIDDEN_WRITERS
    return [_turned(one, one.role in HIDDEN_WRITERS, checkpoint) for one in blocks if one.role in stream]


def _turned(linear: Linear, writes: bool, checkpoint: Checkpoint) -> Turned:
    return Turned(linear, writes, lambda start, stop: read_view(checkpoint, linear.view, start, stop))


def _in_memory(turned: Turned) -> Turned:
    whole = turned.rows(0, turned.linear.shape[0])
    return replace(turned, rows=lambda start, stop: whole[start:stop])


def _proxy(name: str) -> Grid:
    """The grid that a rotation is learned for. Raises UsageError for one on which nothing is rounded."""
    found = find_grid(PROXY if name == "auto" else name)
    if found.family == "floating":
        raise UsageError(f"transform rotate: option grid is {name!r}, a float type; name a grid such as {PROXY}")
    return found


def refuses(architecture: Architecture, options: Mapping[str, Any]) -> str | None:
    """R1 needs norms that commute with a rotation; R2 alone is offered where they do not."""
    if options["kind"] not in KINDS:
        raise UsageError(f"transform rotate: option kind is {options['kind']!r}; known: {', '.join(KINDS)}")
    if options["steps"] < 1:
        raise UsageError(f"transform rotate: option steps is {options['steps']}, expected at least 1")
    if options["seed"] < 0:
        raise UsageError(f"transform rotate: option seed is {options['seed']}, expected at least 0")
    _proxy(options["grid"])
    for name in ("grid", "steps"):
        if options["kind"] != "learned" and options[name] != DEFAULTS[name]:
            raise UsageError(f"transform rotate: option {name} is for kind = 'learned', kind is {options['kind']!r}")
    if not options["r1"] and not options["r2"]:
        return "neither r1 nor r2 is asked for"
    reason = refuses_norms(architecture) if options["r1"] else None
    if reason is None:
        return None
    return f"the residual stream cannot be rotated (r1): {reason}; values alone can: set r1 = false"


TRANSFORM = Transform("rotate", refuses, DEFAULTS, prepare=prepare)
