"""Quark folders judged by what AMD's Quark itself wrote (tests/golden/quark, see tools/record_quark.py)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import Activation
from anyquant.formats import FORMATS
from anyquant.formats.folder.reader import QuantizedFolder
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, decoded, facts, open_model, save, tensors_of
from support.write import make_plan, write

FORM = FORMATS.get("quark")
GOLDEN = Path(__file__).parent.parent / "golden" / "quark"
MODULE = "model.layers.0.mlp.down_proj"
SCHEMES = {
    "fp8": "fp8_e4m3-tensor",
    "fp8-static": "fp8_e4m3-tensor",
    "fp8-channel": "fp8_e4m3-channel",
    "int8": "int8-channel",
    "mxfp4": "mxfp4",
    "mxfp4-both": "mxfp4",
    "mxfp6_e2m3": "mxfp6_e2m3",
    "mxfp6_e3m2": "mxfp6_e3m2",
}
# the inputs that the golden file rounds; those of fp8 engines round in any case
ROUNDED = {
    "int8": Activation("int8-channel", "dynamic"),
    "mxfp4-both": Activation("mxfp4", "dynamic"),
    "mxfp6_e3m2": Activation("mxfp6_e3m2", "dynamic"),
}
WRITTEN = [name for name in SCHEMES if name != "fp8-static"]


def theirs(folder: Path, name: str, settings: dict[str, Any] | None = None, **tensors: Any) -> QuantizedFolder:
    """A folder with the one module that was recorded; `tensors` take the place of its own, None of nothing."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    kept = {**load_file(GOLDEN / f"{name}.safetensors"), **tensors, "decoded": None}
    stored = {f"{MODULE}.{suffix}": one for suffix, one in kept.items() if one is not None}
    save(folder, stored, facts(GOLDEN, name)["quantization_config"] | (settings or {}))
    return FORM.read(open_checkpoint(folder))


@pytest.mark.parametrize("name", SCHEMES)
def test_quark_files_decode_to_its_own_numbers_and_are_packed_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    opened = theirs(tmp_path / "in", name)
    weight = f"{MODULE}.weight"
    assert list(opened.names()) == [weight] and opened.grid_of(weight) == SCHEMES[name]
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    np.testing.assert_array_equal(read_tensor(opened, weight)[:4], tensors["decoded"].numpy())
    kind = FORM.scheme.layout(SCHEMES[name])
    packed = kind.pack(opened.quantized_rows(weight, 0, 128), (128, 256))
    stored = kind.tensors(128, 256)
    assert {one.suffix for one in stored} == set(tensors) - {"decoded", "input_scale"}
    for one, raw in zip(stored, packed, strict=True):
        wanted = tensors[one.suffix].contiguous()
        assert one.shape == tuple(wanted.shape)
        got = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(got, wanted.reshape(-1).view(torch.uint8).numpy(), one.suffix)


def make(folder: Path, grids: dict[str, str], rounded: Activation | None = None, family: str = "llama") -> Path:
    checkpoint, architecture = open_model(make_checkpoint(folder / "in", family, dtype="BF16", tied=family == "qwen2"))
    inputs = dict.fromkeys([one.name for one in architecture.linears if one.block is not None], rounded)
    write(
        checkpoint, architecture, folder / "out", chosen(architecture, "bf16", "bf16") | grids, "quark", inputs=inputs
    )
    return folder / "out"


