"""HQQ folders judged by the hqq package itself, and what it saves read back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import load_file, save_file

from anyquant.core.checkpoint import Checkpoint, read_rows, read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.formats import FORMATS, as_model
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, logits_of
from support.write import make_plan, write

FORM = FORMATS.get("hqq")
SETTINGS = {"quant_method": "hqq"}


def of_module(tensors: Mapping[str, Any], path: str) -> HQQLinear:
    """The package's own module, in float32, from the tensors of a folder."""
    keys = HQQLinear(None, None).state_dict_keys()
    state = {key: tensors[f"{path}.{key}"] for key in keys if f"{path}.{key}" in tensors}
    assert keys - state.keys() <= {"bias"}
    found = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    found.load_state_dict(state)
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "grid"),
    [
        ("llama", "BF16", False, "int4-g64-asym"),
        ("llama", "F32", False, "int3-g64"),
        ("qwen2", "F16", True, "int2-g32-asym"),
        ("qwen2", "BF16", True, "int8-channel-f16"),
        ("phi3", "F32", False, "int8-g128-asym"),
        ("phi3", "BF16", False, "int5-g64"),
    ],
)
def test_the_package_loads_it_and_computes_our_decode(
    family: str, dtype: str, tied: bool, grid: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", family, dtype=dtype, tied=tied))
    architecture = detect(checkpoint)
    out = tmp_path / "out"
    planned = write(checkpoint, architecture, out, chosen(architecture, grid, dtype.lower()), "hqq")
    opened = FORM.open(out, architecture)
    decoded = {name: read_tensor(opened, name) for name in opened.names()}
    assert decoded.keys() == set(checkpoint.names())
    tensors = load_file(out / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    state = {name: torch.from_numpy(value) for name, value in decoded.items()}
    model.load_state_dict(state, strict=False)
    ours, changed = logits_of(model), 0
    for name, module in list(model.named_modules()):
        if f"{name}.W_q" in tensors:
            theirs = of_module(tensors, name)
            np.testing.assert_array_equal(theirs.dequantize().numpy(), decoded[f"{name}.weight"], err_msg=name)
            assert (theirs.bias is None) == (module.bias is None)
            model.set_submodule(name, theirs)
            changed += 1
    assert changed == len([unit for unit in planned.units if unit.linears and "int" in unit.grid])
    assert np.abs(logits_of(model) - ours).max() <= 1e-5 * ours.std()
    name = "model.layers.1.mlp.down_proj"
    wrong = of_module({**tensors, f"{name}.zero": tensors[f"{name}.zero"] + 1}, name)
    assert not np.array_equal(wrong.dequantize().numpy(), decoded[f"{name}.weight"])


def saved(folder: Path, shape: tuple[int, int], change: Callable[[dict[str, Any]], None] | None, **how: Any) -> Any:
    """A module that the package quantizes, in a folder; returns it and the folder as a checkpoint."""
    folder.mkdir()
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        values = np.random.default_rng(4).standard_normal(shape, dtype=np.float32)
        linear.weight.copy_(torch.from_numpy(values * 0.1 + 0.05))
    dtype = how.pop("dtype", torch.float32)
    config = BaseQuantizeConfig(**how)
    module = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    tensors = {f"a.{key}": value.detach().contiguous().clone() for key, value in module.state_dict().items()}
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": SETTINGS}))
    return module, open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_what_the_package_saves_is_read_as_it_dequantizes_it(bits: int, dtype: Any, tmp_path: Path) -> None:
    _, stored = saved(tmp_path / "in", (48, 128), None, nbits=bits, group_size=64, axis=1, dtype=dtype)
    found = as_model(stored)
    state = {key.removeprefix("a."): value for key, value in load_file(tmp_path / "in/model.safetensors").items()}
    again = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    again.load_state_dict(state)
    assert found.names() == ["a.weight"]
    np.testing.assert_array_equal(read_tensor(found, "a.weight"), again.dequantize().numpy())
    np.testing.assert_array_equal(read_rows(found, "a.weight", 3, 30), again.dequantize().numpy()[3:30])


def test_codes_viewed_as_floats_are_read(tmp_path: Path) -> None:
    module, stored = saved(tmp_path / "in", (16, 128), None, nbits=4, group_size=64, axis=1, view_as_float=True)
    np.testing.assert_array_equal(read_tensor(as_model(stored), "a.weight"), module.dequantize().numpy())


def test_our_own_folder_is_read_on_its_own_grid(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", "llama"))
    architecture = detect(checkpoint)
    for number, grid in enumerate(("int4-g64-asym", "int4-g32", "int8-g256")):
        out = tmp_path / str(number)
        write(checkpoint, architecture, out, chosen(architecture, grid, "f32"), "hqq")
        assert as_model(open_checkpoint(out)).grid_of("model.layers.0.mlp.up_proj.weight") == grid


def replaced(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        if value is None:
            del tensors[f"a.{name}"]
        else:
            tensors[f"a.{name}"] = torch.tensor(value)

    return change


@pytest.mark.parametrize(
    ("change", "how", "said"),
    [
        (None, {"axis": 0}, "axis 0"),
        (replaced("zero", None), {}, "has no zero"),
        (replaced("scale", None), {}, "has no scale"),
        (replaced("scale", [1.0, 2.0]), {}, "its settings call for"),
        (replaced("nbits", 7), {}, "7 bits"),
        (replaced("nbits", 2), {}, "packed in another way"),
        (replaced("group_size", 48), {}, "groups of 48"),
        (replaced("group_size", 0), {}, "groups of 0"),
        (replaced("shape", [16]), {}, "shape \\[16\\]"),
        (replaced("axis", [1, 1]), {}, "not one number"),
        (replaced("nbits", 4.0), {}, "not a few integers"),
        (replaced("W_q", None), {}, "no tensor that ends in .W_q"),
    ],
)
def test_bad_folders_are_refused_by_name(
    change: Callable[[dict[str, Any]], None] | None, how: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    _, stored = saved(tmp_path / "in", (16, 128), change, **{"nbits": 4, "group_size": 64, "axis": 1, **how})
    with pytest.raises((BadInputError, UnsupportedError), match=said):
        as_model(stored)


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    def reasons(family: str, grid: str, changes: Mapping[str, str]) -> str:
        folder = tmp_path / family
        checkpoint: Checkpoint = open_checkpoint(folder if folder.exists() else make_checkpoint(folder, family))
        architecture = detect(checkpoint)
        plan = make_plan(FORM, architecture, chosen(architecture, grid, "f32") | changes, "x", "")
        return "; ".join(FORM.refuses(architecture, plan, checkpoint))

    assert reasons("llama", "int4-g64", {}) == ""
    assert "several grids" in reasons("llama", "int4-g64", {"blocks.0.ffn_down": "int8-g64"})
    assert "qkv_proj" in reasons("phi3", "int4-g64", {})
    assert reasons("phi3", "int8-g64", {}) == ""
    assert "embedding" in reasons("llama", "int4-g64", {"embedding": "int4-g64"})
    assert "'nf4-g64'" in reasons("llama", "nf4-g64", {})
    assert "'int7-g64'" in reasons("llama", "int7-g64", {})


def test_the_grid_of_any_zero_point_rounds_as_it_decodes() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 96), dtype=np.float32)
    for name in ("hqq4-g32", "hqq1-g96", "hqq3-g48"):
        grid = find_grid(name)
        params, codes = grid.quantize(weights)
        found = grid.decode(codes, params)
        lattice = grid.lattice(params)
        assert lattice is not None
        nearest = np.inf
        for level in lattice.levels:
            value = np.repeat(level * lattice.scale + lattice.shift, lattice.width, axis=1)
            nearest = np.minimum(nearest, np.abs(weights - value))
        np.testing.assert_allclose(np.abs(weights - found), nearest, atol=2e-6)
    with pytest.raises(UsageError, match="hqq7"):
        find_grid("hqq7-g32")
