"""What can be done with an artifact that is there: look into it, measure it, let it speak."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir

from anyquant.calibrate.sources import FIELD, read_documents, require_source
from anyquant.calibrate.text import Document, demo_splits, digest, up_to, within
from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.errors import AnyQuantError, BadInputError, InconclusiveError, UnsupportedError, UsageError
from anyquant.core.progress import Progress
from anyquant.evaluation.measures import Measures
from anyquant.formats import as_model, folder_format
from anyquant.formats.certificate import Certificate, read_certificate
from anyquant.formats.folder.format import FolderFormat
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.certificate import (
    Record,
    Reproduction,
    expect_measured,
    read_record,
    tensor_digest,
    unchecked,
    unlike_measured,
    unlike_stated,
)
from anyquant.pipeline.measure import ReferenceLogits, answers, compare
from anyquant.pipeline.recipe import Calibration
from anyquant.pipeline.targets import expect_libraries, targets
from anyquant.pipeline.texts import load_splits, source_tokenizer, usable_context
from anyquant.runtimes import RUNTIMES
from anyquant.runtimes.base import Session
from anyquant.runtimes.folder import read_config, runtime_of
from anyquant.runtimes.huggingface import RUNTIME, libraries_for, load_decoded, opens
from anyquant.runtimes.kv_cache import KV_CACHE, CacheTypes, cannot_tell
from anyquant.runtimes.transformers import TransformersRuntime
from anyquant.store.gguf import GGUFFile
from anyquant.store.manifest import listed_files, read_manifest, verify_manifest
from anyquant.store.open import ARTIFACT, is_state, open_checkpoint
from anyquant.store.state import StateReader
from anyquant.transforms.merge import with_adapter

LONGEST = 1 << 16  # tokens of a prompt and its continuation where the model does not say


@dataclass(frozen=True)
class Contents:
    """`kind` is "gguf", "safetensors" or "state" (bytes as the grid packs them).

    `problem` says why the family is unknown, when it is. `weights` are those of the model that the tensors stand for,
    not the words into which they are packed.
    """

    location: str
    kind: str
    family: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, object]
    tied: bool | None
    problem: str
    weights: int
    certificate: Certificate | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def types(self) -> list[tuple[str, int, int]]:
        """(type, tensors, bytes), largest first."""
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for tensor in self.tensors:
            count[tensor.dtype] += 1
            size[tensor.dtype] += tensor.nbytes
        return [(name, count[name], nbytes) for name, nbytes in size.most_common()]


def inspect(path: Path) -> Contents:
    """Read headers only."""
    if path.is_dir() and is_state(path):
        return _state(path)
    checkpoint = open_checkpoint(path)
    tensors = tuple(checkpoint.spec(name) for name in checkpoint.names())
    sealed = read_certificate(checkpoint.metadata, checkpoint.config, str(path))
    weights = _elements(checkpoint)
    if isinstance(checkpoint, GGUFFile):
        family = str(checkpoint.metadata.get("general.architecture", "unknown"))
        return Contents(str(path), "gguf", family, tensors, checkpoint.metadata, None, "", weights, sealed)
    config = checkpoint.config
    try:
        model = as_model(checkpoint)
        weights, architecture = _elements(model), detect(model)
    except AnyQuantError as error:
        family = str(config.get("model_type", "unknown"))
        return Contents(str(path), "safetensors", family, tensors, config, None, str(error), weights, sealed)
    tied = architecture.tied
    return Contents(str(path), "safetensors", architecture.family, tensors, config, tied, "", weights, sealed)


def _elements(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.spec(name).elements for name in checkpoint.names())


def _state(folder: Path) -> Contents:
    """The entries of a neutral state, each as a tensor on its grid."""
    read_manifest(folder)
    reader = StateReader(folder, find_grid)
    entries = {name: reader.entry(name) for name in reader.names()}
    tensors = tuple(
        TensorSpec(name, entry.grid.name, entry.shape, entry.grid.bits(entry.shape) // 8)
        for name, entry in entries.items()
    )
    weights = sum(tensor.elements for tensor in tensors)
    return Contents(str(folder), "state", str(reader.plan.get("family")), tensors, {}, None, "", weights)


@dataclass(frozen=True)
class Judging:
    """`text` None means the default text; `tokens` bounds it, `context` is the window length.

    `field` is the one of its records that counts. `kv_cache`: types of the key-value cache; None: see `cache_of`.
    `adapter`: the folder of one that belongs to the original.
    """

    text: str | None
    tokens: int | None
    context: int
    threads: int
    field: str = FIELD
    kv_cache: str | None = None
    adapter: Path | None = None


def runtime_name(artifact: Path) -> str:
    """The runtime that opens an artifact: of a folder, by what its config says."""
    if artifact.is_dir() and not (artifact / ARTIFACT).exists():
        return runtime_of(read_config(artifact))
    return "llama.cpp"


def entry_of(artifact: Path) -> Path:
    """The path that the runtime opens: OUT/model.gguf for an output folder that holds one."""
    inner = artifact / ARTIFACT
    return inner if artifact.is_dir() and inner.exists() else artifact


def _libraries(artifact: Path) -> Sequence[str]:
    """What the runtime needs to open an artifact."""
    name = runtime_name(artifact)
    if name == RUNTIME.name:
        return libraries_for(artifact) if artifact.is_dir() else ()
    return next((known.libraries for known in targets().values() if known.runtime == name), ())


def _refuse_changed(artifact: Path) -> None:
    """Figures of a file that was changed would be blamed on the rounding; one without a manifest is taken as is."""
    folder = _listed_in(artifact)
    if folder is not None:
        verify_manifest(folder)


def _listed_in(artifact: Path) -> Path | None:
    """The folder whose manifest lists the artifact, if there is one."""
    if artifact.is_dir():
        return None if read_manifest(artifact) is None else artifact
    return artifact.parent if artifact.is_file() and artifact.name in listed_files(artifact.parent) else None


def evaluate(artifact: Path, against: Path, judging: Judging, progress: Progress) -> Measures:
    """All measures of the artifact in its runtime against the original checkpoint.

    On the default text only its *certify* documents are used, so that a run of `make` can be reproduced.
    """
    _expect_sound(artifact)
    source = with_adapter(as_model(open_checkpoint(against)), judging.adapter)
    architecture = detect(source)
    tokenizer = within(source_tokenizer(source), architecture.dimensions.vocabulary)
    context = usable_context(judging.context, architecture)
    if judging.text is None:
        documents = up_to(demo_splits(tokenizer, context).certify, judging.tokens)
    else:
        documents = read_documents(judging.text, tokenizer, context, tokens=judging.tokens, field=judging.field)
    if not documents:
        raise InconclusiveError("the text is too short to measure on; give a longer one")
    return _measured(artifact, source, documents, judging, progress)


def reproduce(artifact: Path, against: Path, judging: Judging, progress: Progress) -> Reproduction:
    """Measure again what the artifact's certificate says, on the *certify* text of the run that made it.

    That text is found by the report beside the artifact, or is `judging.text`, divided as that run did it. Raises
    BadInputError without a certificate, InconclusiveError for one that nothing was measured for.
    """
    _expect_sound(artifact)
    opened = open_checkpoint(artifact)
    sealed = expect_measured(read_certificate(opened.metadata, opened.config, str(artifact)), artifact)
    source = with_adapter(as_model(open_checkpoint(against)), judging.adapter)
    architecture = detect(source)
    record = read_record(artifact)
    documents = load_splits(source_tokenizer(source), architecture, *_certified(record, judging)).certify
    differences = unlike_stated(sealed, opened, record, documents)
    if digest(documents) != sealed.text_sha256:
        return Reproduction(sealed, None, tuple(differences), unchecked(record))
    measures = _measured(artifact, source, documents, judging, progress)
    differences = [*differences, *unlike_measured(sealed, record, measures)]
    return Reproduction(sealed, measures, tuple(differences), unchecked(record))


def uncompared(artifact: Path) -> list[str]:
    """What to say of a certificate that a measurement on some other text leaves aside.

    Its tensors are looked at where no manifest tells already whether they were changed.
    Raises BadInputError when they are not those that were certified.
    """
    opened = open_checkpoint(entry_of(artifact))
    sealed = read_certificate(opened.metadata, opened.config, str(artifact))
    if sealed is None or not sealed.measured:
        return []
    if _listed_in(artifact) is None and tensor_digest(opened) != sealed.tensor_sha256:
        raise BadInputError(f"{artifact}: its tensors are not those that its certificate was given for")
    if read_record(artifact) is not None:
        return []
    return [
        f"the certificate in {artifact} is not compared: report.json, which says how it was measured, is not beside it"
    ]


def reproducible(artifact: Path) -> bool:
    """Whether the artifact carries a certificate of measured figures, with the report that says on which text."""
    opened = open_checkpoint(artifact)
    sealed = read_certificate(opened.metadata, opened.config, str(artifact))
    return sealed is not None and sealed.measured and read_record(artifact) is not None


def _certified(record: Record | None, judging: Judging) -> tuple[Calibration, int]:
    """How a run divided its text: as its report says, with what the user says on top."""
    calibration = Calibration() if record is None else record.calibration
    if judging.text is not None:
        calibration = replace(calibration, text=judging.text)
    elif calibration.text is not None:
        try:
            require_source(calibration.text)
        except BadInputError as error:
            raise BadInputError(
                f"{error}: it is the text of the certificate; name its place with --text, or measure on another text "
                "with --no-certificate"
            ) from None
    return calibration, 0 if record is None else record.contract.certify_tokens


def _expect_sound(artifact: Path) -> None:
    """Refuse a damaged, incomplete or changed artifact, and missing libraries, with a reason."""
    open_checkpoint(artifact)
    expect_libraries(_libraries(artifact))
    _refuse_changed(artifact)


def _measured(
    artifact: Path, source: Checkpoint, documents: Sequence[Document], judging: Judging, progress: Progress
) -> Measures:
    architecture = detect(source)
    longest = max(len(document.tokens) for document in documents)
    if said := stands_in(artifact):
        progress.say(said)
    with _opened(artifact, longest, judging.threads, cache_of(artifact, judging.kv_cache)) as session:
        if session.vocabulary != architecture.dimensions.vocabulary:
            raise BadInputError(
                f"{artifact} has a vocabulary of {session.vocabulary}, {source.location} of "
                f"{architecture.dimensions.vocabulary}: it was made from another model"
            )
        reference = ReferenceLogits(TransformersRuntime(source, architecture), documents, Path(gettempdir()), progress)
        try:
            return compare(answers(session, documents), reference, progress, "measure")
        finally:
            reference.close()


def _foreign(artifact: Path) -> FolderFormat | None:
    """The format of a folder that no runtime here reads; None for all other artifacts."""
    if runtime_name(artifact) != RUNTIME.name or not artifact.is_dir() or opens(artifact):
        return None
    return folder_format(read_config(artifact), str(artifact))


def stands_in(artifact: Path) -> str:
    """What to say of a folder that is run by its decoded weights, as no runtime here reads it; "" for all others."""
    form = _foreign(artifact)
    if form is None:
        return ""
    return f"no engine here reads {form.name} folders: their decoded weights are run in transformers, in float32"


def _opened(artifact: Path, context: int, threads: int, cache: str | None) -> Session:
    """In its own runtime, or its decoded weights in `transformers` where that reads the folder on no CPU.

    Raises UnsupportedError for one of the second kind whose engines may round what enters matrices.
    """
    form = _foreign(artifact)
    if form is None:
        return RUNTIMES.get(runtime_name(artifact)).load(entry_of(artifact), context, threads, cache)
    if form.scheme.rounds_inputs:
        raise UnsupportedError(
            f"{artifact}: engines that read {form.name} round what enters matrices, and none of them runs here"
        )
    return load_decoded(as_model(open_checkpoint(artifact)), artifact, context, threads)


def cache_of(artifact: Path, wished: str | None) -> str | None:
    """Types of the key-value cache to open an artifact with: those wished, those it was made for, or the default.

    Raises UsageError for an unknown type, UnsupportedError where the runtime cannot be told one, or not for this model.
    """
    runtime = RUNTIMES.get(runtime_name(artifact))
    if runtime.default_cache is None:
        if wished is not None:
            raise UnsupportedError(f"{artifact}: {cannot_tell(wished)}")
        return None
    metadata = open_checkpoint(artifact).metadata
    types = CacheTypes.parse(wished or str(metadata.get(KV_CACHE, runtime.default_cache)))
    if reasons := types.refuses(_head_dim(metadata)):
        raise UnsupportedError(f"{artifact}: {reasons[0]}")
    return str(types)


def _head_dim(metadata: Mapping[str, object]) -> int:
    """Elements of a head by the metadata of a GGUF file, 0 where it does not say."""
    family = metadata.get("general.architecture")
    stated, hidden, heads = (
        metadata.get(f"{family}.{key}") for key in ("attention.key_length", "embedding_length", "attention.head_count")
    )
    if isinstance(stated, int):
        return stated
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0


def generate(
    artifact: Path, prompt: str, tokens: int, temperature: float, seed: int, threads: int, kv_cache: str | None = None
) -> Iterator[str]:
    """Text that follows `prompt`, piece by piece. Raises UsageError when the prompt is longer than the model takes."""
    most = _context(open_checkpoint(artifact))
    needed = len(prompt.encode(errors="replace")) + tokens + 16  # a token is at least a byte
    with _opened(artifact, min(needed, most), threads, cache_of(artifact, kv_cache)) as session:
        count = len(session.tokenize(prompt))
        if count >= most:
            raise UsageError(f"the prompt has {count} tokens, the model takes {most}; shorten it")
        yield from session.generate(prompt, min(tokens, most - count), temperature, seed)


def _context(checkpoint: Checkpoint) -> int:
    """Tokens that the model was made for, as its own metadata says."""
    family = checkpoint.metadata.get("general.architecture")
    stated = checkpoint.metadata.get(f"{family}.context_length") or checkpoint.config.get("max_position_embeddings")
    return stated if isinstance(stated, int) and stated > 0 else LONGEST
