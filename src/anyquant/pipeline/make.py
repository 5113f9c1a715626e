"""The main job for one target: plan, calibrate, quantize, verify, measure in the runtime, judge, publish."""

import resource
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from anyquant import __version__
from anyquant.calibrate.text import Document, Splits, Tokenizer
from anyquant.contract.metrics import CERTIFY, SELECT
from anyquant.core.errors import OutputError
from anyquant.core.progress import Progress
from anyquant.evaluation.drops import Drop
from anyquant.evaluation.measures import Measures
from anyquant.evaluation.verdict import Status, Verdict, judge
from anyquant.formats import rules
from anyquant.formats.base import Rules
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.pipeline import report as reporting
from anyquant.pipeline.accounts import make_ledger
from anyquant.pipeline.backends import Proof, backend_for, left_out, shown
from anyquant.pipeline.certificate import certificate_of, seal
from anyquant.pipeline.choose import Chooser
from anyquant.pipeline.deployment import deployment_of
from anyquant.pipeline.measure import ReferenceLogits, below_noise, loss_of
from anyquant.pipeline.metrics import Meter
from anyquant.pipeline.picture import Point
from anyquant.pipeline.planner import Job, chain_of, make_job
from anyquant.pipeline.prepare import prepare, prove_static
from anyquant.pipeline.quantized import Quantized, Quantizer
from anyquant.pipeline.report import DECODED, ORIGINAL, Report
from anyquant.pipeline.request import Request
from anyquant.pipeline.search import Found
from anyquant.pipeline.selection import Selection, point_of
from anyquant.pipeline.shared import Shared
from anyquant.pipeline.staged import Room
from anyquant.pipeline.statistics import IMATRIX, refuse_imatrix
from anyquant.pipeline.targets import expect_libraries
from anyquant.pipeline.texts import default_text_warning, describe, load_splits, source_tokenizer, usable_context
from anyquant.pipeline.transcode import KINDS, ROUNDED, transcoding
from anyquant.pipeline.verify import Verified
from anyquant.pipeline.watch import Watch
from anyquant.pipeline.work import source_paths, stored_bytes
from anyquant.runtimes.transformers import TransformersRuntime
from anyquant.store.publish import Stage
from anyquant.transforms.checkpoint import settle

LIBRARIES = (
    *("numpy", "numba", "gguf", "torch", "transformers", "tokenizers"),
    *("xllamacpp", "compressed-tensors", "mlx", "mlx-lm"),
)


@dataclass
class _Evidence:
    """What has been measured so far."""

    points: tuple[Point, ...] = ()
    frontier: tuple[tuple[int, float], ...] = ()
    sentences: tuple[str, ...] = ()
    measures: Measures | None = None
    drops: tuple[Drop, ...] = ()
    proof: Proof = field(default_factory=lambda: Proof(None, {}))


@dataclass(frozen=True)
class Finished:
    """What was written and read back."""

    quantized: Quantized
    verified: Verified

    @property
    def job(self) -> Job:
        return self.quantized.job


