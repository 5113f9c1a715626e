"""ModelOpt folders judged by what ModelOpt itself wrote (tests/golden/modelopt, see tools/record_modelopt.py)."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import Activation
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS
from anyquant.formats.folder.integers import Int8Layout
from anyquant.formats.folder.minifloat import NvLayout
from anyquant.formats.folder.reader import QuantizedFolder
from anyquant.formats.modelopt.layouts import Int4Layout, Smoothed
from anyquant.formats.modelopt.scheme import ModelOpt
from anyquant.grids import grid as find_grid
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, decoded, facts, open_model, save, tensors_of
from support.write import make_plan, write

FORM = FORMATS.get("modelopt")
GOLDEN = Path(__file__).parent.parent / "golden" / "modelopt"
MODULE = "model.layers.0.mlp.down_proj"
# golden file and the grid of its weights
SCHEMES = {
    "fp8": "fp8_e4m3-tensor",
    "fp8-channel": "fp8_e4m3-channel",
    "fp8-block": "fp8_e4m3-block",
    "nvfp4": "nvfp4",
    "w4a16-nvfp4": "nvfp4",
    "mxfp8": "mxfp8_e4m3",
    "int4": "int4-g128",
    "int4-awq": "int4-g128",
    "int8": "int8-channel",
    "int8-smooth": "int8-channel",
}
WRITTEN = ("fp8-channel", "fp8-block", "w4a16-nvfp4", "mxfp8", "int4", "int8")


def theirs(name: str, folder: Path, legacy: bool = False) -> QuantizedFolder:
    """A folder with the one module that was recorded, its settings in config.json or in the older file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    tensors.pop("decoded")
    settings = None if legacy else facts(GOLDEN, name)["quantization_config"]
    save(folder, {f"{MODULE}.{suffix}": one for suffix, one in tensors.items()}, settings)
    if legacy:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "hf_quant_config.json").write_text(json.dumps(facts(GOLDEN, name)["hf_quant_config"]))
    return FORM.read(open_checkpoint(folder))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_modelopt_files_decode_to_its_own_numbers_and_are_packed_to_the_same_bytes(
    name: str, legacy: bool, tmp_path: Path
) -> None:
    opened = theirs(name, tmp_path / "in", legacy)
    weight = f"{MODULE}.weight"
    assert list(opened.names()) == [weight] and opened.grid_of(weight) == SCHEMES[name]
    assert opened.spec(weight).shape == (128, 256)
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    expected = tensors["decoded"].numpy()
    factors = tensors.get("pre_quant_scale", torch.ones(256)).numpy()
    # their simulation multiplies with max / 7 or by two scales in turn: another last bit
    np.testing.assert_allclose(read_tensor(opened, weight)[:4], expected * factors, rtol=5e-7, atol=1e-9)
    layout = opened.modules[weight].layout
    inner = layout.inner if isinstance(layout, Smoothed) else layout
    whole = dataclasses.replace(opened.quantized_rows(weight, 0, 128), corrections=())
    assert np.abs(whole.decode()).max() > 0
    kept = dataclasses.replace(inner, extras=())  # type: ignore[type-var]
    packed = kept.pack(whole, (128, 256))
    for one, raw in zip(kept.tensors(128, 256), packed, strict=True):
        stored = tensors[one.suffix].contiguous().reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(raw).reshape(-1).view(np.uint8), stored, one.suffix)


def make(folder: Path, grid: str | dict[str, str], family: str = "llama", tied: bool = False) -> Path:
    checkpoint, architecture = open_model(make_checkpoint(folder / "in", family, dtype="BF16", tied=tied))
    grids = chosen(architecture, "bf16", "bf16") | grid if isinstance(grid, dict) else None
    write(checkpoint, architecture, folder / "out", grids or chosen(architecture, str(grid), "bf16"), "modelopt")
    return folder / "out"


