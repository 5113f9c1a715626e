"""How a job is written, verified, measured and proved: through a format and its runtime, or as the neutral state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from anyquant.calibrate.text import Document
from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.core.progress import Progress, Silent
from anyquant.evaluation.measures import Measures
from anyquant.evaluation.speed import measure_speed
from anyquant.pipeline.activations import rounded_inputs
from anyquant.pipeline.measure import ReferenceLogits, answers, check_conversion, compare
from anyquant.pipeline.planner import Job, writable
from anyquant.pipeline.quantized import Quantized
from anyquant.pipeline.report import Conversion
from anyquant.pipeline.run import Written, execute
from anyquant.pipeline.state import activation_maxima, copy_state, decoder, verify_state, write_state
from anyquant.pipeline.targets import Target
from anyquant.pipeline.twin import MOST_WEIGHTS, twin_conversion
from anyquant.pipeline.verify import Verified, verify
from anyquant.runtimes import RUNTIMES
from anyquant.runtimes.base import Session
from anyquant.runtimes.transformers import DecodedCheckpoint, TransformersRuntime
from anyquant.store.publish import Stage

# kernels that round activations (llama.cpp's, for quantized and bfloat16 weights) differ by up to 1.5e-2 nats from
# exact arithmetic on very peaked models; a lost permutation, bias or norm costs whole nats
EXACT_LIMIT = 1e-4
ROUNDED_LIMIT = 5e-2
SPEED_PROMPT = 128


@dataclass(frozen=True)
class Proof:
    """What the runtime showed: conversion error and speed in tokens per second."""

    conversion: Conversion | None
    speed: dict[str, float]


class Backend(Protocol):
    """One way of bringing a job to disk and judging it."""

    def write(self, quantized: Quantized, stage: Stage) -> None:
        """Fill the stage with the artifact of the job, in the place of an earlier one."""
        ...

    def verify(self, quantized: Quantized, stage: Stage) -> Verified:
        """Read the artifact back and compare it with plan and source. Raises AnyQuantError."""
        ...

    def measure(self, job: Job, stage: Stage, reference: ReferenceLogits, label: str) -> Measures:
        """The artifact's distributions against the reference's."""
        ...

    def select(self, job: Job, stage: Stage, reference: ReferenceLogits, label: str) -> Measures:
        """The same for a choice among many, where the runtime may be too slow to be asked."""
        return self.measure(job, stage, reference, label)

    def open(self, job: Job, stage: Stage, context: int) -> Session:
        """The artifact in its runtime, for sequences of up to `context` tokens. Raises UsageError without a runtime."""
        ...

    def prove(self, job: Job, stage: Stage, documents: Sequence[Document], encode: Callable[[str], list[int]]) -> Proof:
        """That the runtime computes what the artifact's bytes say. Raises AnyQuantError when it does not."""
        ...


class FormatBackend(Backend):
    """A format, written and verified block by block."""

    def __init__(self, threads: int, progress: Progress) -> None:
        self.threads, self.progress = threads, progress
        self._written: Written | None = None
        self._maxima: Mapping[str, float] = {}

    def write(self, quantized: Quantized, stage: Stage) -> None:
        for file in quantized.job.layout.files:
            stage.discard(file.path)
        self._maxima = quantized.maxima
        self._written = execute(quantized.job, quantized.rows, stage, self.threads, self.progress, quantized.maxima)

    def verify(self, quantized: Quantized, stage: Stage) -> Verified:
        if self._written is None:
            raise AnyQuantError("verify: nothing was written")
        statistics = quantized.statistics
        return verify(quantized.job, stage.folder, self._written, statistics, self.threads, self.progress)

    def _decoded(self, job: Job, stage: Stage, reference: ReferenceLogits, label: str) -> Measures:
        """`transformers` running the weights decoded from the artifact's bytes."""
        decoded = writable(job).open(stage.folder, job.architecture)
        rounding = rounded_inputs(job.architecture, job.plan, self._maxima)
        runtime = TransformersRuntime(decoded, job.architecture, job.checkpoint.config, rounding)
        ids = [document.tokens for document in reference.documents]
        return compare(runtime.logits(ids, self.progress, label), reference, Silent(), label)