def everywhere(folder: Path, family: str, grid: str) -> dict[str, str]:
    _, architecture = open_model(make_checkpoint(folder / "names", family))
    return {linear.name: grid for linear in architecture.linears if linear.block is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("name", WRITTEN)
def test_our_folders_have_the_settings_of_quark_and_decode_to_what_was_chosen(
    name: str, family: str, tmp_path: Path
) -> None:
    grid = SCHEMES[name]
    out = make(tmp_path, everywhere(tmp_path, family, grid), ROUNDED.get(name), family)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == facts(GOLDEN, name)["quantization_config"]
    kinds = {key: str(one.dtype).removeprefix("torch.") for key, one in tensors_of(out).items()}
    expected = {key: dtype for key, (dtype, _) in facts(GOLDEN, name)["tensors"].items() if key.startswith(MODULE)}
    assert {key: dtype for key, dtype in kinds.items() if key.startswith(MODULE)} == expected
    checkpoint, architecture = open_model(tmp_path / "in")
    ours, source = decoded(FORM.open(out, architecture)), decoded(checkpoint)
    quantized = {linear.view.tensor for linear in architecture.linears if linear.block is not None}
    assert set(ours) == set(source)
    for tensor, values in source.items():
        wanted = values
        if tensor in quantized:
            kind = find_grid(grid)
            params, codes = kind.quantize(values, None, kind.prepare(float(np.abs(values).max())) or None)
            wanted = kind.decode(codes, params)
            assert np.abs(wanted - values).max() > 0
        np.testing.assert_array_equal(ours[tensor], wanted, tensor)


def test_a_mixture_names_what_is_not_usual(tmp_path: Path) -> None:
    grids = everywhere(tmp_path, "llama", "mxfp4") | {
        "blocks.1.ffn_down": "fp8_e4m3-channel",
        "blocks.0.ffn_up": "bf16",
    }
    grids |= {"blocks.0.ffn_gate": "bf16"}
    out = make(tmp_path, grids)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    other = "model.layers.1.mlp.down_proj"
    assert config["global_quant_config"] == facts(GOLDEN, "mxfp4")["quantization_config"]["global_quant_config"]
    eight = facts(GOLDEN, "fp8-channel")["quantization_config"]["global_quant_config"]
    assert config["layer_quant_config"] == {other: eight}
    assert config["exclude"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "lm_head"]
    opened = FORM.open(out, open_model(tmp_path / "in")[1])
    assert opened.grid_of(f"{other}.weight") == "fp8_e4m3-channel"
    assert opened.grid_of(f"{MODULE}.weight") == "mxfp4"
    assert opened.grid_of("model.layers.0.mlp.up_proj.weight") is None


@pytest.mark.parametrize(
    ("name", "error", "text", "settings", "tensors"),
    [
        ("mxfp4", BadInputError, "has no weight_scale;", {}, {"weight_scale": None}),
        ("mxfp4", BadInputError, r"weight_scale is U8 \[128, 4\]", {}, {"weight_scale": torch.zeros(128, 4).byte()}),
        ("fp8", BadInputError, r"weight_scale is F32 \[2\]", {}, {"weight_scale": torch.ones(2)}),
        ("fp8", BadInputError, "a scale is not a number", {}, {"weight_scale": torch.tensor(torch.nan)}),
        ("int8", BadInputError, "not finite", {}, {"weight_scale": torch.full((128,), torch.inf)}),
        ("mxfp4", BadInputError, "its settings exclude it", {"exclude": ["re:.*down_proj"]}, {}),
        ("mxfp4", BadInputError, "its settings exclude it", {"exclude": ["*down_proj"]}, {}),
        ("mxfp4", UnsupportedError, "do not describe the weight", {"global_quant_config": {"weight": [{}, {}]}}, {}),
        (
            "mxfp4",
            UnsupportedError,
            "dtype fp4, qscheme per_group, group_size 16",
            {
                "layer_quant_config": {
                    "*down_proj": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 16}}
                }
            },
            {},
        ),
        (
            "int8",
            UnsupportedError,
            "symmetric False",
            {
                "layer_type_quant_config": {
                    "Linear": {"weight": {"dtype": "int8", "qscheme": "per_tensor", "symmetric": False}}
                }
            },
            {},
        ),
        (
            "fp8",
            BadInputError,
            "several entries",
            {"layer_quant_config": {"*down_proj": {}, "*mlp*": {"weight": {}}}},
            {},
        ),
        ("fp8", UnsupportedError, "is not Quark's", {"quant_method": "fp8"}, {}),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    name: str, error: type[Exception], text: str, settings: dict[str, Any], tensors: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        read_tensor(theirs(tmp_path / "in", name, settings, **tensors), f"{MODULE}.weight")


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3"))

    def reasons(grid: str, asked: Activation | None = None, only: str = "", **changes: str) -> str:
        grids = chosen(architecture, grid, "f32") | changes
        plan = make_plan(FORM, architecture, grids, "x", "")
        decisions = {
            name: dataclasses.replace(one, input_activation=asked) if _rounds(architecture, name, only) else one
            for name, one in plan.decisions.items()
        }
        return "; ".join(FORM.refuses(architecture, dataclasses.replace(plan, decisions=decisions), checkpoint))

    eight, four = Activation("int8-channel", "dynamic"), Activation("mxfp4", "dynamic")
    assert reasons("mxfp4") == reasons("mxfp4", four) == reasons("int8-channel", eight) == ""
    assert "runs with rounded inputs only" in reasons("int8-channel")
    assert "inputs rounded to int8-channel (dynamic) are not written beside mxfp4" in reasons("mxfp4", eight)
    assert "its inputs are rounded or not" in reasons("mxfp4", four, "blocks.0.attn_q")
    assert "the head of quark only in float" in reasons("mxfp4", head="mxfp4")
    assert "'int4-g128'" in reasons("int4-g128")


def _rounds(architecture: Architecture, name: str, only: str) -> bool:
    return name == only if only else architecture.by_name[name].block is not None
