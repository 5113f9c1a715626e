"""GPTQ against what GPTQModel and AutoRound pack (recorded by tools/record_packed.py), and what is refused."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.plan import Plan
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS, as_model
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.gptq.layouts import PackedInputs, layout
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.store.safetensors import SafetensorsCheckpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, open_model, written_and_read
from support.packed import Packed, packed_cases
from support.quantized import altered
from support.write import make_plan, write

FORM = FORMATS.get("gptq")
FLAGS = {"gptqmodel-v1": "1", "gptqmodel-v2": "2:order", "auto-round-v1": "1:bare", "auto-round-v2": "2:bare"}
CASES = packed_cases(*FLAGS)


def made(variant: str) -> PackedInputs:
    found = layout(variant)
    assert found is not None
    return found


def variant_of(case: Packed) -> str:
    flags = FLAGS[case.packer]
    if case.packer == "gptqmodel-v1" and case.asymmetric and not case.zero.all():
        flags += ":borrowing"
    return f"{case.grid}:{flags}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_others_pack_is_read(case: Packed) -> None:
    """Codes, scales, zero-points and the order of the columns come back, and their kernel's weights, in float16."""
    shape, kind = case.codes.shape, made(variant_of(case))
    rows = kind.unpack(case.raw(kind.tensors(*shape)), shape[0], shape)
    np.testing.assert_array_equal(rows.codes, case.rows().codes)
    for name, values in case.rows().params.items():
        np.testing.assert_array_equal(rows.params[name], values)
    assert (rows.column_groups is not None) == case.ordered
    if case.weight is not None:
        np.testing.assert_array_equal(rows.decode().astype(np.float16), case.weight)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packed_as_others_pack(case: Packed) -> None:
    """Bit for bit; but for zero-points of 0 in version 1, which are refused."""
    shape, kind = case.codes.shape, made(variant_of(case))
    if "borrowing" in variant_of(case):
        with pytest.raises(UnsupportedError, match="zero-point is 0"):
            kind.pack(case.rows(), shape)
        return
    for one, ours in zip(kind.tensors(*shape), kind.pack(case.rows(), shape), strict=True):
        theirs = case.tensors[one.suffix]
        assert (one.shape, one.nbytes) == (theirs.shape, theirs.nbytes), one.suffix
        np.testing.assert_array_equal(np.frombuffer(ours, theirs.dtype).reshape(theirs.shape), theirs, one.suffix)


@pytest.mark.parametrize("variant", ["int3-g32-asym:2", "int4-channel:1", "int8-g32:1", "int2-g64-asym-f16:2"])
def test_rows_in_blocks_are_the_rows_at_once(variant: str) -> None:
    """Written through places, piece by piece, the tensors are those of the whole matrix."""
    kind, shape = made(variant), (96, 128)
    grid = find_grid(kind.grid)
    weights = np.random.default_rng(5).standard_normal(shape).astype(np.float32) + np.float32(0.3)
    params, codes = grid.quantize(weights)
    whole = QTensor(grid, shape, codes, params)
    tensors, expected = kind.tensors(*shape), kind.pack(whole, shape)
    found = [np.full(one.nbytes, 0xEE, dtype=np.uint8) for one in tensors]
    for first, last in ((0, 32), (32, 96)):
        for one, buffer, data in zip(tensors, found, kind.pack(whole.rows(first, last), shape), strict=True):
            place, data = one.place("x", first, last - first), np.frombuffer(data, np.uint8)
            for run in range(place.runs):
                at = place.offset + run * place.pitch
                buffer[at : at + place.nbytes] = data.reshape(-1)[run * place.nbytes : (run + 1) * place.nbytes]
    for buffer, data in zip(found, expected, strict=True):
        np.testing.assert_array_equal(buffer, np.frombuffer(data, np.uint8))


def test_what_float16_cannot_hold_is_refused() -> None:
    kind, shape = made("int4-g32:1"), (32, 32)
    codes = np.zeros(shape, np.int8)
    for scale in (1e-7, 70000.0, 1 + 2.0**-12):
        rows = QTensor(find_grid("int4-g32"), shape, codes, {"scale": np.full((32, 1), scale, np.float32)})
        with pytest.raises(UnsupportedError, match="F16 cannot hold"):
            kind.pack(rows, shape)


def test_contradictions_inside_the_tensors_are_told() -> None:
    """By hand: a g_idx out of range, one with uneven groups, an off-centre symmetric zero-point, a 15 in version 1."""
    kind, shape = made("int4-g32:1:order"), (32, 64)
    grid = find_grid("int4-g32")
    rows = QTensor(grid, shape, np.ones(shape, np.int8), {"scale": np.ones((32, 2), np.float32)})
    raw = [np.frombuffer(one, np.uint8).reshape(-1).copy() for one in kind.pack(rows, shape)]

    def changed(index: int, at: int, values: npt.NDArray[Any]) -> list[npt.NDArray[np.uint8]]:
        found = [one.copy() for one in raw]
        found[index][at : at + values.nbytes] = values.view(np.uint8)
        return found

    with pytest.raises(BadInputError, match="names group 2, there are 2"):
        kind.unpack(changed(3, 0, np.array([2], "<i4")), 32, shape)
    with pytest.raises(BadInputError, match="31 inputs into group 0, its size is 32"):
        kind.unpack(changed(3, 0, np.array([1], "<i4")), 32, shape)
    with pytest.raises(BadInputError, match="a zero-point is 7"):
        kind.unpack(changed(1, 0, np.array([0x76], np.uint8)), 32, shape)
    with pytest.raises(BadInputError, match="stored zero-point is 15 in version 1"):
        made("int4-g32-asym:1:order").unpack(changed(1, 0, np.array([0x7F], np.uint8)), 32, shape)


def settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize(
    ("family", "grid", "tied"),
    [("llama", "int4-g128", False), ("qwen2", "int3-g32-asym", True), ("phi3", "int8-channel", False)],
)
def test_a_folder_is_read_back(family: str, grid: str, tied: bool, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype="BF16", tied=tied)
    architecture, found = written_and_read("gptq", source, tmp_path / "out", grid, "bf16")
    again = as_model(SafetensorsCheckpoint(tmp_path / "out"))
    name = architecture.linears[-2].view.tensor
    np.testing.assert_array_equal(read_tensor(again, name), read_tensor(found, name))


def test_settings_of_one_grid(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama", dtype="F16"))
    write(checkpoint, architecture, tmp_path / "out", chosen(architecture, "int4-g128", "f16"), "gptq")
    assert settings(tmp_path / "out") == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.layers.0.mlp.down_proj."
    assert {
        name.removeprefix(prefix): (one.dtype.name, one.shape) for name, one in tensors.items() if prefix in name
    } == {
        "qweight": ("int32", (64, 256)),
        "qzeros": ("int32", (4, 32)),
        "scales": ("float16", (4, 256)),
        "g_idx": ("int32", (512,)),
    }
    assert set(tensors[f"{prefix}qzeros"].reshape(-1).tolist()) == {0x77777777}
    write(checkpoint, architecture, tmp_path / "asym", chosen(architecture, "int8-channel-asym-f16", "f16"), "gptq")
    found = settings(tmp_path / "asym")
    assert (found["group_size"], found["sym"], found["checkpoint_format"]) == (-1, False, "gptq_v2")


def test_settings_of_several_grids(tmp_path: Path) -> None:
    """Patterns match exactly their modules, and what vLLM fuses; a head is quantized too; all is read back."""
    source = make_checkpoint(tmp_path / "in", "llama", dtype="F16", config={"vocab_size": 704})
    checkpoint, architecture = open_model(source)
    changes = {"blocks.0.ffn_down": "int8-g64", "blocks.1.attn_output": "f16", "head": "int4-g128"}
    changes |= {f"blocks.1.attn_{one}": "int8-g32" for one in "qkv"}
    grids = chosen(architecture, "int4-g128", "f16", changes)
    write(checkpoint, architecture, tmp_path / "out", grids, "gptq")
    found = settings(tmp_path / "out")
    assert found["lm_head"] is True
    paths = {linear.view.tensor.removesuffix(".weight"): grids[linear.name] for linear in architecture.linears}
    listed = [name for one in found["modules_in_block_to_quantize"] for name in one]
    assert set(listed) == {path for path, grid in paths.items() if grid != "f16"} - {"lm_head"}
    described = {
        "int8-g64": {"bits": 8, "group_size": 64, "sym": True},
        "int8-g32": {"bits": 8, "group_size": 32, "sym": True},
        "f16": {},
        "int4-g128": None,
    }
    paths["model.layers.1.self_attn.qkv_proj"] = "int8-g32"
    paths["model.layers.0.self_attn.qkv_proj"] = "int4-g128"
    paths.pop("model.embed_tokens")
    for path, grid in paths.items():
        meant = [(key, row) for key, row in found["dynamic"].items() if re.match(key[2:], path)]
        assert [row for _, row in meant] == ([] if described[grid] is None else [described[grid]]), path
        assert all(key.startswith("-:" if grid == "f16" else "+:") for key, _ in meant)
    opened = FORM.open(tmp_path / "out", architecture)
    assert isinstance(FORM, FolderFormat)
    read = FORM.read(SafetensorsCheckpoint(tmp_path / "out"))
    for path, grid in paths.items():
        name = f"{path}.weight"
        if name in read.modules:
            assert read.grid_of(name) == f"{grid}-f16", path
    np.testing.assert_array_equal(
        read_tensor(opened, "model.layers.1.self_attn.o_proj.weight"),
        read_tensor(checkpoint, "model.layers.1.self_attn.o_proj.weight"),
    )


def test_reordered_columns_are_written_where_the_plan_says_so(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama", dtype="F16"))
    plan = planned(architecture, chosen(architecture, "int4-g32", "f16"))
    linear = architecture.by_name["blocks.0.ffn_down"]
    decision = replace(plan.decisions[linear.name], options={"act_order": True})
    plan = replace(plan, decisions={**plan.decisions, linear.name: decision})
    written = FORM.layout(architecture, plan, checkpoint)
    config = next(file for file in written.files if file.path == "config.json")
    assert json.loads(config.prefix)["quantization_config"]["desc_act"] is True
    unit = next(unit for unit in written.units if linear.name in unit.linears)
    order = np.random.default_rng(2).permutation(np.repeat(np.arange(16), 32)).astype(np.int32)
    codes, scale = np.ones(linear.shape, np.int8), np.ones((256, 16), np.float32)
    rows = QTensor(find_grid("int4-g32"), linear.shape, codes, {"scale": scale}, order)
    chunks = FORM.pack(unit, architecture, linear.name, 0, rows)
    np.testing.assert_array_equal(np.frombuffer(chunks[-1].data, "<i4"), order)
    other = replace(unit, variant="int4-g32:1")
    with pytest.raises(UnsupportedError, match="act-order"):
        FORM.pack(other, architecture, linear.name, 0, rows)


def planned(architecture: Architecture, grids: Mapping[str, str]) -> Plan:
    return make_plan(FORM, architecture, grids, "x", "")


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "phi3", dtype="F16", config={"vocab_size": 704})
    checkpoint, architecture = open_model(source)

    def reasons(**changes: str) -> str:
        named = {name.replace("__", "."): one for name, one in changes.items()}
        plan = planned(architecture, chosen(architecture, "int4-g128", "f16", named))
        return "; ".join(FORM.refuses(architecture, plan, checkpoint))

    assert reasons() == reasons(head="int4-g128") == reasons(blocks__0__ffn_down="int8-g32-f16") == ""
    assert "quantized embedding" in reasons(embedding="int4-g128")
    assert "checkpoint_format" in reasons(blocks__0__ffn_down="int4-g128-asym")
    for grid in ("int5-g128", "int4-tensor", "q4_k", "mxfp4"):
        assert f"no place for grid {grid!r}" in reasons(blocks__0__ffn_down=grid)
    assert "qkv_proj is one module" in reasons(blocks__0__attn_q="f16")
    plan = planned(architecture, chosen(architecture, "int4-g128", "f16"))
    fused = {
        name: replace(one, options={"act_order": True}) if "attn" in name else one
        for name, one in plan.decisions.items()
    }
    assert "one order of its columns" in FORM.refuses(architecture, replace(plan, decisions=fused), checkpoint)[0]
    odd, narrow = open_model(make_checkpoint(tmp_path / "odd", "llama", dtype="F16", config={"intermediate_size": 272}))
    plan = planned(narrow, chosen(narrow, "int4-channel", "f16"))
    assert "272 x 256 is not a multiple of 32 x 32" in "; ".join(FORM.refuses(narrow, plan, odd))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "zero-points of 4 bits, its settings say 3"),
        ({"bits": 5}, "5 bits are not read"),
        ({"bits": "4"}, "bits '4', expected a int"),
        ({"group_size": 64}, "4 groups of 512 inputs, its settings say groups of 64"),
        ({"group_size": None}, "group_size None"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        ({"checkpoint_format": {"a": 1}}, "is not read"),
        ({"sym": "yes"}, "sym 'yes', expected a bool"),
        ({"is_marlin_format": True}, "'marlin' is not read"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"dynamic": [1]}, "dynamic that is no object"),
        ({"modules_in_block_to_quantize": [["mlp.fc1"]]}, "names 'mlp.fc1', and no such module"),
        (
            {"modules_in_block_to_quantize": [["mlp.down_proj"]]},
            "is quantized, and modules_in_block_to_quantize does not",
        ),
    ],
)
def test_settings_that_contradict_the_tensors(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((BadInputError, UnsupportedError), match=message):
        as_model(altered(folder, tmp_path / "bad", change, {}))


@pytest.mark.parametrize(
    ("end", "message"),
    [("scales", "has no scales"), ("qzeros", "has no qzeros"), ("qweight", "has no qweight")],
)
def test_missing_tensors_are_named(end: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message):
        as_model(altered(folder, tmp_path / "bad", {}, {f"model.layers.0.mlp.down_proj.{end}": None}))


def test_misshapen_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.g_idx"
    with pytest.raises(BadInputError, match=r"g_idx is I32 \[8\], its settings call for I32 \[512\]"):
        as_model(altered(folder, tmp_path / "bad", {}, {name: np.zeros(8, np.int32)}))
    both = {"model.layers.0.mlp.down_proj.weight": np.zeros((256, 512), np.float16)}
    with pytest.raises(BadInputError, match="both a weight and a qweight"):
        as_model(altered(folder, tmp_path / "worse", {}, both))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("gptq")
    checkpoint, architecture = open_model(make_checkpoint(base / "in", "llama", dtype="F16"))
    write(checkpoint, architecture, base / "out", chosen(architecture, "int4-g128", "f16"), "gptq")
    return base / "out"


def test_presets(folder: Path, tmp_path: Path) -> None:
    _, architecture = open_model(make_checkpoint(tmp_path / "in", "llama"))
    grids = {name: grid for name, (grid, _) in FORM.preset("w3a16", architecture, False).items()}
    assert grids == chosen(architecture, "int3-g128", "")
    with pytest.raises(UsageError, match="W4A16"):
        FORM.preset("W4A15", architecture, False)
