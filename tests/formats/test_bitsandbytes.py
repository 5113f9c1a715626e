"""bitsandbytes folders judged by the library itself and by transformers on the CPU, and its folders read back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from safetensors import safe_open
from safetensors.torch import save_file

from anyquant.core.checkpoint import Checkpoint, read_rows, read_tensor
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS
from anyquant.formats.bitsandbytes.layouts import layout
from anyquant.formats.folder.format import FolderFormat
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.runtimes import RUNTIMES
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, logits_of, open_model
from support.write import make_plan, write

FORM = FORMATS.get("bitsandbytes")
FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def reader() -> FolderFormat:
    assert isinstance(FORM, FolderFormat)
    return FORM


def loaded(folder: Path) -> Any:
    """The model in float32, its weights not repacked for bfloat16 instructions, which would round the activations."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model


def quantized(kind: str, shape: tuple[int, int], block: int, nested: bool = False) -> tuple[Any, QuantState]:
    weights = torch.from_numpy(np.random.default_rng(3).standard_normal(shape, dtype=np.float32))
    return quantize_4bit(weights * 0.1, quant_type=kind, blocksize=block, compress_statistics=nested)


def folder_of(folder: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return open_checkpoint(folder)


def four_bit_tensors(codes: Any, state: QuantState) -> dict[str, Any]:
    return {"a.weight": codes, **{f"a.weight.{name}": value for name, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_packing_equals_the_library(kind: str, group: int) -> None:
    shape = (48, 512)
    theirs, state = quantized(kind, shape, group)
    flat = theirs.numpy().reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], axis=1).reshape(shape)
    maxima = state.absmax.numpy().reshape(shape[0], -1)
    rows = QTensor(find_grid(f"{kind}-g{group}"), shape, codes, {"absmax": maxima})
    np.testing.assert_array_equal(rows.decode(), dequantize_4bit(theirs, state).numpy())
    kept = layout(f"{kind}-g{group}")
    raw = dict(zip((one.suffix for one in kept.tensors(*shape)), kept.pack(rows, shape), strict=True))
    expected = {"weight": theirs, **{f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}}
    assert raw.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(raw[name].reshape(-1), value.reshape(-1).numpy().view(np.uint8), err_msg=name)


def test_eight_bits_come_back_exactly_from_the_library() -> None:
    """Over all codes and all scales of one binade and of the far ends."""
    patterns = np.concatenate([np.arange(0x3C00, 0x3C80), [0x0080, 0x0001, 0x7800]]).astype(np.uint32) << 16
    scale = patterns.view(np.float32).reshape(-1, 1)
    codes = np.tile(np.arange(-128, 128, dtype=np.int8), (len(scale), 1))
    rows = QTensor(find_grid("int8-channel"), codes.shape, codes, {"scale": scale})
    packed, maxima, marked = layout("int8-channel").pack(rows, codes.shape)
    stored = torch.from_numpy(packed.view(np.int8).reshape(codes.shape))
    found = int8_vectorwise_dequant(stored, torch.from_numpy(maxima.view(np.float32))).numpy()
    np.testing.assert_array_equal(found, rows.decode())
    back = layout("int8-channel").unpack([packed.reshape(-1), maxima, marked], len(codes), codes.shape)
    np.testing.assert_array_equal(back.params["scale"], scale)
    np.testing.assert_array_equal(back.codes, codes)
    # what bitsandbytes itself quantizes comes back to the last bit or two
    weights = torch.from_numpy(np.random.default_rng(2).standard_normal((64, 96), dtype=np.float32))
    theirs, maximum, _ = int8_vectorwise_quant(weights.half())
    raw = [theirs.numpy().view(np.uint8).reshape(-1), maximum.numpy().view(np.uint8), marked]
    ours = layout("int8-channel").unpack(raw, 64, (64, 96)).decode()
    np.testing.assert_array_max_ulp(ours, int8_vectorwise_dequant(theirs, maximum).numpy(), 2)
    with pytest.raises(UnsupportedError, match="127"):
        layout("int8-channel").pack(
            QTensor(rows.grid, (1, 256), codes[:1], {"scale": np.full((1, 1), 0.1, np.float32)}), (1, 256)
        )


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "grid", "other"),
    [
        ("llama", "BF16", False, "nf4-g64", "fp4-g128"),
        ("phi3", "F32", False, "fp4-g64", "fp4-g64"),
        ("qwen2", "F16", True, "nf4-g64", "nf4-g32"),
        ("qwen2", "BF16", True, "int8-channel", "int8-channel"),
        ("phi3", "F32", False, "int8-channel", "f32"),
    ],
)
def test_transformers_loads_it_and_computes_our_decode(
    family: str, dtype: str, tied: bool, grid: str, other: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype=dtype, tied=tied)
    checkpoint, architecture = open_model(source)
    out = tmp_path / "out"
    grids = chosen(architecture, grid, FLOATS[dtype]) | {"blocks.1.ffn_down": other}
    planned = write(checkpoint, architecture, out, grids, "bitsandbytes")
    assert sum(path.stat().st_size for path in out.iterdir()) == planned.nbytes
    opened = FORM.open(out, architecture)
    decoded = {name: read_tensor(opened, name) for name in opened.names()}
    assert decoded.keys() == set(checkpoint.names())
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before, ours = logits_of(original), logits_of(original, decoded)
    spread = float(ours.std())
    model = loaded(out)
    eight = grid.startswith("int8")
    if eight:
        assert np.corrcoef(logits_of(model).ravel(), ours.ravel())[0, 1] > 0.99  # LLM.int8 rounds the activations, too
        model = model.dequantize(dtype=torch.float32)
    theirs = logits_of(model)
    assert np.abs(theirs - ours).max() <= 1e-5 * spread
    assert np.abs(ours - before).max() > (1e-3 if eight else 1e-2) * spread
    changed = "model.layers.1.self_attn.o_proj.weight"
    wrong = {**decoded, changed: decoded[changed] * np.float32(1.02)}
    assert np.abs(logits_of(original, wrong) - theirs).max() > 1e-3 * spread


