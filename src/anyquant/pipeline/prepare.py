"""Transforms that are known before calibration: the model as it is planned for, and the proof that it is the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import AnyQuantError, UnsupportedError
from anyquant.core.progress import Progress
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.pipeline.chain import parse_chain
from anyquant.pipeline.planner import Job, Model
from anyquant.pipeline.recipe import Recipe
from anyquant.transforms import TRANSFORMS
from anyquant.transforms.checkpoint import RewrittenCheckpoint
from anyquant.transforms.proof import LIMIT, relative_logit_difference

PROOF_TOKENS = 64


def prepare(source: Checkpoint, recipe: Recipe) -> Model:
    """The model of a recipe: `source` with the transforms that need no activations folded into its weights.

    Raises UnsupportedError, with the reason, for a transform that this architecture does not allow, and as `detect`.
    """
    checkpoint, architecture = source, detect(source)
    for step in parse_chain(recipe.chain, recipe.options).transforms:
        transform = TRANSFORMS.get(step.name)
        reason = transform.refuses(architecture, step.options)
        if reason is not None:
            raise UnsupportedError(f"{step.name}: {reason}")
        if transform.prepare is None:
            continue
        rewrites = transform.prepare(architecture, checkpoint, _completed(step.options, recipe))
        checkpoint = RewrittenCheckpoint(checkpoint, rewrites)
        architecture = detect(checkpoint)
    return Model(architecture, checkpoint, source)


def _completed(options: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any]:
    """An option `grid` left to be found is the recipe's grid, where that rounds anything."""
    if options.get("grid") != "auto" or recipe.grid is None or find_grid(recipe.grid).family == "floating":
        return options
    return {**options, "grid": recipe.grid}


def prove_static(job: Job, original: Architecture, tokens: Sequence[int], progress: Progress) -> float:
    """How far the logits of the transformed model are from the original's, relative; nothing is quantized yet.

    Raises AnyQuantError beyond `transforms.proof.LIMIT`: the transform would change the model.
    """
    progress.say("comparing the transformed model with the original")
    architectures = (original, job.architecture)
    found = relative_logit_difference(job.source, job.checkpoint, [tokens[:PROOF_TOKENS]], architectures)
    if not found <= LIMIT:
        names = ", ".join(step.name for step in job.plan.transforms)
        raise AnyQuantError(f"{names}: the logits of the transformed model differ by {found:.1e}, allowed {LIMIT:g}")
    return found
