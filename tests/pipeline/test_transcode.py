"""From one quantized form to another: the numbers are those of the source, as each format's own reader has them."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.errors import UnsupportedError
from anyquant.core.progress import Silent
from anyquant.formats import as_model, rules
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.decoded import gguf_model
from anyquant.pipeline.planner import Job, Model, make_job
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.rows import Unweighted
from anyquant.pipeline.run import execute
from anyquant.pipeline.transcode import EXACT, RESCALED, ROUNDED, Transcoded, transcoding
from anyquant.pipeline.verify import verify
from anyquant.store.open import open_checkpoint
from anyquant.store.publish import Stage
from support.write import write

Folder = Callable[[str], Path]
BASE = Recipe(calibration=Calibration(data_free=True))


def made(model: Folder, family: str, grid: str, form: str, out: Path) -> tuple[Path, Checkpoint]:
    """An artifact of a tiny model with its block matrices on a grid, and the model."""
    source = open_checkpoint(model(family))
    architecture = detect(source)
    stored = {"F32": "f32", "BF16": "bf16", "F16": "f16"}[source.spec(architecture.linears[1].view.tensor).dtype]
    grids = {linear.name: stored if linear.block is None else grid for linear in architecture.linears}
    if form == "gguf":
        grids |= {name: "f32" for name, one in grids.items() if one == stored}
    write(source, architecture, out, grids, form)
    return out, source


def converted(source: Checkpoint, to: str, out: Path, grid: str | None = None) -> tuple[Job, dict[str, str]]:
    """Written, and verified block by block."""
    model = Model(detect(source), source, source)
    recipe = transcoding(model, rules(to), Recipe(grid=grid, calibration=BASE.calibration))
    job = make_job(model, rules(to), recipe, False)
    with Stage(out) as stage:
        rows = Transcoded(job)
        done = execute(job, rows, stage, 1, Silent())
        errors = verify(job, stage.folder, done, Unweighted(), 1, Silent()).errors
        stage.publish()
    exact = {name for name, kind in rows.kinds.items() if kind == EXACT}
    assert all(errors[name] == 0 for name in exact)
    return job, rows.kinds


def same(one: Checkpoint, other: Checkpoint) -> None:
    """Every tensor of `other` has the values of `one`."""
    for name in other.names():
        np.testing.assert_array_equal(read_tensor(other, name), read_tensor(one, name), err_msg=name)


@pytest.mark.parametrize(
    ("family", "grid", "applied"),
    [
        ("llama", "int4-g128", "q4_0"),
        ("phi3", "int4-g64-asym", "q5_0"),
        ("qwen2", "int4-g32", "q4_0"),
        ("llama", "int4-channel", "q4_0"),
    ],
)
def test_compressed_tensors_to_gguf_and_back(
    model: Folder, tmp_path: Path, family: str, grid: str, applied: str
) -> None:
    """The GGUF is read by gguf's own reader; back again, transformers computes the same logits."""
    folder, source = made(model, family, grid, "compressed-tensors", tmp_path / "tensors")
    quantized = as_model(open_checkpoint(folder))
    job, kinds = converted(quantized, "gguf", tmp_path / "gguf")
    assert set(kinds.values()) == {EXACT}
    assert {job.plan.decisions[name].grid for name in kinds} == {applied}
    names = rules("gguf").part_names(job.architecture)
    stored = {one.name: one for one in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    down = next(linear for linear in job.architecture.linears if linear.role.value == "ffn_down")
    found = gguf.quants.dequantize(stored[names[down.name]].data, stored[names[down.name]].tensor_type)
    np.testing.assert_array_equal(found, read_tensor(quantized, down.view.tensor))

    again = gguf_model(tmp_path / "gguf" / "model.gguf", source)
    same(quantized, again)
    _, kinds = converted(again, "compressed-tensors", tmp_path / "again")
    assert set(kinds.values()) == {EXACT}
    tokens = torch.arange(64)[None]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (folder, tmp_path / "again")
    ]
    assert torch.allclose(*logits, atol=1e-5 * float(logits[0].detach().std()))


def test_a_named_grid_rescales_or_rounds_again(model: Folder, tmp_path: Path) -> None:
    folder, _ = made(model, "llama", "int4-g128-asym", "compressed-tensors", tmp_path / "tensors")
    quantized = as_model(open_checkpoint(folder))
    _, kinds = converted(quantized, "gguf", tmp_path / "rescaled", "q4_1")
    assert set(kinds.values()) <= {EXACT, RESCALED}
    _, kinds = converted(quantized, "gguf", tmp_path / "rounded", "q6_k")
    assert set(kinds.values()) == {ROUNDED}
    opened = rules("gguf").open(tmp_path / "rounded", detect(quantized))  # type: ignore[attr-defined]
    name = "model.layers.0.mlp.up_proj.weight"
    values, wanted = read_tensor(opened, name), read_tensor(quantized, name)
    assert 0 < np.square(values - wanted).sum() < 1e-3 * np.square(wanted).sum()


def test_what_has_no_place_is_rounded_again_at_like_bits(model: Folder, tmp_path: Path) -> None:
    folder, source = made(model, "llama", "nvfp4", "compressed-tensors", tmp_path / "tensors")
    job, kinds = converted(as_model(open_checkpoint(folder)), "gguf", tmp_path / "out")
    assert set(kinds.values()) == {ROUNDED}
    grids = {job.plan.decisions[name].grid for name in kinds}
    assert {find_grid(name).bits((256, 256)) / 256**2 for name in grids} == {4.5}  # of nvfp4
    with pytest.raises(UnsupportedError, match="nothing in it is quantized; use make"):
        converted(source, "gguf", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_k_quants_to_a_folder(model: Folder, tmp_path: Path) -> None:
    """The block matrices on integers of as many bits, read back by compressed-tensors' own grid; the rest in float."""
    _, source = made(model, "llama", "q4_k", "gguf", tmp_path / "gguf")
    job, kinds = converted(gguf_model(tmp_path / "gguf" / "model.gguf", source), "compressed-tensors", tmp_path / "out")
    assert set(kinds.values()) == {ROUNDED}
    assert {job.plan.decisions[name].grid for name in kinds} == {"int4-g32"}
    opened = as_model(open_checkpoint(tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    values, wanted = read_tensor(opened, name), read_tensor(source, name)
    assert np.square(values - wanted).sum() < 3e-2 * np.square(wanted).sum()
