"""Folders of GPTQ, AWQ and AutoRound in the libraries that read them: transformers with gptqmodel, optimum, auto-round.

What a kernel multiplies with is our decode in float16, bit for bit; logits are those of transformers on these weights.
And the other way round: folders that these libraries quantize are decoded to what their kernels multiply with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from anyquant.core.checkpoint import read_tensor
from anyquant.core.plan import Chunk, Unit
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS, as_model
from anyquant.formats.awq import layouts as awq
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.folder.reader import QuantizedFolder
from anyquant.models.architecture import Architecture
from anyquant.store.safetensors import SafetensorsCheckpoint
from support.checkpoints import make_checkpoint
from support.folders import chosen, open_model
from support.quantized import altered
from support.readers import python_of, read, run
from support.write import make_plan, write

pytestmark = pytest.mark.slow
READER = "gptqmodel"
Found = Mapping[str, Mapping[str, npt.NDArray[Any]]]
SOURCES = {
    "llama": {"family": "llama", "config": {"vocab_size": 704}},
    "qwen2": {"family": "qwen2", "tied": True},
    "phi3": {"family": "phi3"},
}
FLOAT = {"blocks.1.attn_output": "f16", "blocks.0.ffn_down": "f16"}
EIGHT = {"blocks.0.ffn_down": "int8-g64", "blocks.1.attn_output": "f16"}


@dataclass(frozen=True)
class Written:
    """A folder that we write. `group` of folders: they are read together, with the same options."""

    target: str
    group: str
    source: str
    grid: str
    changes: Mapping[str, str] = field(default_factory=dict)
    ordered: bool = False

    @property
    def name(self) -> str:
        marks = ("-order" if self.ordered else "") + ("-mixed" if self.changes else "")
        return f"{self.group}-{self.source}-{self.grid}{marks}"


OPTIONS = {
    "gptq": ("--backend", "gptq_torch"),
    "gptq-native": ("--loader", "gptqmodel", "--backend", "gptq_torch"),
    "awq": ("--backend", "torch_awq"),
    "auto-round": (),
}
WRITTEN = (
    Written("gptq", "gptq", "llama", "int4-g128"),
    Written("gptq", "gptq", "qwen2", "int4-g32-asym"),
    Written("gptq", "gptq", "phi3", "int3-g64"),
    Written("gptq", "gptq", "llama", "int2-g16-asym"),
    Written("gptq", "gptq", "phi3", "int8-channel-asym-f16"),
    Written("gptq", "gptq", "llama", "int4-g128", FLOAT),
    Written("gptq", "gptq", "llama", "int4-g32", ordered=True),
    Written("gptq", "gptq-native", "llama", "int4-g128", {**EIGHT, "head": "int4-g128"}),
    Written("gptq", "gptq-native", "qwen2", "int3-g32-asym"),
    Written("awq", "awq", "llama", "int4-g128-asym", {"blocks.0.ffn_down": "int4-g128"}),
    Written("awq", "awq", "qwen2", "int4-g32-asym-f16", {"blocks.1.attn_output": "f16"}),
    Written("awq", "awq", "phi3", "int4-g64"),
    Written("auto-round", "auto-round", "llama", "int4-g128", {**EIGHT, "blocks.1.ffn_down": "int5-g32"}),
    Written("auto-round", "auto-round", "llama", "int2-channel"),
    Written("auto-round", "auto-round", "qwen2", "int4-g32-asym-f16", {"blocks.1.attn_output": "f16"}),
    Written("auto-round", "auto-round", "phi3", "int3-channel-asym", {"blocks.0.ffn_down": "int8-g64-asym"}),
)


@dataclass(frozen=True)
class Reordering:
    """A Format whose rows come with columns in groups that do not follow each other, the same for all rows."""

    form: FolderFormat

    def __getattr__(self, name: str) -> Any:
        return getattr(self.form, name)

    def pack(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: QTensor) -> list[Chunk]:
        if unit.variant.endswith(":order"):
            groups = np.repeat(np.arange(rows.shape[1] // 32), 32)
            order = np.random.default_rng(rows.shape[1]).permutation(groups).astype(np.int32)
            rows = replace(rows, column_groups=order)
        return self.form.pack(unit, architecture, linear, first_row, rows)


def write_folder(one: Written, source: Path, folder: Path) -> None:
    checkpoint, architecture = open_model(source)
    form = FORMATS.get(one.target)
    assert isinstance(form, FolderFormat)
    grids = chosen(architecture, one.grid, "f16", one.changes)
    plan = make_plan(form, architecture, grids, one.grid, "")
    if one.ordered:
        decisions = {name: replace(each, options={"act_order": True}) for name, each in plan.decisions.items()}
        plan = replace(plan, decisions=decisions)
    write(checkpoint, architecture, folder, grids, Reordering(form) if one.ordered else form, plan=plan)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python_of(READER)
    made = tmp_path_factory.mktemp("gptqmodel")
    for name, settings in SOURCES.items():
        make_checkpoint(made / name, dtype="F16", **settings)
    for one in WRITTEN:
        write_folder(one, made / one.source, made / one.name)
    return made


@pytest.fixture(scope="module")
def found(base: Path) -> Found:
    results: dict[str, Mapping[str, npt.NDArray[Any]]] = {}
    for group, options in OPTIONS.items():
        folders = [base / one.name for one in WRITTEN if one.group == group]
        results |= read(READER, base / f"found-{group}", folders, *options)
    return results


def decoded(folder: Path) -> QuantizedFolder:
    model = as_model(SafetensorsCheckpoint(folder))
    assert isinstance(model, QuantizedFolder)
    return model


def expect_equal_weights(model: QuantizedFolder, theirs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Every quantized module, bit for bit in float16."""
    assert "error" not in theirs, theirs.get("error")
    weights = {name.removeprefix("weight:"): one for name, one in theirs.items() if name.startswith("weight:")}
    assert {f"{path}.weight" for path in weights} == set(model.modules)
    for path, weight in weights.items():
        ours = read_tensor(model, f"{path}.weight").astype(np.float16)
        np.testing.assert_array_equal(ours, weight.astype(np.float16), path)


