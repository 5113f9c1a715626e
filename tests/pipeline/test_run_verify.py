"""Writing and verifying: the bytes are those of the whole tensors, however they were cut, and damage never passes."""

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from anyquant.calibrate.stats import Moments
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, BadInputError
from anyquant.core.linear import Linear
from anyquant.core.plan import Chunk, Unit
from anyquant.core.progress import Silent
from anyquant.core.qtensor import QTensor
from anyquant.formats.gguf.format import GGUFFormat
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.pipeline import blocks
from anyquant.pipeline.planner import Job
from anyquant.pipeline.rows import Direct, Unweighted
from anyquant.pipeline.run import Written, execute
from anyquant.pipeline.verify import Verified, file_hash, verify
from anyquant.store.publish import Stage
from support.jobs import job_of

Model = Callable[[str], Path]
Values = npt.NDArray[np.float32]
GRIDS = ["f32", "q8_0", "q4_k", "q6_k"]
PLAIN = Unweighted()


class Importance:
    """An importance that differs by channel, so that a block with another's channels would show."""

    def moment(self, linear: Linear) -> Moments | None:
        found = self.importance(linear)
        return None if found is None else Moments(found, 1)

    def importance(self, linear: Linear) -> Values | None:
        return np.linspace(0.1, 4.0, linear.view.columns, dtype=np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test models are small: without this, every matrix would be one block."""
    monkeypatch.setattr(blocks, "BLOCK_WEIGHTS", 1 << 14)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path / "out") as made:
        yield made


def written(job: Job, stage: Stage, threads: int = 1) -> Written:
    return execute(job, Direct(job, PLAIN), stage, threads, Silent())


def verified(job: Job, stage: Stage, done: Written) -> Verified:
    return verify(job, stage.folder, done, PLAIN, 1, Silent())


def paired(values: Values, heads: int) -> Values:
    """The row order of Llama's q and k in GGUF, as the original conversion script writes it."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_file_is_the_whole_tensors_quantized(model: Model, stage: Stage, name: str, grid: str) -> None:
    """Read by the gguf library; quantized here in one piece. Sizes and errors as planned and reported."""
    job = job_of(model(name), grid=grid, embedding=grid, head=grid)
    statistics = Importance()
    done = execute(job, Direct(job, statistics), stage, 2, Silent())
    found = verify(job, stage.folder, done, statistics, 2, Silent())
    path = stage.folder / "model.gguf"
    assert path.stat().st_size == job.layout.nbytes
    assert found.hashes == {"model.gguf": file_hash(path)}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(tensors) == set(job.layout.locate())
    heads = {"attn_q": 4, "attn_k": 2} if name == "llama" else {}
    for unit in job.layout.units:
        if not unit.linears:
            continue
        decoded = []
        for linear in (job.architecture.by_name[name] for name in unit.linears):
            whole = read_view(job.checkpoint, linear.view, 0, linear.view.rows)
            used = find_grid(grid)
            params, codes = used.quantize(whole, statistics.importance(linear))
            values = used.decode(codes, params)
            steer = used.weighting(whole, statistics.importance(linear)).astype(np.float64)
            error = (steer * (whole - values) ** 2).sum() / (steer * np.square(whole, dtype=np.float64)).sum()
            assert found.errors[linear.name] == pytest.approx(error, rel=1e-4, abs=1e-30)
            decoded.append(paired(values, heads[linear.role]) if linear.role in heads else values)
        stored = tensors[unit.name]
        got = gguf.quants.dequantize(stored.data, stored.tensor_type)
        np.testing.assert_array_equal(np.concatenate(decoded), got.reshape(-1, got.shape[-1]))


def test_the_number_of_threads_and_the_run_do_not_show(model: Model, tmp_path: Path) -> None:
    hashes = set()
    for threads in (1, 2, 2):
        job = job_of(model("llama"), grid="q4_k")
        with Stage(tmp_path / "out") as stage:
            hashes.add(verified(job, stage, written(job, stage, threads)).hashes["model.gguf"])
    assert len(hashes) == 1


def flip(path: Path, offset: int, bits: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ bits]))


