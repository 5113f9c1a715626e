"""Where importance comes from: collected on the calibration text, or read from a llama.cpp importance file."""

from collections.abc import Sequence
from pathlib import Path

from anyquant.algorithms import ALGORITHMS
from anyquant.calibrate.imatrix import Source, read_imatrix, write_imatrix
from anyquant.calibrate.stats import Statistics
from anyquant.calibrate.stream import collect
from anyquant.calibrate.text import Document
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UsageError
from anyquant.core.linear import Role
from anyquant.core.plan import Step
from anyquant.core.progress import Progress
from anyquant.formats import FORMATS
from anyquant.models.architecture import Architecture
from anyquant.pipeline.planner import Job
from anyquant.pipeline.recipe import Calibration
from anyquant.pipeline.staged import is_staged

IMATRIX = "imatrix.gguf"


def gather(
    checkpoint: Checkpoint,
    architecture: Architecture,
    calibration: Calibration,
    documents: Sequence[Document],
    progress: Progress,
) -> Statistics:
    """Statistics for every Linear with an input. Raises BadInputError when an importance file does not fit."""
    if calibration.imatrix is None:
        tokens = [document.tokens for document in documents]
        return collect(checkpoint, architecture, tokens, progress, calibration.dtype)
    path = Path(calibration.imatrix)
    names = FORMATS.get("gguf").part_names(architecture)
    found = read_imatrix(path, architecture.linears, names)
    by_name = architecture.by_name
    # an embedding that is only looked up never has an entry
    for name in (name for name in found.statistics.missing if by_name[name].role is not Role.EMBEDDING):
        progress.say(f"warning: {path}: no entry for {name}: every channel of it counts the same")
    for tensor in found.unknown:
        progress.say(f"warning: {path}: entry {tensor} belongs to no tensor of this model")
    return found.statistics


def keep(
    path: Path, statistics: Statistics, architecture: Architecture, calibration: Calibration, documents: int
) -> None:
    """Write the statistics as llama.cpp's importance file at `path`. Raises OutputError."""
    text = "default text of AnyQuant" if calibration.text is None else Path(calibration.text).name
    source = Source((text,), documents, calibration.context)
    write_imatrix(path, statistics, architecture.linears, FORMATS.get("gguf").part_names(architecture), source)


def refuse_imatrix(job: Job) -> None:
    """Raise UsageError when an importance file is given to a job that needs more, or whose channels are others."""
    path = job.recipe.calibration.imatrix
    if path is None:
        return
    if job.plan.transforms:
        raise UsageError(f"{path}: importance of the original channels does not fit a model that is transformed")
    for decision in job.plan.decisions.values():
        for step in (decision.prune, Step(decision.algorithm, decision.options), decision.correct):
            if step is not None and (lacking := ALGORITHMS.get(step.name).needed(step.options) - {"second_moment"}):
                raise UsageError(
                    f"{path}: {step.name} needs {', '.join(sorted(lacking))} of the activations, which importance "
                    "files do not hold; calibrate on a text instead"
                )
    if is_staged(job):
        raise UsageError(
            f"{path}: this recipe calibrates every block behind the quantized ones before it, where an importance file "
            "would be ignored; leave it out"
        )
