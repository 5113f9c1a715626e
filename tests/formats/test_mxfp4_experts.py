"""gpt-oss folders: our reader against transformers, which decodes them on a CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from anyquant.core.checkpoint import read_rows, read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.formats.mxfp4.reader import read
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from support.folders import save, tensors_of

STACKS = [f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
SETTINGS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gpt-oss with random codes and scales."""
    out = tmp_path_factory.mktemp("oss")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    tensors = tensors_of(out)
    for name in STACKS:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 122, (experts, rows, columns // 32), dtype=torch.uint8)
    save(out, tensors, SETTINGS)
    return out


def test_it_decodes_as_transformers_does(folder: Path) -> None:
    opened, tensors = read(open_checkpoint(folder)), tensors_of(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded: dict[str, Any] = model.state_dict()
    for name in STACKS:
        values = read_tensor(opened, name)
        peer = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
        np.testing.assert_array_equal(values, peer.numpy())
        np.testing.assert_array_equal(values, loaded[name].float().numpy())
        assert opened.spec(name).shape == tuple(loaded[name].shape)
        flat = values.reshape(-1, values.shape[-1])
        np.testing.assert_array_equal(read_rows(opened, name, 50, len(flat) - 7), flat[50:-7])
    assert not [name for name in opened.names() if name.endswith(("_blocks", "_scales"))]
    assert "quantization_config" not in opened.config


def test_the_experts_are_found_in_it(folder: Path) -> None:
    """Every expert is a matrix of its own, as in a float folder."""
    architecture = detect(read(open_checkpoint(folder)))
    found = {linear.name: linear.shape for linear in architecture.linears if linear.expert is not None}
    assert len(found) == 6
    assert set(found.values()) == {(64, 96), (192, 64)}


@pytest.mark.parametrize(
    ("suffix", "value", "text"),
    [
        ("_scales", None, "down_proj_blocks is without"),
        ("_blocks", None, "down_proj_scales is without"),
        ("_scales", torch.zeros(3, 64, 2, dtype=torch.uint8), r"scales of U8 \[3, 64, 2\]"),
        ("_scales", torch.zeros(3, 64, 3), "scales of F32"),
        ("_scales", torch.full((3, 64, 3), 255, dtype=torch.uint8), "no number"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(
    suffix: str, value: torch.Tensor | None, text: str, folder: Path, tmp_path: Path
) -> None:
    changed = {**tensors_of(folder), f"{STACKS[0]}{suffix}": value}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save(tmp_path, {name: one for name, one in changed.items() if one is not None})
    with pytest.raises(BadInputError, match=text):
        read_tensor(read(open_checkpoint(tmp_path)), STACKS[0])


def test_another_method_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    save(tmp_path, tensors_of(folder))
    with pytest.raises(UnsupportedError, match="is not mxfp4"):
        read(open_checkpoint(tmp_path))