def logits_of(source: Path, model: QuantizedFolder) -> npt.NDArray[np.float32]:
    """Of transformers on our decode, in float16, on the tokens that the reader takes."""
    net = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    state = {name: torch.from_numpy(read_tensor(model, name)).half() for name in model.names()}
    net.load_state_dict(state, strict=False)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 600, (1, 96)))
    with torch.inference_mode():
        return np.asarray(net(tokens).logits[0].float().numpy())


@pytest.mark.parametrize("one", WRITTEN, ids=lambda one: one.name)
def test_what_we_write_is_loaded_and_means_what_we_decode(one: Written, base: Path, found: Found) -> None:
    model, theirs = decoded(base / one.name), found[one.name]
    expect_equal_weights(model, theirs)
    if one.ordered:
        assert model.quantized_rows("model.layers.0.mlp.down_proj.weight", 0, 256).column_groups is not None
    ours = logits_of(base / one.source, model)
    spread = float(ours.std())
    # biases are added behind the product, which rounds once more than what transformers does with a plain matrix
    close = 0.05 if one.source == "qwen2" else 1e-6
    assert np.abs(ours - theirs["logits"]).max() <= close * spread
    name = next(name for name in model.modules if "down_proj" in name)
    wrong = {**theirs, f"weight:{name.removesuffix('.weight')}": read_tensor(model, name) * np.float32(1.02)}
    with pytest.raises(AssertionError):
        expect_equal_weights(model, wrong)


def test_a_wrong_order_and_a_wrong_version_show(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWQ with outputs in their natural order, GPTQ's version 1 called version 2."""
    plain, right = tmp_path / "plain", tmp_path / "right"
    one = Written("awq", "awq", "llama", "int4-g128-asym")
    write_folder(one, base / "llama", right)
    with monkeypatch.context() as patched:
        patched.setattr(awq, "ORDER", tuple(range(8)))
        write_folder(one, base / "llama", plain)
    called = tmp_path / "called"
    altered(base / "gptq-llama-int4-g128", called, {"checkpoint_format": "gptq_v2"}, {})
    theirs = read(READER, tmp_path / "awq", [plain, right], *OPTIONS["awq"])
    theirs |= read(READER, tmp_path / "gptq", [called], *OPTIONS["gptq"])
    expect_equal_weights(decoded(right), theirs["right"])
    with pytest.raises(AssertionError, match="Mismatched"):
        expect_equal_weights(decoded(right), theirs["plain"])
    with pytest.raises(AssertionError, match="Mismatched"):
        expect_equal_weights(decoded(base / "gptq-llama-int4-g128"), theirs["called"])


def test_the_kernel_that_is_chosen_on_a_cpu_agrees_in_bfloat16(base: Path, tmp_path: Path) -> None:
    """Without a backend named, gptqmodel takes one that computes in bfloat16: scales of the grids are exact there."""
    folders = [base / "gptq-llama-int4-g128", base / "awq-phi3-int4-g64"]
    theirs = read(READER, tmp_path / "auto", folders, "--dtype", "bfloat16")
    for folder in folders:
        model = decoded(folder)
        for name in model.modules:
            weight = theirs[folder.name][f"weight:{name.removesuffix('.weight')}"]
            ours = read_tensor(model, name)
            assert np.abs(ours - weight).max() <= 2**-8 * np.abs(ours).max(), name


QUANTIZED = {
    "auto-round-sym": (),
    "auto-round-asym": (),
    "auto-round-three": (),
    "auto-round-mixed": (),
    "auto-round-gptq": OPTIONS["gptq"],
    "auto-round-awq": OPTIONS["awq"],
    "auto-round-awq-sym": OPTIONS["awq"],
    "gptqmodel-sym": OPTIONS["gptq"],
    "gptqmodel-order": OPTIONS["gptq"],
    "gptqmodel-asym": OPTIONS["gptq"],
    "gptqmodel-v2": OPTIONS["gptq"],
    "gptqmodel-dynamic": OPTIONS["gptq-native"],
}


@pytest.fixture(scope="module")
def theirs(base: Path) -> tuple[Path, Found]:
    out = base / "quantized"
    run(READER, "quantize.py", base / "llama", out)
    results: dict[str, Mapping[str, npt.NDArray[Any]]] = {}
    for number, options in enumerate(sorted(set(QUANTIZED.values()))):
        folders = [out / name for name, one in QUANTIZED.items() if one == options and (out / name).exists()]
        results |= read(READER, base / f"theirs-{number}", folders, *options)
    return out, results


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_they_quantize_is_decoded_to_what_their_kernels_multiply_with(
    name: str, theirs: tuple[Path, Found]
) -> None:
    out, results = theirs
    error = out / f"{name}.error"
    assert not error.exists(), error.read_text()
    model = decoded(out / name)
    expect_equal_weights(model, results[name])
    if name == "gptqmodel-order":
        assert model.quantized_rows("model.layers.0.mlp.down_proj.weight", 0, 256).column_groups is not None
