"""torchao folders judged by torchao itself and by transformers on the CPU, and its folders read back.

torchao is no part of the development environment: transformers imports it wherever it is, and it prints what it misses.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.formats import FORMATS, as_model
from anyquant.models.detect import detect
from anyquant.runtimes import RUNTIMES
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, logits_of
from support.write import make_plan, write

quantization = pytest.importorskip("torchao.quantization")
granularity = pytest.importorskip("torchao.quantization.granularity")
FORM = FORMATS.get("torchao")


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "grid"),
    [
        ("llama", "BF16", False, "int8-channel"),
        ("llama", "BF16", False, "int4-g64"),
        ("phi3", "F32", False, "int4-g64-asym"),
        ("qwen2", "F16", True, "int3-g32-f16"),
        ("qwen2", "BF16", True, "int8-channel-asym"),
    ],
)
def test_transformers_loads_it_and_computes_our_decode(
    family: str, dtype: str, tied: bool, grid: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype=dtype, tied=tied)
    checkpoint = open_checkpoint(source)
    architecture = detect(checkpoint)
    out = tmp_path / "out"
    planned = write(checkpoint, architecture, out, chosen(architecture, grid, dtype.lower()), "torchao")
    assert sum(path.stat().st_size for path in out.iterdir()) == planned.nbytes
    opened = FORM.open(out, architecture)
    decoded = {name: read_tensor(opened, name) for name in opened.names()}
    assert decoded.keys() == set(checkpoint.names())
    assert as_model(open_checkpoint(out)).grid_of("model.layers.0.mlp.down_proj.weight") == grid.removesuffix("-f16")
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    before, ours = logits_of(original), logits_of(original, decoded)
    spread = float(ours.std())
    # as it comes, in the model's own type
    model = transformers.AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    assert model.dtype == {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    assert np.abs(logits_of(model) - ours).max() < 0.5 * spread
    quantized = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
            exact = weight.to(torch.float32).dequantize() if hasattr(weight, "target_dtype") else None
            rows = (
                weight.qdata.float().reshape(*weight.scale.shape, -1) - weight.zero_point.float()[..., None]
            ).numpy()
            values = (rows * weight.scale.float()[..., None].numpy()).reshape(weight.shape)
            np.testing.assert_array_equal(values, decoded[f"{name}.weight"])
            assert exact is None or np.array_equal(exact.numpy(), values)
            quantized += 1
    assert quantized == len([unit for unit in planned.units if unit.grid == grid])
    # and in float32, as the runtime opens it
    tokens = np.random.default_rng(1).integers(0, 600, (1, 96))[0].tolist()
    with RUNTIMES.get("transformers").load(out) as session:
        theirs = session.logits(tokens)
    assert np.abs(theirs - ours).max() <= 2e-5 * spread
    assert np.abs(ours - before).max() > 1e-3 * spread
    changed = "model.layers.1.self_attn.o_proj.weight"
    wrong = {**decoded, changed: decoded[changed] * np.float32(1.02)}
    assert np.abs(logits_of(original, wrong) - theirs).max() > 1e-3 * spread


def test_the_facts_are_those_that_torchao_writes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16")
    checkpoint = open_checkpoint(source)
    architecture = detect(checkpoint)
    configs = {
        "int8-channel": quantization.Int8WeightOnlyConfig(version=2),
        "int4-g64": quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity.PerGroup(64), version=2
        ),
        "int8-channel-asym": quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int8,
            granularity=granularity.PerAxis(0),
            mapping_type=quantization.MappingType.ASYMMETRIC,
            version=2,
        ),
    }
    for grid, config in configs.items():
        theirs, ours = tmp_path / f"{grid}-theirs", tmp_path / f"{grid}-ours"
        settings = transformers.TorchAoConfig(config, modules_to_not_convert=["lm_head"])
        transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=settings, device_map="cpu"
        ).save_pretrained(theirs)
        write(checkpoint, architecture, ours, chosen(architecture, grid, "bf16"), "torchao")
        read = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (theirs, ours)]
        assert read[0] == read[1]
        facts = []
        for folder in (theirs, ours):
            with safe_open(folder / "model.safetensors", "pt") as file:
                found = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
                slices = {name: file.get_slice(name) for name in list(file.keys())}
            shapes = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
            for one in found.values():
                if isinstance(one, dict) and "_tensor_data_names" in one:
                    one["_tensor_data_names"].sort()
            found["tensor_names"].sort()
            facts.append((found, shapes))
        assert facts[0] == facts[1]
        opened = as_model(open_checkpoint(theirs))
        for name, tensor in load_file(theirs / "model.safetensors").items():
            if name.endswith("_weight_qdata"):
                path = name.removesuffix("._weight_qdata")
                state = load_file(theirs / "model.safetensors")
                scale, zero = (state[f"{path}._weight_{one}"].float()[..., None] for one in ("scale", "zero_point"))
                values = (tensor.float().reshape(*scale.shape[:2], -1) - zero) * scale
                expected = values.reshape(tensor.shape).numpy()
                np.testing.assert_array_equal(read_tensor(opened, f"{path}.weight"), expected)


def small(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Checkpoint:
    folder.mkdir()
    tensors = {
        "a._weight_qdata": torch.arange(-8, 8, dtype=torch.int8).repeat(4, 8),
        "a._weight_scale": torch.ones(4, 2),
        "a._weight_zero_point": torch.zeros(4, 2, dtype=torch.int8),
    }
    data = {"target_dtype": {"_data": "int4"}, "block_size": [1, 64], "dtype": {"_data": "float32"}}
    facts: dict[str, Any] = {"_type": "IntxUnpackedToInt8Tensor", "_data": data}
    change(tensors, facts)
    save_file(tensors, folder / "model.safetensors", {"a.weight": json.dumps(facts), "tensor_names": '["a.weight"]'})
    kind = {"_type": "IntxWeightOnlyConfig", "_data": {"mapping_type": {"_data": "SYMMETRIC"}}}
    settings = {"quant_method": "torchao", "quant_type": {"default": kind}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, facts: tensors.pop("a._weight_scale"), "no a._weight_scale"),
        (lambda tensors, facts: tensors.pop("a._weight_zero_point"), "has no _weight_zero_point"),
        (lambda tensors, facts: tensors.pop("a._weight_qdata"), "Intx.* are read|no tensor named"),
        (lambda tensors, facts: facts.update(_type="Float8Tensor"), "Float8Tensor"),
        (lambda tensors, facts: facts["_data"].update(block_size=[1, 48]), "do not divide"),
        (lambda tensors, facts: facts["_data"].update(block_size=[2, 64]), "blocks of one row"),
        (lambda tensors, facts: facts["_data"].update(target_dtype={"_data": "int1"}), "int1"),
        (lambda tensors, facts: facts["_data"].update(dtype={"_data": "float64"}), "float64"),
        (lambda tensors, facts: facts["_data"].update(target_dtype={"_data": "int3"}), "3 bits do not"),
        (lambda tensors, facts: tensors["a._weight_zero_point"].fill_(1), "is not 0"),
    ],
)
def test_bad_folders_are_refused_by_name(
    change: Callable[[dict[str, Any], dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    with pytest.raises((BadInputError, UnsupportedError), match=said):
        read_tensor(as_model(small(tmp_path / "in", change)), "a.weight")


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", "llama", dtype="BF16"))
    architecture = detect(checkpoint)

    def reasons(grid: str, changes: Mapping[str, str]) -> str:
        plan = make_plan(FORM, architecture, chosen(architecture, grid, "bf16") | changes, "x", "")
        return "; ".join(FORM.refuses(architecture, plan, checkpoint))

    assert reasons("int4-g64", {}) == ""
    assert "several grids" in reasons("int4-g64", {"blocks.0.ffn_down": "int8-g64"})
    assert "leave out -f16" in reasons("int4-g64-f16", {})
    assert "head" in reasons("int4-g64", {"head": "int4-g64"})
    assert "'nf4-g64'" in reasons("nf4-g64", {})