def test_the_runtime_rounds_no_activations(tmp_path: Path) -> None:
    """With bfloat16 instructions bitsandbytes would, and the folder says to compute in bfloat16."""
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama", dtype="BF16"))
    write(checkpoint, architecture, tmp_path / "out", chosen(architecture, "nf4-g64", "bf16"), "bitsandbytes")
    opened = FORM.open(tmp_path / "out", architecture)
    decoded = {name: read_tensor(opened, name) for name in opened.names()}
    ours = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32), decoded)
    tokens = np.random.default_rng(1).integers(0, 600, (1, 96))[0].tolist()
    with RUNTIMES.get("transformers").load(tmp_path / "out") as session:
        assert np.abs(session.logits(tokens) - ours).max() <= 1e-5 * float(ours.std())


def test_files_are_what_readers_expect(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3", dtype="BF16"))
    out = tmp_path / "out"
    grids = chosen(architecture, "nf4-g64", "bf16") | {"blocks.0.attn_output": "bf16"}
    planned = write(checkpoint, architecture, out, grids, "bitsandbytes")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    read = transformers.BitsAndBytesConfig(**{key: value for key, value in settings.items() if key != "quant_method"})
    assert (read.load_in_4bit, read.load_in_8bit, read.bnb_4bit_quant_type) == (True, False, "nf4")
    assert (read.bnb_4bit_compute_dtype, read.quantization_method()) == (torch.bfloat16, "nf4")
    assert read.llm_int8_skip_modules == ["model.layers.0.self_attn.o_proj", "lm_head"]
    with safe_open(out / "model.safetensors", "pt") as tensors:
        sizes = architecture.dimensions
        rows = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        fused = "model.layers.0.self_attn.qkv_proj.weight"
        assert tensors.get_tensor(fused).shape == (rows * sizes.hidden // 2, 1)
        assert tensors.get_tensor(f"{fused}.absmax").shape == (rows * sizes.hidden // 64,)
        assert tensors.get_slice("lm_head.weight").get_dtype() == "BF16"
        assert tensors.get_slice("model.layers.0.self_attn.o_proj.weight").get_dtype() == "BF16"
    assert dict(FORM.parts(out)) == {part.name: part for part in planned.files[0].parts}


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True},
    ],
)
def test_what_transformers_saves_is_read_as_it_dequantizes_it(settings: Mapping[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "qwen2", dtype="BF16", tied=True)
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "out")  # before it first runs: that may repack the weights
    opened = reader().read(open_checkpoint(tmp_path / "out"))
    assert detect(opened).family == "qwen2"
    assert set(opened.names()) == set(open_checkpoint(source).names())
    for name, module in model.dequantize(dtype=torch.float32).named_modules():
        if f"{name}.weight" in opened.modules:
            found, expected = read_tensor(opened, f"{name}.weight"), module.weight.detach().float().numpy()
            np.testing.assert_array_max_ulp(found, expected, 2 if "load_in_8bit" in settings else 0)
            np.testing.assert_array_equal(read_rows(opened, f"{name}.weight", 5, 9), found[5:9])
    assert len(opened.modules) == 14


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"), [((8, 64), 64), ((70, 96), 64), ((33, 352), 128), ((12, 1024), 512), ((6, 480), 4096)]
)
def test_blocks_that_run_over_the_ends_of_rows_are_read(
    shape: tuple[int, int], block: int, nested: bool, tmp_path: Path
) -> None:
    codes, state = quantized("nf4", shape, block, nested)
    opened = reader().read(folder_of(tmp_path / "in", four_bit_tensors(codes, state), FOUR_BIT))
    # the definition: its own kernel for CPUs goes wrong where a block runs over the end of a row
    flat = codes.numpy().reshape(-1)
    maxima = dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    levels = state.code.numpy()[np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)]
    expected = (levels * np.repeat(maxima.numpy(), block)[: levels.size]).reshape(shape)
    if shape[1] % block == 0:
        np.testing.assert_array_equal(expected, dequantize_4bit(codes, state).numpy())
    np.testing.assert_array_equal(read_tensor(opened, "a.weight"), expected)
    np.testing.assert_array_equal(read_rows(opened, "a.weight", 3, 6), expected[3:6])