class RuntimeBackend(FormatBackend):
    """A format, and the real runtime that opens it."""

    def __init__(self, target: Target, threads: int, progress: Progress, clock: Callable[[], float]) -> None:
        super().__init__(threads, progress)
        self.target = target
        self.runtime = RUNTIMES.get(target.runtime)
        self.clock = clock

    def measure(self, job: Job, stage: Stage, reference: ReferenceLogits, label: str) -> Measures:
        with self.open(job, stage, _longest(reference.documents)) as session:
            return compare(answers(session, reference.documents), reference, self.progress, label)

    def select(self, job: Job, stage: Stage, reference: ReferenceLogits, label: str) -> Measures:
        """In the runtime, but for one that is slow here and exact: `prove` compares it with the decoded weights."""
        if self.target.search == "decoded":
            return self._decoded(job, stage, reference, label)
        return self.measure(job, stage, reference, label)

    def open(self, job: Job, stage: Stage, context: int) -> Session:
        """As its users have it: the loss is that of weights and key-value cache together."""
        cache = job.plan.kv_cache or self.runtime.default_cache
        return self.runtime.load(stage.folder / job.format.entry, context, self.threads, cache)

    def prove(self, job: Job, stage: Stage, documents: Sequence[Document], encode: Callable[[str], list[int]]) -> Proof:
        """With an exact key-value cache."""
        decoded = writable(job).open(stage.folder, job.architecture)
        with self.runtime.load(stage.folder / job.format.entry, _longest(documents), self.threads) as session:
            rounding = rounded_inputs(job.architecture, job.plan, self._maxima)
            direct = check_conversion(session, decoded, job.architecture, job.checkpoint, documents, encode, rounding)
            speed = measure_speed(session, documents[0].tokens[:SPEED_PROMPT], 16, 3, self.clock)
        exact = not rounding and all(self.target.exact(decision.grid) for decision in job.plan.decisions.values())
        found = self._judged(direct, EXACT_LIMIT if exact else ROUNDED_LIMIT)
        if not exact and job.weights <= MOST_WEIGHTS:
            twin = twin_conversion(job, decoded, self.runtime, stage, documents, encode)
            found = replace(self._judged(twin, EXACT_LIMIT), arithmetic=direct.mean_kl)
        rates = {"prompt": speed.prompt_per_second, "generation": speed.generated_per_second}
        return Proof(found, {name: round(rate, 1) for name, rate in rates.items()})

    def _judged(self, found: Conversion, limit: float) -> Conversion:
        """The conversion with its limit. Raises AnyQuantError when it is exceeded."""
        if not found.tokens_equal:
            raise AnyQuantError(f"{self.runtime.name} and the source's tokenizer give different token ids")
        if not found.mean_kl <= limit:
            raise AnyQuantError(
                f"conversion error: {self.runtime.name} differs from the decoded bytes of the artifact by mean KL "
                f"{found.mean_kl:.2e}, the limit is {limit:g}; nothing was published"
            )
        return found.with_limit(limit)


class SchemaBackend(FormatBackend):
    """A format whose engine does not run here: `transformers` runs the weights decoded from the artifact's bytes.

    That shows what the rounding costs, not that the engine reads the bytes as they are meant: such a format is compared
    with what the engine's own tools write, in the tests.
    """

    def __init__(self, target: Target, threads: int, progress: Progress) -> None:
        super().__init__(threads, progress)
        self.target = target

    def measure(self, job: Job, stage: Stage, reference: ReferenceLogits, label: str) -> Measures:
        return self._decoded(job, stage, reference, label)

    def open(self, job: Job, stage: Stage, context: int) -> Session:
        raise UsageError(f"--max-drop runs the artifact, and nothing here runs one for {self.target.name}")

    def prove(self, job: Job, stage: Stage, documents: Sequence[Document], encode: Callable[[str], list[int]]) -> Proof:
        """Nothing: the engine itself did not run."""
        return Proof(None, {})


class StateBackend(Backend):
    """The neutral state. Nothing runs it as it is: `transformers` runs the weights decoded from it."""

    def __init__(self, threads: int, progress: Progress) -> None:
        self.threads, self.progress = threads, progress

    def write(self, quantized: Quantized, stage: Stage) -> None:
        job = quantized.job
        if quantized.folder is None:
            write_state(job, quantized.rows, quantized.statistics, stage, self.threads, self.progress)
        else:
            copy_state(job, quantized.folder, quantized.keys, quantized.maxima, stage)

    def verify(self, quantized: Quantized, stage: Stage) -> Verified:
        statistics = quantized.statistics
        return Verified(verify_state(quantized.job, stage.folder, statistics, self.threads, self.progress), {})

    def measure(self, job: Job, stage: Stage, reference: ReferenceLogits, label: str) -> Measures:
        weights = DecodedCheckpoint(job.checkpoint, job.architecture, decoder(stage.folder))
        ids = [document.tokens for document in reference.documents]
        rounding = rounded_inputs(job.architecture, job.plan, activation_maxima(stage.folder))
        candidates = TransformersRuntime(weights, job.architecture, rounding=rounding).logits(ids, self.progress, label)
        return compare(candidates, reference, Silent(), label)

    def open(self, job: Job, stage: Stage, context: int) -> Session:
        raise UsageError("--max-drop runs the artifact, and nothing runs the neutral state; name a target with --for")

    def prove(self, job: Job, stage: Stage, documents: Sequence[Document], encode: Callable[[str], list[int]]) -> Proof:
        """No runtime but the reference reads the state: there is no conversion to prove."""
        return Proof(None, {})


def _longest(documents: Sequence[Document]) -> int:
    return max(len(document.tokens) for document in documents)


def backend_for(target: Target, threads: int, progress: Progress, clock: Callable[[], float]) -> Backend:
    """The neutral state, or the format of the target, with its runtime where it has one."""
    if target.neutral:
        return StateBackend(threads, progress)
    if target.schema_only:
        return SchemaBackend(target, threads, progress)
    return RuntimeBackend(target, threads, progress, clock)


def left_out(target: Target, job: Job) -> str:
    """What an engine that does not run here does to the inputs of its matrices, where the plan does not; or ""."""
    grids = {
        one.grid
        for one in job.plan.decisions.values()
        if target.schema_only and one.input_activation is None and not target.exact(one.grid)
    }
    if not grids:
        return ""
    return (
        f"{target.name} rounds what enters matrices on {', '.join(sorted(grids))}, which is not in the measured loss; "
        "--activations simulates it where a grid describes it."
    )


def shown(target: Target, proof: Proof) -> str:
    """What was shown of the artifact beyond its loss, for the report."""
    if proof.conversion is not None:
        return f"runtime-verified: {target.runtime} computes what its bytes say"
    if target.schema_only:
        return f"schema-verified, not run: read back byte for byte as its schema says; {target.name} did not run here"
    return "read back byte for byte; not run"
