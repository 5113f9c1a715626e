"""AutoRound: settings, mixtures and refusals. Its layouts, as its own packers fill them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.plan import Decision
from anyquant.formats import FORMATS, as_model
from anyquant.formats.autoround.scheme import AutoRound
from anyquant.formats.folder.format import FolderFormat
from anyquant.store.safetensors import SafetensorsCheckpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, open_model, written_and_read
from support.packed import Packed, packed_cases
from support.quantized import altered
from support.write import make_plan, write

FORM = FORMATS.get("auto-round")
PACKERS = {"auto-round-v1": False, "auto-round-v2": True, "auto-round-awq": True}
# packers take both kinds of zero-points everywhere; these are the pairs that AutoRound's own export makes
CASES = [
    case
    for case in packed_cases(*PACKERS)
    if case.asymmetric == PACKERS[case.packer] and not (case.packer == "auto-round-v2" and case.bits == 4)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_grid_lies_as_auto_round_packs_it(case: Packed) -> None:
    scheme, shape = AutoRound(), case.codes.shape
    kind = scheme.layout(scheme.variant(Decision("x", case.grid, case.grid, "test")))
    for one, ours in zip(kind.tensors(*shape), kind.pack(case.rows(), shape), strict=True):
        theirs = case.tensors[one.suffix]
        assert one.shape == theirs.shape
        np.testing.assert_array_equal(np.frombuffer(ours, theirs.dtype).reshape(theirs.shape), theirs, one.suffix)


MIXED = {"blocks.0.ffn_down": "int8-g64", "blocks.1.attn_output": "f16", "blocks.1.ffn_down": "int5-g32"}


@pytest.mark.parametrize(
    ("family", "grid", "tied", "changes"),
    [
        ("llama", "int4-g128", False, MIXED),
        ("qwen2", "int4-g32-asym-f16", True, {}),
        ("phi3", "int3-channel-asym", False, {"blocks.0.ffn_down": "int8-g64-asym"}),
    ],
)
def test_a_folder_is_read_back(family: str, grid: str, tied: bool, changes: dict[str, str], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype="F16", tied=tied)
    architecture, _ = written_and_read("auto-round", source, tmp_path / "out", grid, "f16", changes)
    grids = chosen(architecture, grid, "f16", changes)
    assert isinstance(FORM, FolderFormat)
    read = FORM.read(SafetensorsCheckpoint(tmp_path / "out"))
    for linear in architecture.linears:
        if grids[linear.name] != "f16":
            assert read.grid_of(linear.view.tensor) == grids[linear.name].removesuffix("-f16") + "-f16"


def test_settings(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="F16", config={"vocab_size": 704})
    checkpoint, architecture = open_model(source)
    grids = chosen(architecture, "int4-g128", "f16", MIXED | {"head": "int4-g128"})
    write(checkpoint, architecture, tmp_path / "out", grids, "auto-round")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "block_name_to_quantize": "model.layers",
        "extra_config": {
            "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64, "sym": True},
            "model.layers.1.self_attn.o_proj": {"bits": 16, "data_type": "float"},
            "model.layers.1.mlp.down_proj": {"bits": 5, "group_size": 32, "sym": True},
            "lm_head": {"bits": 4, "group_size": 128, "sym": True},
        },
    }
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {name.rpartition(".")[2] for name in names} == {"weight", "qweight", "qzeros", "scales"}
    for grid, form in (("int4-g64-asym", "auto_round:auto_awq"), ("int2-channel-asym", "auto_round")):
        write(checkpoint, architecture, tmp_path / grid, chosen(architecture, grid, "f16"), "auto-round")
        config = json.loads((tmp_path / grid / "config.json").read_text())["quantization_config"]
        assert (config["packing_format"], config["sym"]) == (form, False)
        assert "extra_config" not in config


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3", dtype="F16"))

    def reasons(**changes: str) -> str:
        named = {name.replace("__", "."): one for name, one in changes.items()}
        plan = make_plan(FORM, architecture, chosen(architecture, "int4-g128", "f16", named), "x", "")
        return "; ".join(FORM.refuses(architecture, plan, checkpoint))

    assert reasons() == reasons(blocks__0__ffn_down="int7-channel-f16", head="int3-g32") == ""
    assert "auto_round:auto_awq and auto_round:auto_gptq" in reasons(blocks__0__ffn_down="int4-g128-asym")
    assert "auto_round and auto_round:auto_gptq" in reasons(blocks__0__ffn_down="int3-g128-asym")
    assert "quantized embedding" in reasons(embedding="int4-g128")
    for grid in ("int4-tensor", "q4_k", "mxfp4"):
        assert f"no place for grid {grid!r}" in reasons(blocks__0__ffn_down=grid)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("autoround")
    checkpoint, architecture = open_model(make_checkpoint(base / "in", "llama", dtype="F16"))
    write(checkpoint, architecture, base / "out", chosen(architecture, "int4-g128", "f16", MIXED), "auto-round")
    return base / "out"


DOWN, OUTPUT = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "'auto_round:llm_compressor' is not read"),
        ({"data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({"act_bits": 8}, "act_bits 8 is not read"),
        ({"act_bits": "8"}, "act_bits '8' is not read"),
        ({"packing_format": ["auto_round"]}, "packing_format .* is not read"),
        ({"rotation_config": {"a": 1}}, "rotation_config"),
        ({"bits": 9}, "9 bits are not read"),
        ({"bits": True}, "bits True, expected an int"),
        ({"extra_config": []}, None),
        ({"extra_config": {DOWN: 8}}, "no object of objects"),
        ({"extra_config": {DOWN: {"bits": 16}}}, f"leaves {DOWN} in 16 bits, yet it has a qweight"),
        ({"extra_config": {OUTPUT: {"bits": 16}}}, "zero-points of 8 bits, its settings say 4"),
        ({"packing_format": "auto_round:auto_awq"}, "zero-points|groups of"),
        ({"packing_format": "auto_round"}, "a zero-point is 7"),
    ],
)
def test_settings_that_contradict_the_tensors(
    change: dict[str, Any], message: str | None, folder: Path, tmp_path: Path
) -> None:
    stored = altered(folder, tmp_path / "bad", change, {})
    with pytest.raises((BadInputError, UnsupportedError), match=message):
        read_tensor(as_model(stored), "model.layers.0.self_attn.q_proj.weight")


def test_other_names_of_the_packing_format_are_read(folder: Path, tmp_path: Path) -> None:
    """As AutoRound's releases before 0.5 wrote them, or not at all."""
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = read_tensor(as_model(SafetensorsCheckpoint(folder)), name)
    for number, form in enumerate(("auto_round:gptq", None)):
        change = {"packing_format": form, "quant_method": "intel/auto-round"}
        stored = altered(folder, tmp_path / str(number), change, {})
        np.testing.assert_array_equal(read_tensor(as_model(stored), name), expected)
