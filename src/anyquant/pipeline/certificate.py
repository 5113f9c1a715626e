"""The certificate of an artifact: made after everything was measured, put into its files, and measured again later."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.calibrate.text import Document, Splits, digest
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import AnyQuantError, BadInputError, InconclusiveError, UsageError
from anyquant.evaluation.limits import Contract
from anyquant.evaluation.measures import Measures
from anyquant.evaluation.verdict import Status, judge
from anyquant.formats.base import Format
from anyquant.formats.certificate import Certificate, read_certificate
from anyquant.pipeline.planner import Job
from anyquant.pipeline.recipe import Calibration
from anyquant.pipeline.verify import file_hash
from anyquant.store import limits
from anyquant.store.files import read_small
from anyquant.store.gguf import GGUFFile
from anyquant.store.manifest import read_manifest
from anyquant.store.publish import Stage
from anyquant.store.safetensors import SafetensorsCheckpoint
from anyquant.store.strict_json import parse_json

REPORT = "report.json"
RELATIVE, ABSOLUTE = 1e-6, 1e-10  # how near a second measurement comes; nats below which nothing is told apart
_PIECE = 1 << 22
# where files lay is no part of what was done
_PLACES = ("text", "imatrix")


def certificate_of(
    job: Job, status: str, contract: Contract, measures: Measures | None, splits: Splits | None
) -> Certificate:
    """All but the hash of the tensors, which `seal` takes from the files."""
    found = Certificate(status, contract.text(), recipe_sha256=recipe_digest(job.recipe.as_dict()))
    if measures is None or splits is None:
        return found
    return replace(
        found,
        mean_kl=measures.mean_kl.value,
        mean_kl_upper=measures.mean_kl.upper,
        documents=measures.documents,
        tokens=measures.tokens,
        text_sha256=digest(splits.certify),
    )


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """sha256 of the recipe as JSON, without the paths of its text and importance file."""
    calibration = {key: value for key, value in recipe["calibration"].items() if key not in _PLACES}
    return hashlib.sha256(json.dumps({**recipe, "calibration": calibration}, sort_keys=True).encode()).hexdigest()


def tensor_digest(checkpoint: Checkpoint) -> str:
    """sha256 over all tensors in the order of their names: name, type, shape, bytes as stored."""
    state = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        spec = checkpoint.spec(name)
        state.update(f"{name}\0{spec.dtype}\0{','.join(map(str, spec.shape))}\0".encode())
        row = spec.nbytes // max(spec.rows, 1)
        step = max(1, _PIECE // max(row, 1))
        for start in range(0, spec.rows, step):
            stop = min(start + step, spec.rows)
            buffer = np.empty((stop - start) * row, dtype=np.uint8)
            checkpoint.read_into(name, start, stop, buffer)
            state.update(buffer.data)
    return state.hexdigest()


def stored(artifact: Path) -> Checkpoint:
    """An artifact as what it is on disk, also while it is staged."""
    return SafetensorsCheckpoint(artifact) if artifact.is_dir() else GGUFFile(artifact)


def seal(job: Job, stage: Stage, certificate: Certificate, hashes: Mapping[str, str]) -> Mapping[str, str]:
    """Put the certificate into the staged files; returns the hashes of all files as they are now.

    A format without a place for it, and the neutral state, stay as they are. Raises AnyQuantError when it does not read
    back as it was written.
    """
    if not isinstance(job.format, Format):
        return hashes
    place = stage.folder / job.format.entry
    whole = replace(certificate, tensor_sha256=tensor_digest(stored(place)))
    changed = {}
    for file in job.layout.files:
        prefix = job.format.stamp(file, whole)
        if prefix is None:
            continue
        if len(prefix) != len(file.prefix):
            raise AnyQuantError(f"{file.path}: its certificate takes {len(prefix)} bytes, planned {len(file.prefix)}")
        stage.replace_start(file.path, prefix)
        changed[file.path] = file_hash(stage.folder / file.path)
    again = stored(place)
    if changed and repr(read_certificate(again.metadata, again.config, again.location)) != repr(whole.fitted()):
        raise AnyQuantError(f"{job.format.name}: the certificate reads back other than it was written")
    return {**hashes, **changed}


@dataclass(frozen=True)
class Record:
    """What report.json beside an artifact says of how it was judged; `size` in bytes, None when it is unknown."""

    recipe: Mapping[str, Any]
    calibration: Calibration
    contract: Contract
    size: int | None


def read_record(artifact: Path) -> Record | None:
    """From the report beside the artifact, or None. Raises BadInputError when it is damaged. Nothing in it is run."""
    folder = artifact if artifact.is_dir() else artifact.parent
    data = read_small(folder, REPORT, limits.SMALL_FILE_BYTES)
    if data is None:
        return None
    where = str(folder / REPORT)
    document = parse_json(data, where)
    recipe, hashes = document.get("recipe"), document.get("hashes")
    calibration = recipe.get("calibration") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(calibration, dict) or not isinstance(hashes, dict):
        raise BadInputError(f"{where}: not a report of AnyQuant")
    default = Calibration()
    known: dict[str, Any] = {}
    for name, kind in (("text", str), ("tokens", int), ("context", int), ("field", str)):
        value = calibration.get(name, getattr(default, name))
        if not isinstance(value, kind) and not (name == "text" and value is None):
            raise BadInputError(f"{where}: {name} of its calibration is {value!r}")
        known[name] = value
    try:
        contract = Contract.from_dict(document.get("contract") or {})
    except UsageError as error:
        raise BadInputError(f"{where}: {error}") from None
    manifest = read_manifest(folder)
    sizes = {} if manifest is None else {file.path: file.nbytes for file in manifest.files}
    size = sum(sizes[name] for name in hashes) if hashes and hashes.keys() <= sizes.keys() else None
    return Record(recipe, replace(default, **known), contract, size)


@dataclass(frozen=True)
class Reproduction:
    """What a second measurement found; `measures` None: the text is another one, so nothing was measured.

    `differences` say field by field what is not as the certificate has it, `unchecked` what could not be compared.
    """

    certificate: Certificate
    measures: Measures | None
    differences: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def reproduced(self) -> bool:
        return not self.differences


def expect_measured(certificate: Certificate | None, artifact: Path) -> Certificate:
    """Raise BadInputError or InconclusiveError where there is nothing to reproduce."""
    if certificate is None:
        raise BadInputError(f"{artifact} carries no certificate; leave out --certificate to measure it on a text")
    if not certificate.measured:
        raise InconclusiveError(
            f"{artifact}: its certificate says {certificate.status!r}: there is nothing to reproduce"
        )
    return certificate


def unlike_stated(
    certificate: Certificate, artifact: Checkpoint, record: Record | None, documents: tuple[Document, ...]
) -> list[str]:
    """What differs before anything is measured: tensors, recipe, limits, text."""
    found = {"tensor_sha256": tensor_digest(artifact), "text_sha256": digest(documents)}
    if record is not None:
        found["recipe_sha256"] = recipe_digest(record.recipe)
        found["limit"] = Certificate(limit=record.contract.text()).fitted().limit
    return [
        _different(certificate, name, value) for name, value in found.items() if getattr(certificate, name) != value
    ]


def unlike_measured(certificate: Certificate, record: Record | None, measures: Measures) -> list[str]:
    """What differs after it was measured: figures, and the verdict that follows from them and the report's limits.

    The verdict on a user's own metric is not taken again: a report may come from anyone, and its metric is code.
    """
    figures = {"mean_kl": measures.mean_kl.value, "mean_kl_upper": measures.mean_kl.upper}
    counts = {"documents": measures.documents, "tokens": measures.tokens}
    said = [
        _different(certificate, name, value)
        for name, value in figures.items()
        if not math.isclose(getattr(certificate, name), value, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    ]
    said += [
        _different(certificate, name, value) for name, value in counts.items() if getattr(certificate, name) != value
    ]
    if record is not None and (record.size or record.contract.max_size is None):
        rest = replace(record.contract, max_drop=())
        status = judge(measures, rest, record.size).status
        # metrics that are not taken again can spoil a verdict, not mend it
        open_still = record.contract.max_drop and (rest.empty or status is Status.PASS or certificate.status != "pass")
        if status.value != certificate.status and not open_still:
            said.append(_different(certificate, "status", status.value))
    return said


def unchecked(record: Record | None) -> tuple[str, ...]:
    """What of a certificate cannot be compared, in words."""
    if record is None:
        return ("status, limits and recipe: there is no report beside the artifact",)
    if record.contract.max_drop:
        names = ", ".join(limit.metric for limit in record.contract.max_drop)
        return (f"the verdict on metrics of one's own, whose code is not run from a report: {names}",)
    return ()


def _different(certificate: Certificate, name: str, value: object) -> str:
    stated = getattr(certificate, name)
    return f"{name} is {value!r}, the certificate says {stated!r}"