@pytest.mark.parametrize("name", WRITTEN)
def test_our_folders_have_the_settings_and_tensors_of_modelopt(name: str, tmp_path: Path) -> None:
    out, golden = make(tmp_path, SCHEMES[name]), facts(GOLDEN, name)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    legacy = json.loads((out / "hf_quant_config.json").read_text())
    assert config == golden["quantization_config"]
    assert legacy == golden["hf_quant_config"]
    kinds = {key: str(one.dtype).removeprefix("torch.") for key, one in tensors_of(out).items()}
    expected = {key: dtype for key, (dtype, _) in golden["tensors"].items() if key.startswith(MODULE)}
    if name == "int4":  # TensorRT-LLM asks for it
        expected[f"{MODULE}.pre_quant_scale"] = "bfloat16"
    assert {key: dtype for key, dtype in kinds.items() if key.startswith(MODULE)} == expected
    sizes = {key: list(one.shape) for key, one in tensors_of(out).items()}
    for key, (_, shape) in golden["tensors"].items():
        if not key.startswith(MODULE):
            continue
        # 128 x 256 there, 256 x 512 here: axes are twice as long, and of blocks of 128 rows there was one
        blocks = (0, 2) if name == "fp8-block" and key.endswith("scale") else range(len(shape))
        assert sizes[key] == [2 * size if axis in blocks else size for axis, size in enumerate(shape)], key


