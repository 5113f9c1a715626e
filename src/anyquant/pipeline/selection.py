"""Plans made and measured on *select*, one after the other, in the place where the artifact will be published."""

from collections.abc import Callable, Sequence

from anyquant.contract.metrics import SELECT
from anyquant.core.progress import Progress
from anyquant.evaluation.drops import Drop
from anyquant.pipeline.backends import Backend
from anyquant.pipeline.measure import ReferenceLogits
from anyquant.pipeline.picture import Point
from anyquant.pipeline.planner import Job, chain_of
from anyquant.pipeline.quantized import Quantized, Quantizer
from anyquant.pipeline.search import Found
from anyquant.pipeline.watch import Watch
from anyquant.store.publish import Stage


class Selection:
    """`drops` measures the user's metrics on the staged artifact. `points` grow with every measurement."""

    def __init__(
        self,
        backend: Backend,
        stage: Stage,
        quantizer: Quantizer,
        drops: Callable[[Job, str], Sequence[Drop]],
        watch: Watch,
        progress: Progress,
    ) -> None:
        self._backend, self._stage, self._quantizer = backend, stage, quantizer
        self._drops, self._watch, self._progress = drops, watch, progress
        self._staged: Quantized | None = None
        self._job: Job | None = None
        self.points: list[Point] = []

    def bring(self, job: Job) -> Quantized:
        """The artifact of the job, in the stage; nothing is done when it is there already."""
        if self._staged is None or self._job is not job:
            self._staged = self._job = None
            with self._watch.stage("calibrate"):
                quantized = self._quantizer.quantized(job)
            with self._watch.stage("quantize"):
                self._backend.write(quantized, self._stage)
            self._staged, self._job = quantized, job
        return self._staged

    def measure(self, job: Job, reference: ReferenceLogits, label: str) -> Found:
        """Make its artifact and measure it against the `reference`, whose documents are those of *select*."""
        made = self.bring(job).job
        with self._watch.stage("select"):
            measures = self._backend.select(made, self._stage, reference, f"select {label}")
        found = Found(measures, self._drops(made, SELECT))
        self.points.append(point_of(job, found, label))
        return found


def point_of(job: Job, found: Found, label: str, chosen: bool = False) -> Point:
    """What the picture shows of a measured job."""
    kl = found.measures.mean_kl
    return Point(label, job.layout.nbytes, kl.value, kl.interval[0], kl.interval[1], chosen, detail_of(job))


def detail_of(job: Job) -> str:
    """What is done, and grids by the weights that lie on them: "gptq; rtn: q4_k 61%, q6_k 30%, q3_k 9%"."""
    amounts: dict[str, int] = {}
    for linear in job.architecture.linears:
        grid = job.plan.decisions[linear.name].grid
        amounts[grid] = amounts.get(grid, 0) + linear.weights
    shares = sorted(amounts.items(), key=lambda pair: -pair[1])
    return f"{chain_of(job)}: " + ", ".join(f"{grid} {amount / job.weights:.0%}" for grid, amount in shares)
