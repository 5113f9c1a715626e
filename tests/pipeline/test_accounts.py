"""The ledger: every byte on both sides has one line, and an account that does not balance is an error."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from anyquant.core.errors import AnyQuantError
from anyquant.core.plan import Part
from anyquant.pipeline.accounts import make_ledger
from anyquant.pipeline.planner import Job
from support.jobs import job_of

Model = Callable[[str], Path]


def source_bytes(folder: Path) -> int:
    """Tensor bytes of all shards: the files without their headers (8 bytes of length, then the header)."""
    total = 0
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        total += len(data) - 8 - int.from_bytes(data[:8], "little")
    return total


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bf16", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("target", ["gguf", "state"])
def test_every_source_byte_and_every_target_byte_has_one_line(model: Model, name: str, target: str) -> None:
    job = job_of(model(name), target, grid="q8_0")
    ledger = make_ledger(job)
    lines = {line.name: line for line in ledger.lines}
    assert len(lines) == len(ledger.lines)
    assert set(lines) == {*job.architecture.by_name, *job.architecture.carried_by_name}
    listed = sum(line.source_bytes for line in ledger.lines) + sum(nbytes for _, nbytes, _ in ledger.unused)
    assert listed == source_bytes(model(name))
    assert sum(line.target_bytes for line in ledger.lines) == sum(
        part.nbytes for file in job.layout.files for part in file.parts
    )
    assert all(line.reason and line.requested and line.applied for line in ledger.lines)


def test_a_tensor_without_a_place_is_listed_with_its_reason(model: Model, tmp_path: Path) -> None:
    for file in model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    cache = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[cache] = np.ones(32, dtype=np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ledger = make_ledger(job_of(tmp_path, grid="q8_0"))
    ((name, nbytes, reason),) = ledger.unused
    assert (name, nbytes) == (cache, 128)
    assert reason


def test_errors_come_from_outside_and_go_to_their_lines(model: Model) -> None:
    job = job_of(model("llama"), grid="q8_0")
    errors = {linear.name: float(index) for index, linear in enumerate(job.architecture.linears)}
    for line in make_ledger(job, errors).lines:
        assert line.error == errors.get(line.name)


def changed(job: Job, change: Callable[[Part], Part]) -> Job:
    (file,) = job.layout.files
    parts = tuple(change(part) if part.name == "blk.1.ffn_up.weight" else part for part in file.parts)
    return replace(job, layout=replace(job.layout, files=(replace(file, parts=parts),)))


def test_an_account_that_does_not_balance_is_an_error(model: Model) -> None:
    job = job_of(model("llama"), grid="q8_0")
    with pytest.raises(AnyQuantError, match=r"bytes of blk\.1\.ffn_up\.weight are accounted for"):
        make_ledger(changed(job, lambda part: replace(part, nbytes=part.nbytes + 1)))
    forgotten = tuple(unit for unit in job.layout.units if unit.name != "blk.1.attn_norm.weight")
    with pytest.raises(AnyQuantError, match=r"of blk\.1\.attn_norm\.weight"):
        make_ledger(replace(job, layout=replace(job.layout, units=forgotten)))
    architecture = replace(job.architecture, unused={"model.norm.weight": "twice"})
    with pytest.raises(AnyQuantError, match="source bytes accounted for"):
        make_ledger(replace(job, architecture=architecture))
