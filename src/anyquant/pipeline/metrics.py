"""Users' metrics in a run: what the original scores, and how much worse the artifact is."""

from collections.abc import Sequence
from pathlib import Path

from anyquant.contract.metrics import baseline, compare, load_metrics
from anyquant.core.progress import Progress
from anyquant.evaluation.drops import Drop, Scores
from anyquant.evaluation.limits import DropLimit
from anyquant.models.architecture import Architecture
from anyquant.runtimes.base import Session
from anyquant.runtimes.huggingface import HuggingFaceRuntime

CONTEXT = 4096  # tokens of a sequence that a metric may use, where the model takes as many


class Meter:
    """The metrics of a contract; all of their code is imported when this is made. Raises UsageError.

    The original is opened as a whole in float32 by `transformers`, unlike everywhere else: a metric generates.
    """

    def __init__(self, limits: Sequence[DropLimit], original: Path, architecture: Architecture, threads: int) -> None:
        self.metrics = load_metrics(limits)
        self.context = min(CONTEXT, architecture.dimensions.context)
        self._original, self._threads = original, threads
        self._baselines: dict[tuple[str, str], Scores] = {}

    def __bool__(self) -> bool:
        return bool(self.metrics)

    def take_baselines(self, splits: Sequence[str], progress: Progress) -> None:
        """Score the original, each metric twice per split, before any work is done.

        Raises UsageError for a metric that throws, is not deterministic or gives values that are not finite.
        """
        splits = [split for split in splits if any((one.name, split) not in self._baselines for one in self.metrics)]
        if not splits:
            return
        with HuggingFaceRuntime().load(self._original, self.context, self._threads) as session:
            for metric in self.metrics:
                for split in splits:
                    progress.say(f"metric {metric.name} on {split}: the original, twice")
                    self._baselines[metric.name, split] = baseline(metric, session, split)

    def drops(self, session: Session, split: str) -> tuple[Drop, ...]:
        """How much worse an opened artifact is by each metric; `take_baselines` must have seen the split."""
        return tuple(compare(metric, self._baselines[metric.name, split], session, split) for metric in self.metrics)
