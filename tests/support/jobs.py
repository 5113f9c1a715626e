"""The pipeline's steps on a test checkpoint, in as few lines as a test can bear."""

from pathlib import Path
from typing import Any

from anyquant.formats import rules
from anyquant.pipeline.planner import Job, make_job
from anyquant.pipeline.prepare import prepare
from anyquant.pipeline.recipe import Recipe
from anyquant.store.open import open_checkpoint


def job_of(folder: Path, target: str = "gguf", importance: bool = False, **recipe: Any) -> Job:
    """The job of a recipe (keywords of Recipe) on a checkpoint."""
    checkpoint = open_checkpoint(folder)
    wish = Recipe(**recipe)
    return make_job(prepare(checkpoint, wish), rules(target), wish, importance)
