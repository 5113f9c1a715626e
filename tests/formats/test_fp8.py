"""fp8 folders judged by transformers, which decodes them on a CPU, and by its own dequantization."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizers_utils import should_convert_module

from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import Activation
from anyquant.formats import FORMATS
from anyquant.formats.fp8.scheme import BLOCKS, TENSOR
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.folders import TORCH, chosen, decoded, logits, open_model, save, tensors_of
from support.write import make_plan, write

FORM = FORMATS.get("fp8")
CHANGED = "model.layers.1.self_attn.o_proj"


def make(folder: Path, grid: str = BLOCKS, family: str = "llama", dtype: str = "BF16", tied: bool = False) -> Path:
    checkpoint, architecture = open_model(make_checkpoint(folder / "in", family, dtype=dtype, tied=tied))
    write(checkpoint, architecture, folder / "out", chosen(architecture, grid, dtype.lower()), "fp8")
    return folder / "out"


@pytest.mark.parametrize("grid", [BLOCKS, TENSOR])
@pytest.mark.parametrize(
    ("family", "dtype", "tied"), [("llama", "BF16", False), ("phi3", "F32", False), ("qwen2", "F16", True)]
)
def test_transformers_loads_it_and_computes_our_decode(
    family: str, dtype: str, tied: bool, grid: str, tmp_path: Path
) -> None:
    out = make(tmp_path, grid, family, dtype, tied)
    source = tmp_path / "in"
    ours = decoded(FORM.open(out, open_model(source)[1]))
    theirs, expected = logits(out, TORCH[dtype]), logits(source, TORCH[dtype], ours)
    np.testing.assert_array_equal(theirs, expected)
    spread = float(expected.std())
    assert np.abs(expected - logits(source, TORCH[dtype])).max() > 1e-2 * spread
    tensors = tensors_of(out)
    tensors[f"{CHANGED}.weight_scale_inv"] *= 1.02
    save(out, tensors)
    assert np.abs(logits(out, TORCH[dtype]) - expected).max() > 1e-3 * spread


@pytest.mark.parametrize(("grid", "shape"), [(BLOCKS, [2, 4]), (TENSOR, [])])
def test_files_are_what_readers_expect(grid: str, shape: list[int], tmp_path: Path) -> None:
    out = make(tmp_path, grid, "qwen2", tied=True)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    read = FineGrainedFP8Config(**config)
    assert read.weight_block_size == ([128, 128] if grid == BLOCKS else None)
    assert read.activation_scheme == "dynamic"
    assert should_convert_module(CHANGED, read.modules_to_not_convert)
    assert not should_convert_module("lm_head", read.modules_to_not_convert)
    tensors = tensors_of(out)
    down = "model.layers.0.mlp.down_proj"
    assert tensors[f"{down}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{down}.weight_scale_inv"].dtype == torch.float32
    assert list(tensors[f"{down}.weight_scale_inv"].shape) == shape
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == torch.bfloat16
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    opened = FORM.open(out, open_model(tmp_path / "in")[1])
    peer = Fp8Dequantize(None)
    expected = peer._dequantize_one(tensors[f"{down}.weight"], tensors[f"{down}.weight_scale_inv"], torch.float32)
    np.testing.assert_array_equal(read_tensor(opened, f"{down}.weight"), expected.numpy())


@pytest.mark.parametrize(
    ("suffix", "reach", "extra"),
    [
        ("weight_scale", "tensor", "input_scale"),  # AutoFP8
        ("weight_scale", "row", "input_scale_ub"),  # FBGEMM
        ("weight_scale_inv", "block", "activation_scale"),
        ("weight_scale_inv", "half", None),  # Qwen3
        ("scale", "power", None),  # DeepSeek-V4
    ],
)
def test_what_others_write_is_read(suffix: str, reach: str, extra: str | None, tmp_path: Path) -> None:
    """Weights rounded by torch; 192 x 320 has blocks at the edges that are not whole, as GPUs' kernels read them."""
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16")
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(3))
    shapes = {"tensor": (1,), "row": (192, 1), "block": (2, 3), "half": (2, 3), "power": (2, 3)}
    scale = torch.rand(shapes[reach], generator=torch.Generator().manual_seed(4)) / 100 + 0.004
    if reach == "power":
        scale = scale.to(torch.float8_e8m0fnu)
    if reach == "half":
        scale = scale.bfloat16()
    wide = scale.float()
    if len(shapes[reach]) == 2 and reach != "row":
        wide = wide.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :320]
    codes = (weight / wide).to(torch.float8_e4m3fn)
    tensors = {**tensors_of(source), f"{CHANGED}.weight": codes, f"{CHANGED}.{suffix}": scale}
    if extra is not None:
        tensors[f"{CHANGED}.{extra}"] = torch.tensor([0.5])
    method = "fbgemm_fp8" if reach == "row" else "fp8"
    blocks = [128, 128] if reach in ("block", "half", "power") else None
    save(source, tensors, {"quant_method": method, "weight_block_size": blocks})
    opened = FORM.read(open_checkpoint(source))
    assert not [name for name in opened.names() if "scale" in name]
    np.testing.assert_array_equal(read_tensor(opened, f"{CHANGED}.weight"), (codes.float() * wide).numpy())