def test_one_flipped_bit_anywhere_is_found(model: Model, stage: Stage) -> None:
    """In the header, in every part of it that a runtime believes, in tensor data, at both ends, and in the padding."""
    job = job_of(model("llama-tied"), grid="q8_0")
    done = written(job, stage)
    verified(job, stage, done)
    path = stage.folder / "model.gguf"
    (file,) = job.layout.files
    data = path.read_bytes()
    places = {0, 9, len(file.prefix) - 1, *range(30, len(file.prefix), 4999)}
    places.add(data.index(b"rope.freq_base") + 20)
    for part in file.parts[:6]:
        places |= {part.offset, part.offset + part.nbytes // 2, part.offset + part.nbytes - 1}
    ends = sorted((part.offset, part.offset + part.nbytes) for part in file.parts)
    places |= {stop for (_, stop), (start, _) in pairwise(ends) if stop < start}
    for place in sorted(places):
        flip(path, place)
        with pytest.raises(AnyQuantError):
            verified(job, stage, done)
        flip(path, place)
    verified(job, stage, done)


def test_a_file_of_another_length_is_found(model: Model, stage: Stage) -> None:
    job = job_of(model("llama"), grid="q8_0")
    done = written(job, stage)
    path = stage.folder / "model.gguf"
    size = path.stat().st_size
    for length in (size + 1, size - 1):
        with path.open("r+b") as file:
            file.truncate(length)
        with pytest.raises(AnyQuantError, match=r"bytes|ends|size"):
            verified(job, stage, done)


@dataclass(frozen=True)
class Swapping(GGUFFormat):
    """Packs attn_v into the place of attn_k and the reverse: both have the same shape and type."""

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        other = {"attn_k": "attn_v", "attn_v": "attn_k"}
        chunks = super().pack(unit, architecture, linear, first_row, rows)
        return [
            _renamed(chunk, {f"blk.0.{a}.weight": f"blk.0.{b}.weight" for a, b in other.items()}) for chunk in chunks
        ]


@dataclass(frozen=True)
class Unpaired(GGUFFormat):
    """Forgets the row order of q and k."""

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        return super().pack(replace(unit, permutation=""), architecture, linear, first_row, rows)


def _renamed(chunk: Chunk, names: dict[str, str]) -> Chunk:
    part = chunk.place.part
    return replace(chunk, place=replace(chunk.place, part=names.get(part, part)))


@pytest.mark.parametrize("wrong", [Swapping(), Unpaired()], ids=["swapped", "unpaired"])
def test_a_format_that_writes_a_tensor_wrongly_is_found(model: Model, stage: Stage, wrong: GGUFFormat) -> None:
    """The digests agree then, since these are the bytes that were written: only decoding them again can tell."""
    job = replace(job_of(model("llama"), grid="q8_0"), format=wrong)
    done = written(job, stage)
    with pytest.raises(AnyQuantError, match=r"blocks\.0\.attn_[kqv], rows from 0: codes or parameters differ"):
        verified(job, stage, done)


def damaged(source: Path, folder: Path, tensor: str, places: dict[tuple[int, ...], float]) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    for place, value in places.items():
        tensors[tensor][place] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tensor", "places", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", {(200, 7): np.nan, (201, 0): np.inf}, r"2 values .* nan at \(200, 7\)"),
        ("model.layers.0.self_attn.k_proj.weight", {(127, 255): -np.inf}, r"1 values? .* -inf at \(127, 255\)"),
        ("model.embed_tokens.weight", {(0, 0): np.inf, (3, 1): -np.inf}, r"2 values .* inf at \(0, 0\)"),
        ("model.layers.1.input_layernorm.weight", {(5,): np.nan}, r"1 values? .* nan at \(5,\)"),
    ],
)
def test_values_that_are_not_finite_are_named(
    model: Model, tmp_path: Path, tensor: str, places: dict[tuple[int, ...], float], said: str
) -> None:
    job = job_of(damaged(model("llama"), tmp_path / "model", tensor, places), grid="q4_k")
    with pytest.raises(BadInputError, match=said) as caught, Stage(tmp_path / "out") as stage:
        written(job, stage, threads=2)
    assert tensor in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fails_stops_the_run(model: Model, tmp_path: Path) -> None:
    """One failing write among many, in a thread: the error comes out, no thread is left, nothing stays."""
    job = job_of(model("llama"), grid="q8_0")

    class Full(Stage):
        count = 0

        def write_at(self, descriptor: int, offset: int, data: object) -> None:
            self.count += 1
            if self.count == 12:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write_at(descriptor, offset, data)

    with pytest.raises(AnyQuantError, match="the disk is full") as caught, Full(tmp_path / "out") as stage:
        written(job, stage, threads=2)
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_a_norm_that_was_written_wrongly_is_found(model: Model, stage: Stage) -> None:
    """Its digest agrees, since these are the bytes that were written: only the source can tell."""

    class Scaling(GGUFFormat):
        broken = True

        def carry(self, unit: Unit, architecture: Architecture, values: Float32) -> list[Chunk]:
            return super().carry(unit, architecture, values * np.float32(2) if self.broken else values)

    wrong = Scaling()
    job = replace(job_of(model("llama"), grid="q8_0"), format=wrong)
    done = written(job, stage)
    Scaling.broken = False
    with pytest.raises(AnyQuantError, match="attn_norm on disk differs from the source"):
        verified(job, stage, done)
