"""Adapters merged as they are read, judged by peft's own merge_and_unload."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from anyquant.core.checkpoint import read_rows, read_tensor
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.formats import as_model
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from anyquant.transforms.merge import CONFIG, STEP, WEIGHTS, Merged
from support.checkpoints import make_checkpoint
from support.write import write

ATTENTION = ["q_proj", "v_proj"]


def trained(model: Any, folder: Path, **settings: Any) -> Any:
    """An adapter with random weights on `model`, saved; returns the model with it."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.copy_(value.detach() * 0.5 + 0.1 * torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return wrapped


def plain(source: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.arange(40, 104)[None]).logits[0].numpy()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION}),
        ("llama", {"r": 8, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "down_proj"], "fan_in_fan_out": False}),
        ("phi3", {"r": 3, "target_modules": ["qkv_proj", "gate_up_proj"], "lora_alpha": 9}),
        ("qwen2", {"r": 4, "target_modules": [*ATTENTION, "o_proj"], "modules_to_save": ["lm_head"]}),
        (
            "qwen3",
            {
                "target_modules": [*ATTENTION, "up_proj"],
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
                "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 31},
            },
        ),
    ],
)
def test_weights_are_those_that_peft_merges(family: str, settings: Mapping[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype="BF16")
    wrapped = trained(plain(source), tmp_path / "adapter", **settings)
    unmerged = logits(wrapped)
    state = wrapped.merge_and_unload().state_dict()
    found = Merged(open_checkpoint(source), tmp_path / "adapter")
    assert detect(found) == detect(found.base)
    assert len(found.merged) >= 3
    for name in found.names():
        ours, theirs = read_tensor(found, name), state[name].float().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max(), err_msg=name)
        changed = np.abs(ours - read_tensor(found.base, name)).max() > 1e-3
        assert changed == (name in found.merged)
    model = plain(source)
    weights = {name: torch.from_numpy(read_tensor(found, name)) for name in found.names()}
    assert model.load_state_dict(weights, strict=True)
    assert np.abs(logits(model) - unmerged).max() < 1e-4 * unmerged.std()
    assert np.abs(logits(plain(source)) - unmerged).max() > 1e-2 * unmerged.std()


def test_rows_do_not_depend_on_what_is_read_with_them(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="F16")
    trained(plain(source), tmp_path / "adapter", target_modules=["up_proj", "embed_tokens"])
    found = Merged(open_checkpoint(source), tmp_path / "adapter")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        whole = read_tensor(found, name)
        for start, stop in ((0, 3), (STEP - 1, STEP + 2), (len(whole) - 1, len(whole)), (7, 7)):
            np.testing.assert_array_equal(read_rows(found, name, start, stop), whole[start:stop])


@pytest.mark.parametrize("grid", ["nf4-g64", "int8-channel"])
def test_a_quantized_base_is_merged_as_peft_merges_its_decoded_weights(grid: str, tmp_path: Path) -> None:
    """The adapter of a QLoRA: trained on the folder that bitsandbytes loads."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", "llama", dtype="BF16"))
    architecture = detect(checkpoint)
    grids = {linear.name: "bf16" if linear.block is None else grid for linear in architecture.linears}
    write(checkpoint, architecture, tmp_path / "base", grids, "bitsandbytes")
    base = plain(tmp_path / "base")
    trained(base, tmp_path / "adapter", r=4, target_modules=["q_proj", "down_proj"])
    decoded = plain(tmp_path / "base").dequantize(dtype=torch.float32)
    state = peft.PeftModel.from_pretrained(decoded, tmp_path / "adapter").merge_and_unload().state_dict()
    found = Merged(as_model(open_checkpoint(tmp_path / "base")), tmp_path / "adapter")
    assert len(found.merged) == 4
    for name in found.names():
        theirs = state[name].float().numpy()
        np.testing.assert_allclose(read_tensor(found, name), theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def keep(settings: dict[str, Any], tensors: dict[str, Any]) -> None:
    pass


def setting(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(settings: dict[str, Any], tensors: dict[str, Any]) -> None:
        settings.update(changes)

    return change


FIRST = "base_model.model.model.layers.0.self_attn.q_proj."


def tensor(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(settings: dict[str, Any], tensors: dict[str, Any]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (setting(use_dora=True), "use_dora is True"),
        (setting(bias="all"), "bias is 'all'"),
        (setting(lora_bias=True), "lora_bias"),
        (setting(peft_type="VERA"), "'VERA'"),
        (setting(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
        (setting(layer_replication=[[0, 1]]), "layer_replication"),
        (setting(target_parameters=["experts.gate_up_proj"]), "target_parameters"),
        (setting(something_new=0.5), "something_new is 0.5"),
        (setting(r=5), "their config says 5"),
        (setting(lora_alpha=None), "lora_alpha is None"),
        (setting(rank_pattern={"(": 4}), "not a pattern"),
        (setting(fan_in_fan_out=True), "which way round"),
        (tensor(f"{FIRST}lora_A.weight", None), "no other factor"),
        (tensor(f"{FIRST}lora_magnitude_vector", torch.ones(4)), "lora_magnitude_vector is no factor"),
        (tensor(f"{FIRST}lora_A.weight", torch.ones(4, 96)), "256 x 96"),
        (tensor(f"{FIRST}lora_A.weight", torch.ones(4, 256, dtype=torch.int32)), "not a matrix of weights"),
        (tensor("base_model.model.model.layers.9.mlp.up_proj.weight", torch.ones(2, 2)), "matches no tensor"),
        (tensor("base_model.model.lm_head.weight", torch.ones(2, 256)), "cannot replace lm_head.weight"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    change: Callable[[dict[str, Any], dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "in", "llama")
    folder = tmp_path / "adapter"
    trained(plain(source), folder, r=4, target_modules=["q_proj"])
    Merged(open_checkpoint(source), folder)
    settings, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(settings, tensors)
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises((BadInputError, UnsupportedError), match=said.replace("(", r"\(")):
        Merged(open_checkpoint(source), folder)


def test_other_folders_and_tied_embeddings_are_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "qwen2", tied=True)
    with pytest.raises(BadInputError, match=r"adapter_config\.json: cannot be read"):
        Merged(open_checkpoint(source), source)
    trained(plain(source), tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(AnyQuantError, match="also the head"):
        Merged(open_checkpoint(source), tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS).unlink()
    with pytest.raises(BadInputError, match="Pickles are not read"):
        Merged(open_checkpoint(source), tmp_path / "adapter")