def test_a_damaged_folder_is_refused_by_name(tmp_path: Path) -> None:
    out = make(tmp_path)
    tensors = tensors_of(out)
    scale = f"{CHANGED}.weight_scale_inv"

    def refused(error: type[Exception], text: str, changes: dict[str, Any], settings: dict[str, Any]) -> None:
        save(out, {name: one for name, one in {**tensors, **changes}.items() if one is not None}, settings)
        with pytest.raises(error, match=text):
            read_tensor(FORM.read(open_checkpoint(out)), f"{CHANGED}.weight")
        save(out, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})

    refused(BadInputError, f"{CHANGED}.weight has no weight_scale_inv", {scale: None}, {})
    refused(BadInputError, r"o_proj.weight_scale_inv is F32 \[3, 1\]", {scale: torch.ones(3, 1)}, {})
    refused(BadInputError, "o_proj.weight_scale_inv is I32", {scale: tensors[scale].int()}, {})
    refused(BadInputError, "a scale is not a number", {scale: tensors[scale] * torch.nan}, {})
    refused(UnsupportedError, r"blocks of \[1, 32\]", {}, {"weight_block_size": [1, 32]})
    refused(UnsupportedError, "quantization_config is not one of", {}, {"quant_method": "gptq"})
    assert len(FORM.read(open_checkpoint(out)).modules) == 14


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3"))

    def reasons(changes: dict[str, str], dynamic: bool = False, narrow: bool = False) -> str:
        grids = chosen(architecture, BLOCKS, "f32") | changes
        plan = make_plan(FORM, architecture, grids, "x", "")
        shaped = architecture
        if dynamic:
            name = "blocks.0.attn_q"
            asked = dataclasses.replace(plan.decisions[name], input_activation=Activation("fp8_e4m3-tensor", "static"))
            plan = dataclasses.replace(plan, decisions={**plan.decisions, name: asked})
        if narrow:
            linears = tuple(
                dataclasses.replace(one, view=dataclasses.replace(one.view, rows=100 + one.view.rows))
                for one in architecture.linears
            )
            shaped = dataclasses.replace(architecture, linears=linears)
        return "; ".join(FORM.refuses(shaped, plan, checkpoint))

    assert reasons({}) == ""
    assert "not whole blocks of 128" in reasons({}, narrow=True)
    assert "begins inside a block" in reasons({}, narrow=True)
    assert "embedding" in reasons({"embedding": BLOCKS})
    assert "the head of fp8 only in float" in reasons({"head": BLOCKS})
    assert "one kind of scale" in reasons({"blocks.0.ffn_down": TENSOR})
    assert "'fp8_e4m3-channel'" in reasons({"blocks.0.ffn_down": "fp8_e4m3-channel"})
    assert "engines round the inputs" in reasons({}, dynamic=True)