def nothing(tensors: dict[str, Any]) -> None:
    pass


def without(suffix: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        del tensors[f"a.weight{suffix}"]

    return change


def with_state(**facts: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        name = "a.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].numpy())) | facts
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def with_tensor(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"a.weight{name}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (without(".absmax"), {}, "has no weight.absmax"),
        (without(".quant_map"), {}, "has no weight.quant_map"),
        (without(""), {}, "no a.weight beside"),
        (without(".nested_absmax"), {}, "nested_absmax"),
        (without(".quant_state.bitsandbytes__nf4"), {}, "no tensor is stored so"),
        (with_state(blocksize=48), {}, "blocksize 48"),
        (with_state(shape=[16, 64]), {}, "its settings call for"),
        (with_state(shape=[8]), {}, "not that of a matrix"),
        (with_state(shape=[16, 48]), {}, "48 columns"),
        (with_state(quant_type="fp4"), {}, "quant_type is 'fp4'"),
        (with_state(nested_blocksize=0), {}, "nested_blocksize"),
        (with_state(nested_dtype="float16"), {}, "nested_dtype"),
        (with_tensor(".quant_map", torch.arange(16.0)), {}, "other levels"),
        (with_tensor(".quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8)), {}, "not valid JSON"),
        (nothing, {"llm_int8_skip_modules": ["a"]}, "llm_int8_skip_modules names it"),
        (nothing, {"llm_int8_skip_modules": ["("]}, "not a pattern"),
        (nothing, {"llm_int8_skip_modules": "a"}, "not a list"),
        (nothing, {"load_in_4bit": False}, "one of load_in_4bit"),
        (nothing, {"load_in_4bit": False, "load_in_8bit": True}, "not stored in 8 bits"),
        (nothing, {"quant_method": "gptq"}, "'gptq'"),
    ],
)
def test_bad_folders_are_refused_by_name(
    change: Callable[[dict[str, Any]], None], settings: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    tensors = four_bit_tensors(*quantized("nf4", (8, 64), 64, nested=True))
    change(tensors)
    with pytest.raises((BadInputError, UnsupportedError), match=said.replace("(", r"\(")):
        read_tensor(reader().read(folder_of(tmp_path / "in", tensors, {**FOUR_BIT, **settings})), "a.weight")


def test_an_order_for_one_kind_of_gpu_is_refused(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(4, 32, dtype=torch.int8),
        "a.SCB": torch.ones(4),
        "a.weight_format": torch.tensor(2, dtype=torch.uint8),
    }
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UnsupportedError, match="weight_format is 2"):
        read_tensor(reader().read(folder_of(tmp_path / "in", tensors, settings)), "a.weight")
    del tensors["a.SCB"]
    with pytest.raises(AnyQuantError, match="no tensor is stored so"):
        read_tensor(reader().read(folder_of(tmp_path / "in", tensors, settings)), "a.weight")


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3"))

    def reasons(changes: Mapping[str, str]) -> str:
        grids = chosen(architecture, "nf4-g64", "f32") | changes
        return "; ".join(FORM.refuses(architecture, make_plan(FORM, architecture, grids, "x", ""), checkpoint))

    assert reasons({}) == ""
    assert reasons({"blocks.0.ffn_down": "fp4-g32", "head": "nf4-g64"}) == ""
    assert "embedding" in reasons({"embedding": "nf4-g64"})
    assert "four bits or in eight" in reasons({"blocks.0.ffn_down": "int8-channel"})
    assert "write nf4-g64, whose maxima are float32" in reasons({"blocks.0.ffn_down": "nf4-g64-double"})
    assert "'int4-g128'" in reasons({"blocks.0.ffn_down": "int4-g128"})
    assert "one module" in reasons({"blocks.0.attn_q": "f32"})


def test_a_head_in_four_bits_is_loaded(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama"))
    grids = chosen(architecture, "nf4-g64", "f32") | {"head": "nf4-g64"}
    write(checkpoint, architecture, tmp_path / "out", grids, "bitsandbytes")
    model = loaded(tmp_path / "out")
    assert isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    found = dequantize_4bit(model.lm_head.weight.data, model.lm_head.weight.quant_state).numpy()
    np.testing.assert_array_equal(found, read_tensor(FORM.open(tmp_path / "out", architecture), "lm_head.weight"))
