"""llama.cpp's importance matrices: GGUF files of sums of squared activations, read and written.

Format, as tools/imatrix of llama.cpp writes it: `general.type` is "imatrix"; `imatrix.datasets` (strings),
`imatrix.chunk_count` and `imatrix.chunk_size` (uint32); for each weight of the model two F32 tensors, `<name>.in_sum2`
of shape (matrices, in) and `<name>.counts` of shape (matrices, 1), where matrices is 1, or the number of experts.
Newer files add `<name>.in_sum`, the plain sums, which nothing here needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anyquant.calibrate.stats import Moments, Statistics
from anyquant.core.checkpoint import read_tensor
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, OutputError, UsageError
from anyquant.core.extras import require
from anyquant.core.linear import Linear
from anyquant.store.gguf import MAGIC, GGUFFile

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Source:
    """What the statistics come from: names of the texts, and how many chunks of how many tokens were read."""

    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int


@dataclass(frozen=True)
class Imatrix:
    """`statistics` are by Linear name, their `missing` says which have no entry.

    `unknown` are entries of the file that belong to no Linear of the model.
    """

    statistics: Statistics
    unknown: tuple[str, ...]
    source: Source


def read_imatrix(path: Path, linears: Sequence[Linear], tensors: Mapping[str, str]) -> Imatrix:
    """The importance matrix at `path` for `linears`; `tensors` maps a Linear's name to its GGUF tensor.

    A count of 0 (an expert that no token reached) means importance 1 for every channel, as llama.cpp has it.
    Raises BadInputError when the file is damaged, is not an importance matrix, or has rows of another length.
    """
    file = _open(path)
    entries = _entries(file)
    moments = {}
    for linear in linears:
        tensor = tensors.get(linear.name)
        if tensor in entries:
            moments[linear.name] = _moment(f"{path}: {tensor}", linear, *entries[tensor])
    used = {tensors[name] for name in moments}
    return Imatrix(
        Statistics(moments, tuple(linear.name for linear in linears if linear.name not in moments)),
        tuple(sorted(set(entries) - used)),
        _source(file),
    )


def write_imatrix(
    path: Path, statistics: Statistics, linears: Sequence[Linear], tensors: Mapping[str, str], source: Source
) -> tuple[str, ...]:
    """Write `statistics` as llama.cpp's imatrix tool would. Returns the Linears that have no entry in the file.

    A tensor that holds several Linears (fused projections) has one input, so the first of them speaks for it; experts
    become the rows of their tensor. Raises UsageError when `source` names no dataset (llama.cpp refuses such files),
    OutputError when `path` exists or cannot be written.
    """
    if not source.datasets:
        raise UsageError("an importance matrix must name the text that it comes from")
    left_out: list[str] = []
    rows: dict[str, dict[int, Moments]] = {}
    for linear in linears:
        moment = statistics.moment(linear)
        tensor = tensors.get(linear.name)
        if moment is None or tensor is None:
            left_out.append(linear.name)
        else:
            rows.setdefault(tensor, {}).setdefault(linear.expert or 0, moment)
    for tensor, experts in rows.items():
        if set(experts) != set(range(len(experts))):
            raise UsageError(f"{tensor}: statistics of experts {sorted(experts)} only; all of them are needed")
    if path.exists():
        raise OutputError(f"{path}: exists already; remove it or choose another name")
    staged = path.with_name(f".{path.name}.part")
    try:
        _write(staged, rows, source)
        staged.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        staged.unlink(missing_ok=True)
    return tuple(left_out)


def _write(path: Path, rows: Mapping[str, Mapping[int, Moments]], source: Source) -> None:
    gguf = require("gguf")
    writer = gguf.GGUFWriter(path, "")
    # an importance matrix is of no architecture; llama.cpp's own files do not have the key
    writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(source.datasets))
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, source.chunk_count)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, source.chunk_size)
    for tensor in sorted(rows):
        moments = [rows[tensor][expert] for expert in sorted(rows[tensor])]
        sums = np.stack([moment.second_moment.astype(np.float64) * moment.count for moment in moments])
        writer.add_tensor(tensor + SUMS, sums.astype(np.float32))
        writer.add_tensor(tensor + COUNTS, np.array([[moment.count] for moment in moments], dtype=np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _open(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror}") from error
    if start != MAGIC:
        raise BadInputError(
            f"{path}: not a GGUF file; an importance matrix of the old kind (.dat) is converted by: "
            f"llama-imatrix --in-file {path.name} --output-format gguf -o {path.stem}.gguf"
        )
    file = GGUFFile(path)
    if file.metadata.get("general.type") != "imatrix":
        raise BadInputError(f"{path}: general.type is {file.metadata.get('general.type')!r}, expected 'imatrix'")
    return file


def _entries(file: GGUFFile) -> dict[str, tuple[Float32, Float32]]:
    """Weight name -> sums (flat) and counts (flat), both finite and not negative."""
    names = set(file.names())
    entries = {}
    for name in sorted(names):
        if not name.endswith((SUMS, COUNTS)):
            continue
        weight = name.removesuffix(SUMS).removesuffix(COUNTS)
        if weight in entries:
            continue
        for suffix in (SUMS, COUNTS):
            if weight + suffix not in names:
                raise BadInputError(f"{file.location}: {weight} has no tensor {weight + suffix}")
            kind = file.spec(weight + suffix).dtype
            if kind != "F32":
                raise BadInputError(f"{file.location}: {weight + suffix} is of type {kind}, expected F32")
        sums, counts = (read_tensor(file, weight + suffix).reshape(-1) for suffix in (SUMS, COUNTS))
        for suffix, values in ((SUMS, sums), (COUNTS, counts)):
            if not np.isfinite(values).all() or (values < 0).any():
                raise BadInputError(f"{file.location}: {weight + suffix} holds a value that is negative or not finite")
        entries[weight] = sums, counts
    return entries


def _moment(place: str, linear: Linear, sums: Float32, counts: Float32) -> Moments:
    columns = linear.shape[1]
    matrices = sums.size // columns
    # files of before the counts per expert hold one count for all
    fits = sums.size == matrices * columns and counts.size in (1, matrices) and sums.size
    if not fits or (linear.expert is None and matrices != 1):
        raise BadInputError(
            f"{place}: {sums.size} sums and {counts.size} counts do not fit {linear.name}, whose rows have {columns} "
            "channels; is the file of another model?"
        )
    row = linear.expert or 0
    if row >= matrices:
        raise BadInputError(f"{place}: holds {matrices} experts, {linear.name} is number {row}")
    count = int(np.rint(counts[row if counts.size > 1 else 0]))
    if not count:
        return Moments(np.ones(columns, dtype=np.float32), 0)
    values = sums[row * columns : (row + 1) * columns].astype(np.float64) / count
    return Moments(values.astype(np.float32), count)


def _source(file: GGUFFile) -> Source:
    datasets = file.metadata.get("imatrix.datasets", ())
    numbers = [file.metadata.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size")]
    texts = not isinstance(datasets, str) and isinstance(datasets, Sequence) and all(type(x) is str for x in datasets)
    if not texts or not all(type(number) is int for number in numbers):
        raise BadInputError(
            f"{file.location}: imatrix.datasets, chunk_count or chunk_size is not of the type it must be"
        )
    return Source(tuple(datasets), *numbers)