class Maker:
    """One run of the main job. The steps are methods in the order in which they happen.

    `shared` is what runs for other targets of the same source have made already.
    """

    def __init__(self, request: Request, progress: Progress, clock: Callable[[], float], shared: Shared) -> None:
        self.request = request
        self.progress = progress
        self.shared = shared
        self.watch = Watch(clock)
        self.rules: Rules = rules(request.target.format)
        self.backend = backend_for(request.target, request.threads, progress, clock)
        self.model = prepare(request.checkpoint, request.recipe)
        rewritten = self.model.checkpoint is not request.checkpoint
        self.original: Architecture = detect(request.checkpoint) if rewritten else self.model.architecture
        contract = request.contract.resolved(sum(linear.weights for linear in self.original.linears))
        self.request = request = replace(request, contract=contract)
        calibration = request.recipe.calibration
        asked = request.choose or request.contract.needs_measures or (request.transcode and not request.unmeasured)
        self.measuring = not calibration.data_free or calibration.text is not None or asked
        self.importance = not calibration.data_free
        self.meter = shared.once("meter", self._meter)
        self.evidence = _Evidence()
        self.warnings: list[str] = []
        self.proofs: list[float] = []

    def _meter(self) -> Meter:
        request = self.request
        return Meter(request.contract.max_drop, Path(request.checkpoint.location), self.original, request.threads)

    def plan(self) -> Job:
        """What is asked for; the target's default where the contract is to choose. All refusals come here."""
        self._refuse_input_as_output()
        request = self.request
        recipe = request.recipe
        if request.choose:
            recipe = replace(recipe, preset=request.target.default_preset)
        if request.transcode:
            recipe = transcoding(self.model, self.rules, recipe)
        job = make_job(self.model, self.rules, recipe, self.importance)
        refuse_imatrix(job)
        if request.choose:
            Chooser(request, self.model, self.rules, self.watch, self.progress).refuse()
        if self.measuring:
            expect_libraries(request.target.libraries)
        return job

    def make(self, planned: Job, stage: Stage) -> Report:
        """Run everything that was `planned` in a new `stage`, and publish it; nothing is visible before it is verified.

        Raises AnyQuantError (a subclass with its exit code) when the job cannot be done; a contract that is not met is
        not an exception: the artifact and its report are published and the report's status says so.
        """
        request = self.request
        splits, tokenizer = self._texts()
        self.meter.take_baselines((SELECT, CERTIFY) if request.choose else (CERTIFY,), self.progress)
        self._settle_transforms()
        self._prove_transforms(planned, splits)
        documents = None if splits is None or not self.importance else splits.calibrate
        room = Room(request.memory, request.out)
        quantizer = self.shared.quantizing(
            lambda: Quantizer(documents, room, _versions(), self.progress, request.transcode)
        )
        finished = self._write(planned, stage, splits, quantizer)
        quantizer.keep_imatrix(stage.folder / IMATRIX, finished.job)
        if splits is not None and tokenizer is not None:
            self._certify(finished.job, stage, splits, tokenizer)
        size, drops = finished.job.layout.nbytes, self.evidence.drops
        verdict = judge(self.evidence.measures, request.contract, size, drops)
        finished = self._sealed(finished, verdict, splits, stage)
        report = self._report(finished, verdict, splits)
        for name, text in (
            ("report.json", reporting.render_json(report)),
            ("report.md", reporting.render_markdown(report)),
            ("report.html", reporting.render_html(report)),
        ):
            stage.write_file(name, text.encode())
        stage.publish(finished.verified.hashes)
        return report

    def _refuse_input_as_output(self) -> None:
        """Inputs are never modified: nothing is written into the model's folder."""
        out = self.request.out.resolve()
        for path in source_paths(self.request.checkpoint):
            source = path.resolve() if path.is_dir() else path.resolve().parent
            if source == out or source in out.parents:
                raise OutputError(f"{self.request.out} lies inside the model's folder {source}; choose another -o")

    def _texts(self) -> tuple[Splits | None, Tokenizer | None]:
        if not self.measuring:
            free = "data-free and no limit: nothing is measured; give --text to measure the artifact"
            self.progress.say("data-free: nothing is measured" if self.request.transcode else free)
            return None, None
        if self.request.recipe.calibration.text is None and self.request.location != "demo":
            self.warnings.append(default_text_warning(self.importance))
        return self.shared.once("texts", self._loaded_texts)

    def _loaded_texts(self) -> tuple[Splits, Tokenizer]:
        for warning in self.warnings:
            self.progress.say(f"warning: {warning}")
        tokenizer = source_tokenizer(self.request.checkpoint)
        calibration = self.request.recipe.calibration
        context = usable_context(calibration.context, self.original)
        if context < calibration.context:
            self.progress.say(f"documents have {context} tokens at most, which is what this model takes")
        return load_splits(tokenizer, self.original, calibration, self.request.contract.certify_tokens), tokenizer

    def _settle_transforms(self) -> None:
        """What transforms learn from the weights alone is learned here, where it is seen."""
        if self.model.checkpoint is not self.request.checkpoint:
            with self.watch.stage("transform"):
                settle(self.model.checkpoint, self.progress)

    def _prove_transforms(self, job: Job, splits: Splits | None) -> None:
        """The rewritten model computes what the original does. Raises AnyQuantError when it does not."""
        if job.checkpoint is job.source or splits is None:
            return
        with self.watch.stage("prove transforms"):
            difference = prove_static(job, self.original, splits.calibrate[0].tokens, self.progress)
        self.proofs.append(difference)

    def _write(self, planned: Job, stage: Stage, splits: Splits | None, quantizer: Quantizer) -> Finished:
        """Write the artifact, found under the contract if nothing says what to make. Then verify it."""
        selection = Selection(
            self.backend, stage, quantizer, lambda job, split: self._drops(job, stage, split), self.watch, self.progress
        )
        job = planned
        if self.request.choose and splits is not None:
            job = self._chosen(splits, selection, quantizer)
        quantized = selection.bring(job)
        self.evidence.points = tuple(selection.points)
        with self.watch.stage("verify"):
            return Finished(quantized, self.backend.verify(quantized, stage))

    def _chosen(self, splits: Splits, selection: Selection, quantizer: Quantizer) -> Job:
        """The job that the contract asks for; all that was tried is in the evidence."""
        known = self.shared.plans.get(self.rules.name)
        if known is not None:
            recipe, target = known
            self.evidence.sentences = (
                f"The plan is the one that was found for {target}, which loads the same format.",
            )
            return make_job(self.model, self.rules, recipe, self.importance)
        chooser = Chooser(self.request, self.model, self.rules, self.watch, self.progress)  # time counts from here
        with self._reference(splits.select) as reference:
            found = chooser.choose(splits, reference, selection, quantizer)
        self.evidence.sentences, self.evidence.frontier = (found.reason,), found.frontier
        self.shared.plans[self.rules.name] = found.job.recipe, self.request.target.name
        return found.job

    def _certify(self, job: Job, stage: Stage, splits: Splits, tokenizer: Tokenizer) -> None:
        """Once, on text that nothing has seen: loss, conversion error, speed."""
        with self._reference(splits.certify) as reference, self.watch.stage("certify"):
            measures = self.backend.measure(job, stage, reference, "certify")
        self.evidence.measures = measures
        self.evidence.drops = self._drops(job, stage, CERTIFY)
        found = Found(measures, self.evidence.drops)
        self.evidence.points += (point_of(job, found, job.plan.label, chosen=True),)
        with self.watch.stage("prove"):
            self.evidence.proof = self.backend.prove(job, stage, splits.certify, tokenizer.whole)
        self.warnings += below_noise(self.request.contract, self.evidence.proof.conversion)

    def _drops(self, job: Job, stage: Stage, split: str) -> tuple[Drop, ...]:
        """How much worse the staged artifact is by the metrics of the contract."""
        if not self.meter:
            return ()
        with self.watch.stage("metrics"), self.backend.open(job, stage, self.meter.context) as session:
            return self.meter.drops(session, split)

    def _sealed(self, finished: Finished, verdict: Verdict, splits: Splits | None, stage: Stage) -> Finished:
        """The verdict goes into the artifact itself."""
        job, measures, contract = finished.job, self.evidence.measures, self.request.contract
        certificate = certificate_of(job, self._status(verdict), contract, measures, splits)
        with self.watch.stage("seal"):
            hashes = seal(job, stage, certificate, finished.verified.hashes)
        return replace(finished, verified=replace(finished.verified, hashes=hashes))

    def _status(self, verdict: Verdict) -> str:
        unmeasured = self.evidence.measures is None and self.request.contract.empty
        return "unmeasured" if unmeasured else verdict.status.value

    def _reference(self, documents: Sequence[Document]) -> AbstractContextManager[ReferenceLogits]:
        """The original's logits of the documents, beside the output."""

        def compute() -> ReferenceLogits:
            runtime, folder = TransformersRuntime(self.request.checkpoint, self.original), self.request.out.absolute()
            with self.watch.stage("reference"):
                return ReferenceLogits(runtime, documents, folder.parent, self.progress)

        return self.shared.reference(documents, compute)

    def _sentences(self, verdict: Verdict, quantized: Quantized) -> tuple[str, ...]:
        measured = self.evidence.measures is not None
        said = [*self.evidence.sentences] if measured else ["Nothing was measured."]
        if measured or not self.request.contract.empty:
            said.append(verdict.sentence)
        if verdict.status in (Status.FAIL, Status.INCONCLUSIVE):
            said.append("The contract is not shown to hold; the artifact is published with this verdict in its report.")
            said += [f"It is shown to keep {verdict.nearest}."] if verdict.nearest else []
        said += _transcoded(quantized.kinds)
        if measured and self.request.transcode:
            said.append(_compared(self.request))
        said += [f"Transforms: logits before and after agree to {proof:.1e} relative." for proof in self.proofs]
        if measured and self.request.target.runtime != self.request.target.name:
            said.append(f"{self.request.target.note[0].upper()}{self.request.target.note[1:]}.")
        if measured and (further := left_out(self.request.target, quantized.job)):
            said.append(further)
        return tuple(said)

    def _report(self, finished: Finished, verdict: Verdict, splits: Splits | None) -> Report:
        request, checkpoint = self.request, self.request.checkpoint
        job, verified = finished.job, finished.verified
        measures = self.evidence.measures
        return Report(
            anyquant=__version__,
            model=request.location,
            family=self.original.family,
            target=request.target.name,
            label=job.plan.label,
            chain=chain_of(job),
            artifact=self.rules.entry,
            nbytes=job.layout.nbytes,
            source_bytes=stored_bytes(checkpoint),
            reference=DECODED if request.transcode else ORIGINAL,
            weights=job.weights,
            status=self._status(verdict),
            sentences=self._sentences(verdict, finished.quantized),
            contract=request.contract.as_dict(),
            limits=verdict.limits,
            loss=None if measures is None else loss_of(measures, "certify"),
            conversion=self.evidence.proof.conversion,
            proof=shown(request.target, self.evidence.proof),
            speed=self.evidence.proof.speed,
            points=tuple(self.evidence.points),
            frontier=self.evidence.frontier,
            ledger=make_ledger(job, verified.errors, finished.quantized.kinds),
            recipe=job.recipe.as_dict(),
            data={} if splits is None else describe(splits, request.recipe.calibration, request.choose),
            hashes=dict(verified.hashes),
            versions=_versions(),
            seconds=self.watch.seconds,
            peak_memory=_peak_memory(),
            warnings=tuple(self.warnings),
            notes=finished.quantized.notes,
            deployment=deployment_of(self.original, request.target, self.rules.entry, job.plan.kv_cache),
        )


def _compared(request: Request) -> str:
    """What a conversion was measured against, and how to measure it again."""
    said = f"Compared with {request.location} as decoded, not with the model that it was made from"
    folder = Path(request.location).is_dir()
    return f"{said}: evaluate OUT --against {request.location} measures the same." if folder else f"{said}."


def _transcoded(kinds: Mapping[str, str]) -> list[str]:
    """How many matrices are what they were."""
    if not kinds:
        return []
    counts = Counter(kinds.values())
    told = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
    said = [f"Of {len(kinds)} quantized matrices: {told}."]
    if counts[ROUNDED]:
        said.append(
            "What no grid of the target holds was rounded again, which --grid can steer; the ledger has its error."
        )
    return said


def _peak_memory() -> int:
    """Peak resident bytes of this process; the system counts in kilobytes, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except ModuleNotFoundError:
            continue
    return found
