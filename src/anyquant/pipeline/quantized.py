"""A job whose values are chosen, or will be when they are asked for: what a backend writes."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from anyquant import __version__
from anyquant.calibrate.stats import Statistics
from anyquant.calibrate.text import Document, digest
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError, UsageError
from anyquant.core.progress import Progress
from anyquant.pipeline.activations import needs_maximum
from anyquant.pipeline.matrix import CODE_VERSION
from anyquant.pipeline.planner import Job
from anyquant.pipeline.rows import Direct, Importance, Rows, Stored, Unweighted
from anyquant.pipeline.staged import Room, Staged, Stages, is_staged
from anyquant.pipeline.statistics import gather, keep
from anyquant.pipeline.transcode import Transcoded
from anyquant.pipeline.work import Work, source_identity
from anyquant.store.state import canonical_json
from anyquant.store.system import SYSTEM, remove_tree
from anyquant.transforms.checkpoint import layers

REFUSALS = (UsageError, BadInputError, UnsupportedError)
ROOM = 4  # bytes on disk per weight that a staged job may need at most: codes, parameters, states


@dataclass(frozen=True)
class Quantized:
    """`rows` gives the quantized rows of `job`, `statistics` those that steered them.

    Where they lie in a state already, `folder` is its folder and `keys` are its entries by Linear name. `maxima`: the
    largest magnitude that enters a Linear, for static activation scales. `notes` are for the report. `kinds`: what
    transcoding did to a Linear, known when the rows were taken.
    """

    job: Job
    statistics: Importance
    rows: Rows
    folder: Path | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    maxima: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)


class Quantizer:
    """`with Quantizer(...) as quantizer:` chooses the values of jobs. Statistics of a model are collected once.

    `documents` is None for a data-free run. `versions` of the libraries tell runs apart. A staged job works in a hidden
    folder beside the output `room.out`, one for each set of options; it stays when the run ends early, and `remove`
    takes all of them away. `transcode`: values are those that the source is quantized to.
    """

    def __init__(
        self,
        documents: Sequence[Document] | None,
        room: Room,
        versions: Mapping[str, str],
        progress: Progress,
        transcode: bool = False,
    ) -> None:
        self._transcode = transcode
        self._documents, self._room, self._versions, self._progress = documents, room, versions, progress
        self._gathered: tuple[Checkpoint, Statistics] | None = None
        self._last: Statistics | None = None
        self._earlier: list[Path] = []
        self._told = False
        self._work: Work | None = None
        self._folder = room.out.absolute().with_name(f".{room.out.name}.work")
        self._mine = self._folder

    def __enter__(self) -> "Quantizer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        begun = self._mine != self._folder
        self._close()
        own = [*self._earlier, *([self._mine] if begun else [])]
        with suppress(OSError):  # what ended the run is the error to tell of
            for folder in own:
                if folder.exists() and (issubclass(kind, REFUSALS) or not _finished(folder)):
                    remove_tree(SYSTEM, folder)
            if begun and not any(self._folder.iterdir()):
                remove_tree(SYSTEM, self._folder)
        if any(map(_finished, own)):
            self._progress.say(f"finished blocks are kept in {self._folder}: the same command goes on behind them")

    def quantized(self, job: Job) -> Quantized:
        """The values of a job, by block through the quantized model where it must be, else when they are asked for."""
        if self._transcode:
            rows = Transcoded(job)
            return Quantized(job, Unweighted(), rows, kinds=rows.kinds)
        if self._documents is None:
            return Quantized(job, Unweighted(), Direct(job, Unweighted()))
        if is_staged(job):
            return self._staged(job, self._documents)
        found = self.importance(job)
        return Quantized(job, found, Direct(job, found))

    def importance(self, job: Job) -> Importance:
        """What steers the rounding of a job that is not staged: statistics of the float model, or nothing."""
        if self._documents is None:
            return Unweighted()
        if self._gathered is None or self._gathered[0] is not job.checkpoint:
            calibration = job.recipe.calibration
            found = gather(job.checkpoint, job.architecture, calibration, self._documents, self._progress)
            self._gathered = job.checkpoint, found
        self._last = self._gathered[1]
        return self._last

    def keep_imatrix(self, path: Path, job: Job) -> None:
        """Write the statistics of the job as llama.cpp's importance file, where the recipe asks for it."""
        calibration = job.recipe.calibration
        if calibration.keep_imatrix and self._last is not None and self._documents is not None:
            keep(path, self._last, job.architecture, calibration, len(self._documents))

    def remove(self) -> None:
        """The output is published: what was kept for going on is not needed any more."""
        self._close()
        if self._folder.exists():
            remove_tree(SYSTEM, self._folder)

    def _staged(self, job: Job, documents: Sequence[Document]) -> Quantized:
        if self._work is not None:  # of an earlier job of this run; it is kept, as it may be the best in the end
            self._close()
            self._earlier.append(self._mine)
        identity = _identity(job, documents, self._versions)
        self._mine = self._folder / sha256(canonical_json(identity)).hexdigest()[:16]
        if self._mine in self._earlier:
            self._earlier.remove(self._mine)
        self._make_room(job)
        others = [path for path in self._folder.glob("*") if path != self._mine and path not in self._earlier]
        if others and not self._told:
            self._told = True
            self._progress.say(
                f"{self._folder} keeps unfinished work of earlier runs to this output, {len(others)} plans; it goes "
                "away when this one is published"
            )
        self._work = work = Work(self._mine, identity)
        done = Stages(job, documents, work, self._room, self._progress).run()
        self._last = done.statistics
        rows = Stored({name: work.entry(key) for name, key in done.entries.items()})
        return Quantized(done.job, done.statistics, rows, work.folder, done.entries, _maxima(done), done.notes)

    def _make_room(self, job: Job) -> None:
        """Earlier jobs of this run go away, the oldest first, where the disk has no place for another one."""
        while self._earlier and SYSTEM.free_bytes(self._folder) < ROOM * job.weights:
            remove_tree(SYSTEM, self._earlier.pop(0))

    def _close(self) -> None:
        if self._work is not None:
            self._work.close()
            self._work = None


def _finished(folder: Path) -> bool:
    """Whether there is anything in it to go on behind."""
    return any(folder.glob("stage-*.json"))


def _maxima(done: Staged) -> dict[str, float]:
    found = {}
    for name, decision in done.job.plan.decisions.items():
        if not needs_maximum(decision.input_activation):
            continue
        moments = done.statistics.moment(done.job.architecture.by_name[name])
        if moments is None or moments.absolute_maximum is None:
            raise AnyQuantError(f"{name}: the largest magnitude of its input is not known; its scale cannot be static")
        found[name] = float(moments.absolute_maximum.max())
    return found


def _identity(job: Job, documents: Sequence[Document], versions: Mapping[str, str]) -> dict[str, object]:
    """What tells one staged run from another: all that its stages follow from."""
    return {
        "code": [__version__, CODE_VERSION],
        "target": job.format.name,
        "source": source_identity(job.source),
        "recipe": job.recipe.as_dict(),
        "documents": [len(documents), digest(documents)],
        "versions": dict(versions),
        "decisions": [asdict(decision) for decision in job.plan.decisions.values()],
        "transforms": [asdict(step) for step in job.plan.transforms],
        # what is learned depends on the arithmetic of the machine: finished blocks must not meet another rotation
        "rewrites": [layer.digest() for layer in layers(job.checkpoint)],
    }
