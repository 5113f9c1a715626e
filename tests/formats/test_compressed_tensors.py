"""compressed-tensors folders judged by the library itself and by transformers on the CPU."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open

from anyquant.core.checkpoint import read_tensor
from anyquant.core.dtypes import bfloat16_to_float32, float32_to_bfloat16
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS
from anyquant.formats.compressed_tensors.layouts import layout
from anyquant.grids import grid as find_grid
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, logits, open_model
from support.write import make_plan, write

FORM = FORMATS.get("compressed-tensors")


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_equals_the_library(bits: int) -> None:
    random = np.random.default_rng(bits)
    codes = random.integers(-(1 << (bits - 1)), 1 << (bits - 1), (48, 384), dtype=np.int8)
    codes[0, :16] = np.arange(-8, 8)
    scale = bfloat16_to_float32(float32_to_bfloat16(random.uniform(1e-4, 2, (48, 3)).astype(np.float32)))
    kind = layout(f"int{bits}-g128")
    rows = QTensor(find_grid(kind.grid), codes.shape, codes, {"scale": scale})
    packed, scales, shape = kind.pack(rows, codes.shape)
    expected = pack_to_int32(torch.from_numpy(codes), bits).contiguous().numpy()
    np.testing.assert_array_equal(packed.view("<i4"), expected)
    np.testing.assert_array_equal(shape.view("<i8"), codes.shape)
    back = kind.unpack([packed.reshape(-1), scales.reshape(-1), shape], len(codes), codes.shape)
    np.testing.assert_array_equal(back.codes, codes)
    np.testing.assert_array_equal(back.params["scale"], scale)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        kind.pack(dataclasses.replace(rows, params={"scale": scale + np.float32(1e-5)}), codes.shape)
    with pytest.raises(UnsupportedError, match="q4_k"):
        layout("q4_k")


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "apart"),
    [("llama", "BF16", False, "bf16"), ("phi3", "F32", False, "f32"), ("qwen2", "F16", True, "f16")],
)
def test_transformers_loads_it_and_computes_our_decode(
    family: str, dtype: str, tied: bool, apart: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype=dtype, tied=tied)
    checkpoint, architecture = open_model(source)
    out = tmp_path / "out"
    planned = write(checkpoint, architecture, out, chosen(architecture, "int4-g128", apart), "compressed-tensors")
    assert sum(path.stat().st_size for path in out.iterdir()) == planned.nbytes
    torch_type = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    opened = FORM.open(out, architecture)
    decoded = {name: read_tensor(opened, name) for name in opened.names()}
    assert decoded.keys() == set(checkpoint.names())
    theirs, ours = logits(out, torch_type), logits(source, torch_type, decoded)
    spread = float(ours.std())
    assert np.abs(theirs - ours).max() <= 1e-5 * spread
    assert np.abs(ours - logits(source, torch_type)).max() > 1e-2 * spread
    changed = "model.layers.1.self_attn.o_proj.weight"
    wrong = {**decoded, changed: decoded[changed] * np.float32(1.02)}
    assert np.abs(logits(source, torch_type, wrong) - theirs).max() > 1e-3 * spread


def test_files_are_what_readers_expect(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3", dtype="BF16"))
    out = tmp_path / "out"
    planned = write(checkpoint, architecture, out, chosen(architecture, "int4-g128", "bf16"), "compressed-tensors")
    config = json.loads((out / "config.json").read_text())
    read = QuantizationConfig.model_validate(config["quantization_config"])
    weights = read.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric, weights.strategy) == (4, 128, True, "group")
    assert read.ignore == ["lm_head"] and read.format == "pack-quantized"
    assert config["model_type"] == "phi3"
    with safe_open(out / "model.safetensors", "np") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        sizes = architecture.dimensions
        rows = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
        fused = "model.layers.0.self_attn.qkv_proj."
        assert tensors.get_tensor(fused + "weight_packed").shape == (rows, sizes.hidden // 8)
        assert tensors.get_tensor(fused + "weight_shape").tolist() == [rows, sizes.hidden]
        assert tensors.get_slice(fused + "weight_scale").get_dtype() == "BF16"
        assert tensors.get_slice(fused + "weight_scale").get_shape() == [rows, sizes.hidden // 128]
        assert tensors.get_slice("lm_head.weight").get_dtype() == "BF16"
        assert tensors.get_slice("model.norm.weight").get_dtype() == "BF16"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert dict(FORM.parts(out)) == {part.name: part for part in planned.files[0].parts}
    assert {part for unit in planned.units for part in unit.parts} == set(FORM.parts(out))


def test_float_folders_keep_every_byte_of_the_source(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "qwen3", dtype="BF16"))
    write(checkpoint, architecture, tmp_path / "out", "bf16", "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    copy = open_checkpoint(tmp_path / "out")
    assert set(copy.names()) == set(checkpoint.names())
    for name in copy.names():
        assert copy.spec(name) == checkpoint.spec(name)
        np.testing.assert_array_equal(read_tensor(copy, name), read_tensor(checkpoint, name))


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3"))

    def reasons(changes: Mapping[str, str], carried: str = "") -> str:
        grids = chosen(architecture, "int4-g128", "f32") | changes
        return "; ".join(FORM.refuses(architecture, make_plan(FORM, architecture, grids, "x", carried), checkpoint))

    assert reasons({}) == ""
    assert "embedding" in reasons({"embedding": "int4-g128"})
    assert reasons({"blocks.0.ffn_down": "int8-g128"}) == ""
    assert "qkv_proj is one module" in reasons({"blocks.0.attn_q": "f32"})
    assert "'q4_k'" in reasons({"blocks.0.ffn_down": "q4_k"})
    assert "type of the source" in reasons({}, carried="F16")
    experts = dataclasses.replace(architecture.dimensions, experts=4)
    plan = make_plan(FORM, architecture, chosen(architecture, "int4-g128", "f32"), "x", "")
    assert "mixture" in FORM.refuses(dataclasses.replace(architecture, dimensions=experts), plan, checkpoint)[0]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_matrices_that_vllm_fuses_share_a_grid(family: str, tmp_path: Path) -> None:
    """vLLM refuses a folder with "some but not all shards" of qkv_proj or gate_up_proj quantized."""
    _, architecture = open_model(make_checkpoint(tmp_path / "in", family))
    groups: dict[str, set[str]] = {}
    for name, group in FORM.ties(architecture).items():
        groups.setdefault(group, set()).add(name)
    wanted = [{"attn_q", "attn_k", "attn_v"}, {"ffn_gate", "ffn_up"}]
    expected = [{f"blocks.{block}.{role}" for role in roles} for block in range(2) for roles in wanted]
    assert sorted(groups.values(), key=sorted) == sorted(expected, key=sorted)


def test_presets(tmp_path: Path) -> None:
    _, architecture = open_model(make_checkpoint(tmp_path / "in", "llama"))
    grids = {name: grid for name, (grid, _) in FORM.preset("w4a16", architecture, False).items()}
    assert grids == chosen(architecture, "int4-g128", "")
    with pytest.raises(UsageError, match="W4A16"):
        FORM.preset("W4A15", architecture, False)
