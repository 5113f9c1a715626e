"""AWQ against what GPTQModel and AutoRound pack (recorded by tools/record_packed.py), and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS, as_model
from anyquant.formats.awq.layouts import PackedOutputs, layout
from anyquant.grids import grid as find_grid
from anyquant.store.safetensors import SafetensorsCheckpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, open_model, written_and_read
from support.packed import Packed, packed_cases
from support.quantized import altered
from support.write import make_plan, write

FORM = FORMATS.get("awq")
CASES = packed_cases("auto-round-awq", "gptqmodel-awq-torch", "gptqmodel-awq-gemm")


def made(variant: str) -> PackedOutputs:
    found = layout(variant)
    assert found is not None
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packed_and_read_as_others_do(case: Packed) -> None:
    shape, kind = case.codes.shape, made(case.grid)
    tensors = kind.tensors(*shape)
    for one, ours in zip(tensors, kind.pack(case.rows(), shape), strict=True):
        theirs = case.tensors[one.suffix]
        assert (one.shape, one.nbytes) == (theirs.shape, theirs.nbytes), one.suffix
        np.testing.assert_array_equal(np.frombuffer(ours, theirs.dtype).reshape(theirs.shape), theirs, one.suffix)
    rows = kind.unpack(case.raw(tensors), shape[0], shape)
    np.testing.assert_array_equal(rows.codes, case.rows().codes)
    np.testing.assert_array_equal(rows.decode(), case.rows().decode())
    if case.weight is not None:
        np.testing.assert_array_equal(rows.decode().astype(np.float16), case.weight)


def test_a_word_by_hand() -> None:
    """Outputs 0 to 7 of one input with codes 0 to 7: nibbles 0 2 4 6 1 3 5 7 from the lowest."""
    codes = np.arange(8, dtype=np.uint8)[:, None].repeat(32, axis=1)
    params = {"scale": np.ones((8, 1), np.float32), "zero": np.full((8, 1), 3, np.uint8)}
    rows = QTensor(find_grid("int4-g32-asym"), (8, 32), codes, params)
    words, zeros, _ = made("int4-g32-asym").pack(rows, (8, 32))
    assert set(np.frombuffer(words, "<u4").tolist()) == {0x75316420}
    assert np.frombuffer(zeros, "<u4").tolist() == [0x33333333]


@pytest.mark.parametrize(
    ("family", "grid", "tied"),
    [("llama", "int4-g128-asym", False), ("qwen2", "int4-g32-asym-f16", True), ("phi3", "int4-g64", False)],
)
def test_a_folder_is_read_back(family: str, grid: str, tied: bool, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype="F16", tied=tied)
    written_and_read("awq", source, tmp_path / "out", grid, "f16")


def test_settings_and_tensors(tmp_path: Path) -> None:
    """Symmetric and asymmetric grids in one folder; what stays in float is listed, a tied head among it."""
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama", dtype="F16", tied=True))
    changes = {"blocks.0.ffn_down": "int4-g128", "blocks.1.attn_output": "f16"}
    write(checkpoint, architecture, tmp_path / "out", chosen(architecture, "int4-g128-asym", "f16", changes), "awq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "lm_head": False,
        "modules_to_not_convert": ["model.layers.1.self_attn.o_proj", "lm_head"],
    }
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.0.mlp.down_proj."
    found = {name.removeprefix(prefix): one for name, one in tensors.items() if prefix in name}
    assert {name: (one.dtype.name, one.shape) for name, one in found.items()} == {
        "qweight": ("int32", (512, 32)),
        "qzeros": ("int32", (4, 32)),
        "scales": ("float16", (4, 256)),
    }
    assert set(found["qzeros"].view(np.uint32).reshape(-1).tolist()) == {0x88888888}


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3", dtype="F16"))

    def reasons(**changes: str) -> str:
        named = {name.replace("__", "."): one for name, one in changes.items()}
        grids = chosen(architecture, "int4-g128-asym", "f16", named)
        return "; ".join(FORM.refuses(architecture, make_plan(FORM, architecture, grids, "x", ""), checkpoint))

    assert reasons() == reasons(blocks__0__ffn_down="int4-g128-f16") == ""
    assert "groups of 32 and 128 in one folder" in reasons(blocks__0__ffn_down="int4-g32")
    assert "quantized embedding" in reasons(embedding="int4-g128")
    odd, narrow = open_model(make_checkpoint(tmp_path / "odd", "llama", dtype="F16", config={"intermediate_size": 268}))
    plan = make_plan(FORM, narrow, chosen(narrow, "int4-channel", "f16"), "x", "")
    assert "268 x 256 is not a multiple of 8 x 1" in "; ".join(FORM.refuses(narrow, plan, odd))
    for grid in ("int3-g128", "int8-g128", "int4-tensor", "q4_k"):
        assert f"no place for grid {grid!r}" in reasons(blocks__0__ffn_down=grid)
    order = np.repeat(np.arange(2), 32).astype(np.int32)[::-1].copy()
    grid = find_grid("int4-g32")
    rows = QTensor(grid, (8, 64), np.ones((8, 64), np.int8), {"scale": np.ones((8, 2), np.float32)}, order)
    with pytest.raises(UnsupportedError, match="act-order"):
        made("int4-g32").pack(rows, (8, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("awq")
    checkpoint, architecture = open_model(make_checkpoint(base / "in", "llama", dtype="F16"))
    write(checkpoint, architecture, base / "out", chosen(architecture, "int4-g128-asym", "f16"), "awq")
    return base / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "of 8 bits"),
        ({"version": "gemv"}, "version 'gemv', is not read"),
        ({"group_size": 64}, "its settings say groups of 64"),
        ({"group_size": "128"}, "group_size '128', expected an int"),
        ({"modules_to_not_convert": ["model.layers.0.mlp.down_proj"]}, "yet model.layers.0.mlp.down_proj is quantized"),
        ({"modules_to_not_convert": ["mlp"]}, "yet model.layers.0.mlp.down_proj is quantized"),
        ({"modules_to_not_convert": ["visual"]}, "names 'visual', which is not there"),
        ({"modules_to_not_convert": "lm_head"}, "is not a list of names"),
    ],
)
def test_settings_that_contradict_the_tensors(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((BadInputError, UnsupportedError), match=message):
        as_model(altered(folder, tmp_path / "bad", change, {}))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"qzeros": None}, "has no qzeros"),
        ({"scales": np.ones((3, 256), np.float16)}, "3 groups of 512 inputs, which do not divide them"),
        ({"qzeros": np.ones((4, 16), np.int32)}, "zero-points of 2 bits, its settings say 4"),
        ({"qweight": np.ones(8, np.int32)}, "expected a matrix"),
        ({"scales": np.ones((4, 256), np.float32)}, "scales is F32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tensors: Mapping[str, npt.NDArray[Any] | None], message: str, folder: Path, tmp_path: Path
) -> None:
    changed = {f"model.layers.0.mlp.down_proj.{name}": one for name, one in tensors.items()}
    with pytest.raises((BadInputError, UnsupportedError), match=message):
        as_model(altered(folder, tmp_path / "bad", {}, changed))


def test_older_names_of_settings_and_other_scales_are_read(folder: Path, tmp_path: Path) -> None:
    """`w_bit` and `q_group_size`, no list, upper case: as AutoAWQ's first versions wrote; scales saved as bfloat16."""
    change = {"bits": 4, "w_bit": 4, "q_group_size": 128, "version": "GEMM", "modules_to_not_convert": None}
    found = as_model(altered(folder, tmp_path / "old", change, {}))
    name = "model.layers.0.mlp.down_proj.weight"
    expected = read_tensor(as_model(SafetensorsCheckpoint(folder)), name)
    np.testing.assert_array_equal(read_tensor(found, name), expected)