@pytest.mark.parametrize(
    ("name", "grid", "activation", "expected"),
    [
        ("fp8", "fp8_e4m3-tensor", Activation("fp8_e4m3-tensor", "static"), 6.0 / 448),
        ("nvfp4", "nvfp4", Activation("nvfp4", "dynamic"), 2.0**-8),  # 4 * 448 / 6 lies between 2^8 and 2^9
    ],
)
def test_inputs_with_a_static_scale(
    name: str, grid: str, activation: Activation, expected: float, tmp_path: Path
) -> None:
    """Settings and tensors are those of a folder that ModelOpt wrote; the scale is that of the largest input, 6."""
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama", dtype="F32"))
    blocks = [linear.name for linear in architecture.linears if linear.block is not None]
    maxima = dict.fromkeys(blocks, 6.0) | {"blocks.0.attn_q": 1.0}  # what engines fuse shares the largest
    inputs = dict.fromkeys(blocks, activation)
    grids = chosen(architecture, grid, "f32")
    write(checkpoint, architecture, tmp_path / "out", grids, "modelopt", inputs=inputs, maxima=maxima)
    golden, tensors = facts(GOLDEN, name), tensors_of(tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        == golden["quantization_config"]
    )
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == golden["hf_quant_config"]
    kinds = {key: str(one.dtype).removeprefix("torch.") for key, one in tensors.items() if key.startswith(MODULE)}
    assert kinds == {key: kind for key, (kind, _) in golden["tensors"].items() if key.startswith(MODULE)}
    scales = {key: one for key, one in tensors.items() if key.endswith("input_scale")}
    assert len(scales) == len(blocks) and all(one.shape == () for one in scales.values())
    assert all(float(one) == pytest.approx(expected, rel=1e-6) for one in scales.values())
    bare = make_plan(FORM, architecture, grids, "x", "")
    assert ("FP8 needs the scale" in " ".join(FORM.refuses(architecture, bare, checkpoint))) == (name == "fp8")


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_decodes_to_what_was_chosen(name: str, family: str, tmp_path: Path) -> None:
    """Fused modules (Phi-3), biases and a tied head (Qwen2): every tensor of the source is there again."""
    grid = SCHEMES[name]
    out = make(tmp_path, grid, family, tied=family == "qwen2")
    checkpoint, architecture = open_model(tmp_path / "in")
    opened = FORM.open(out, architecture)
    assert set(opened.names()) == set(checkpoint.names())
    ours, source = decoded(opened), decoded(checkpoint)
    quantized = {linear.view.tensor for linear in architecture.linears if linear.block is not None}
    for tensor, values in source.items():
        expected = values
        if tensor in quantized:
            kind = find_grid(grid)
            params, codes = kind.quantize(values, None, kind.prepare(float(np.abs(values).max())))
            expected = kind.decode(codes, params)
            assert np.abs(expected - values).max() > 0
        np.testing.assert_array_equal(ours[tensor], expected, tensor)
    excluded = json.loads((out / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert excluded == ["lm_head", "model.embed_tokens"]


def test_nibbles_and_scales_by_another_hand(tmp_path: Path) -> None:
    """transformers' own table of 4-bit floats, the even column in the low half, times both scales: exact."""
    out = make(tmp_path, "nvfp4")
    tensors = tensors_of(out)
    values = Fp8Dequantize(None)._unpack_fp4(tensors[f"{MODULE}.weight"])
    scale = tensors[f"{MODULE}.weight_scale"].float() * tensors[f"{MODULE}.weight_scale_2"]
    assert 0 < float(tensors[f"{MODULE}.weight_scale_2"]) < 1e-2
    expected = (values * scale.repeat_interleave(16, 1)).numpy()
    opened = FORM.open(out, open_model(tmp_path / "in")[1])
    np.testing.assert_array_equal(read_tensor(opened, f"{MODULE}.weight"), expected)


def test_two_rows_share_a_byte() -> None:
    codes = np.array([[1, -8], [7, -1], [0, 3], [-2, 2]], dtype=np.int8).repeat(16, 1)
    grid = find_grid("int4-g32")
    rows = QTensor(grid, codes.shape, codes, {"scale": np.ones((4, 1), dtype=np.float32)})
    layout = Int4Layout(32)
    packed = layout.pack(rows, codes.shape)
    np.testing.assert_array_equal(packed[0][:, [0, 16]], [[0x71, 0xF8], [0xE0, 0x23]])
    np.testing.assert_array_equal(packed[2].view("<u2"), np.full(32, 0x3F80))
    back = layout.unpack([one.reshape(-1).view(np.uint8) for one in packed], 4, codes.shape)
    np.testing.assert_array_equal(back.codes, codes)


def test_a_mixture_names_its_layers(tmp_path: Path) -> None:
    roles = {"attn_q": "nvfp4", "attn_k": "nvfp4", "attn_v": "nvfp4", "attn_output": "int4-g128"}
    grids = {f"blocks.{block}.{role}": grid for block in (0, 1) for role, grid in roles.items()}
    grids |= {f"blocks.{block}.ffn_down": "fp8_e4m3-channel" for block in (0, 1)}
    out, golden = make(tmp_path, grids), facts(GOLDEN, "mixed")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    legacy = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    names = {"q_proj": 6, "o_proj": 2, "down_proj": 2}
    assert legacy["quant_algo"] == "MIXED_PRECISION" and len(legacy["quantized_layers"]) == sum(names.values())
    for role, layer in golden["hf_quant_config"]["quantization"]["quantized_layers"].items():
        assert [one for path, one in config["quantized_layers"].items() if path.endswith(role)] == [layer] * 2
    assert config["quantized_layers"] == legacy["quantized_layers"]
    for name, group in golden["quantization_config"]["config_groups"].items():
        role = group.pop("targets")[0]
        targets = config["config_groups"][name].pop("targets")
        assert len(targets) == names[role] and any(target.endswith(role) for target in targets)
        assert config["config_groups"][name] == group
    opened = FORM.open(out, open_model(tmp_path / "in")[1])
    assert opened.grid_of(f"{MODULE}.weight") == "fp8_e4m3-channel"
    assert opened.grid_of("model.layers.1.self_attn.k_proj.weight") == "nvfp4"
    assert opened.grid_of("model.layers.1.mlp.up_proj.weight") is None


def test_a_damaged_folder_is_refused_by_name(tmp_path: Path) -> None:
    out = make(tmp_path, "nvfp4")
    tensors = tensors_of(out)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    original = tmp_path / "original"
    shutil.copytree(out, original)

    def refused(error: type[Exception], text: str, tensors_: dict[str, Any], settings_: dict[str, Any]) -> None:
        shutil.rmtree(out)
        shutil.copytree(original, out)
        save(out, {name: one for name, one in {**tensors, **tensors_}.items() if one is not None}, settings_)
        with pytest.raises(error, match=text):
            read_tensor(FORM.read(open_checkpoint(out)), f"{MODULE}.weight")

    layers = {MODULE: {"quant_algo": "NVFP4"}}
    refused(BadInputError, "has no weight_scale;", {f"{MODULE}.weight_scale": None}, {})
    refused(BadInputError, "has no weight_scale_2", {f"{MODULE}.weight_scale_2": None}, {})
    refused(BadInputError, "weight_scale_2 is -1", {f"{MODULE}.weight_scale_2": torch.tensor(-1.0)}, {})
    refused(BadInputError, r"weight_scale is F32", {f"{MODULE}.weight_scale": torch.ones(256, 32)}, {})
    refused(UnsupportedError, "quant_algo NVFP5", {}, {"quant_algo": "NVFP5"})
    refused(BadInputError, "name no quant_algo", {}, {"quant_algo": None})
    refused(BadInputError, "without quantized_layers", {}, {"quant_algo": "MIXED_PRECISION"})
    refused(BadInputError, "does not name it", {}, {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    refused(
        BadInputError,
        "quantized_layers names model.x,",
        {},
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": dict.fromkeys(_paths(tensors) | {"model.x"}, layers[MODULE]),
        },
    )
    refused(BadInputError, "does not fit", {}, {"quant_algo": "FP8"})
    refused(BadInputError, "does not fit", {}, {"quant_algo": "W4A16_AWQ"})
    refused(UnsupportedError, "is not ModelOpt's", {}, {"quant_method": "awq"})
    assert settings["quant_algo"] == "W4A16_NVFP4"


def _paths(tensors: dict[str, Any]) -> set[str]:
    return {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3"))

    def reasons(changes: dict[str, str], grid: str = "nvfp4", change: Callable[[Any], Any] = lambda one: one) -> str:
        plan = make_plan(FORM, architecture, chosen(architecture, grid, "f32") | changes, "x", "")
        linears = tuple(change(one) for one in architecture.linears)
        return "; ".join(FORM.refuses(dataclasses.replace(architecture, linears=linears), plan, checkpoint))

    def longer(rows: int) -> Callable[[Any], Any]:
        return lambda one: dataclasses.replace(one, view=dataclasses.replace(one.view, rows=rows + one.view.rows))

    assert [reasons({}, SCHEMES[name]) for name in WRITTEN] == [""] * len(WRITTEN)
    assert "the head of modelopt only in float" in reasons({"head": "nvfp4"})
    assert "embedding" in reasons({"embedding": "nvfp4"})
    assert "FP8 needs the scale of its inputs" in reasons({}, "fp8_e4m3-tensor")
    assert "'q4_k'" in reasons({"blocks.0.ffn_down": "q4_k"})
    assert "of all modules" in reasons({"blocks.0.ffn_down": "fp8_e4m3-block"})
    assert "not a multiple of 2" in reasons({}, "int4-g32", longer(1))
    assert "not a multiple of 128" in reasons({}, "fp8_e4m3-block", longer(64))
    assert "qkv_proj is one module" in reasons({"blocks.0.attn_q": "f32"})


@pytest.mark.parametrize(
    ("grid", "asked", "allowed"),
    [
        ("nvfp4", Activation("nvfp4", "static"), False),
        ("fp8_e4m3-channel", Activation("fp8_e4m3-channel", "dynamic"), True),
        ("fp8_e4m3-channel", Activation("fp8_e4m3-tensor", "static"), False),
        ("mxfp8_e4m3", Activation("mxfp8_e4m3", "dynamic"), True),
        ("int4-g128", Activation("int8-channel", "dynamic"), False),
    ],
)
def test_inputs_are_rounded_as_the_algorithm_says_or_not_at_all(
    grid: str, asked: Activation, allowed: bool, tmp_path: Path
) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama"))
    plan = make_plan(FORM, architecture, chosen(architecture, grid, "f32"), "x", "")
    name = "blocks.0.attn_q"
    decision = dataclasses.replace(plan.decisions[name], input_activation=asked)
    plan = dataclasses.replace(plan, decisions={**plan.decisions, name: decision})
    reasons = FORM.refuses(architecture, plan, checkpoint)
    assert (reasons == []) == allowed
    assert allowed or f"rounded to {asked.grid}" in reasons[0]


def test_layouts_without_a_home() -> None:
    assert ModelOpt().layout("int8-channel") == Int8Layout()
    assert ModelOpt().layout("nvfp4") == NvLayout()
    with pytest.raises(UnsupportedError, match="int4-gN"):
        ModelOpt().layout("int4-g128-asym")
