"""Every way of storing of compressed-tensors: decompressed by the library, run by transformers with rounded inputs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from safetensors.torch import load_file, save_file

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.linear import Role
from anyquant.core.plan import Activation, Decision, Plan
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS
from anyquant.formats.compressed_tensors.inputs import arguments
from anyquant.formats.compressed_tensors.layouts import layout
from anyquant.formats.compressed_tensors.scheme import CompressedTensors
from anyquant.formats.folder.format import FolderFormat
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.runtimes.activations import RoundedInput, rounding_inputs
from anyquant.store.open import open_checkpoint
from anyquant.store.safetensors import SafetensorsCheckpoint
from support.checkpoints import make_checkpoint
from support.folders import logits
from support.write import make_plan, write

FORM = FORMATS.get("compressed-tensors")
TORCH = {
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}
VARIANTS = (
    *(f"int{bits}-g64" for bits in range(2, 9)),
    *(
        "int4-g64-asym-f16",
        "int8-channel-f16:plain",
        "int4-g32-asym",
        "int2-g64-asym",
        "int8-g128-asym",
        "int4-channel",
        "int8-channel",
        "int3-channel",
    ),
    *("int8-channel:plain", "int8-tensor:plain", "int4-g128:plain"),
    *("fp8_e4m3-tensor", "fp8_e4m3-channel", "fp8_e4m3-block", "nvfp4", "mxfp4", "mxfp8_e4m3"),
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_library_decompresses_what_was_packed(variant: str) -> None:
    """Bit for bit; what it computes in bfloat16 to that precision."""
    kind, shape = layout(variant), (256, 384)
    weights = np.random.default_rng(1).standard_t(4, shape).astype(np.float32)
    grid = find_grid(kind.grid)
    params, codes = grid.quantize(weights)
    rows = QTensor(grid, shape, codes, params)
    packed, stored = kind.pack(rows, shape), kind.tensors(*shape)
    state = {
        one.suffix: torch.from_numpy(np.array(raw).reshape(-1)).view(TORCH[one.dtype]).reshape(one.shape)
        for one, raw in zip(stored, packed, strict=True)
    }
    group = {"targets": ["Linear"], "weights": dict(kind.arguments()), "format": kind.format}
    scheme = QuantizationScheme.model_validate(group)
    found = BaseCompressor.get_value_from_registry(kind.format).decompress(state, scheme)["weight"]
    if kind.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"):
        assert found.dtype == torch.bfloat16
        np.testing.assert_array_less(
            np.abs(found.float().numpy() - rows.decode()), 2**-7 * np.abs(rows.decode()) + 1e-9
        )
    else:
        # the scale's type is that of the result: bfloat16 scales are widened, which changes no value
        halves = (torch.bfloat16, torch.float16)
        wide = {name: value.float() if value.dtype in halves else value for name, value in state.items()}
        exact = BaseCompressor.get_value_from_registry(kind.format).decompress(wide, scheme)["weight"]
        np.testing.assert_array_equal(exact.float().numpy(), rows.decode())
    back = kind.unpack([np.array(raw).reshape(-1) for raw in packed], shape[0], shape)
    np.testing.assert_array_equal(back.decode(), rows.decode())
    np.testing.assert_array_equal(back.codes, codes)


def test_presets_are_those_of_the_library() -> None:
    """Arguments of weights and inputs; engines compare them field by field."""
    scheme = CompressedTensors()
    kept = ("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic")
    for name, grid in scheme.presets.items():
        if name in ("BF16", "F16", "F32"):
            continue
        theirs = preset_name_to_scheme(name, ["Linear"])
        decision = Decision("x", grid, grid, "test", input_activation=parsed(scheme.activations.get(name)))
        weights = dict(layout(scheme.variant(decision)).arguments())
        ours = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights}).weights
        assert theirs.weights is not None and ours is not None
        for key in kept:
            assert getattr(ours, key) == getattr(theirs.weights, key), (name, key)
        assert (theirs.input_activations is None) == (decision.input_activation is None), name
        if decision.input_activation is not None and theirs.input_activations is not None:
            plan = config_of(scheme, decision)
            inputs = QuantizationConfig.model_validate(plan).config_groups["group_0"].input_activations
            for key in kept:
                assert getattr(inputs, key) == getattr(theirs.input_activations, key), (name, key)


def config_of(scheme: CompressedTensors, decision: Decision) -> dict[str, Any]:
    """The settings of a model whose every block matrix is decided alike."""
    assert decision.input_activation is not None
    kind = layout(scheme.variant(decision))
    group = {"targets": ["Linear"], "weights": dict(kind.arguments()), "format": kind.format}
    return {"config_groups": {"group_0": {**group, "input_activations": dict(arguments(decision.input_activation))}}}


def parsed(text: str | None) -> Activation | None:
    if text is None:
        return None
    name, _, mode = text.partition(":")
    return Activation(name, mode or "dynamic")


def planned(architecture: Architecture, preset: str, source: str) -> Plan:
    grids = {name: grid or source for name, (grid, _) in FORM.preset(preset, architecture, False).items()}
    plan = make_plan(FORM, architecture, grids, preset, "")
    rounded = parsed(FORM.activations(preset))
    decisions = {
        name: replace(decision, input_activation=rounded if architecture.by_name[name].block is not None else None)
        for name, decision in plan.decisions.items()
    }
    return replace(plan, decisions=decisions)


def tokens() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 600, (1, 96)))


def our_logits(
    source: Path, out: Path, architecture: Architecture, plan: Plan, maxima: dict[str, float], dtype: torch.dtype
) -> npt.NDArray[np.float32]:
    """The source's model with our decoded weights, inputs rounded by our grids."""
    opened = FORM.open(out, architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    state = {name: torch.from_numpy(read_tensor(opened, name)).to(dtype) for name in opened.names()}
    model.load_state_dict(state, strict=False)
    rounded = [
        RoundedInput(architecture.by_name[name].module, one.input_activation.grid, maxima.get(name))
        for name, one in plan.decisions.items()
        if one.input_activation is not None
    ]
    with torch.inference_mode(), rounding_inputs(model, rounded):
        return np.asarray(model(tokens()).logits[0].float().numpy())


def maxima_of(source: Path, architecture: Architecture) -> dict[str, float]:
    """The largest magnitude that enters each matrix on the tokens of the test."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found: dict[str, float] = {}

    def watch(name: str) -> Callable[[Any, Any], None]:
        return lambda module, given: found.update({name: float(given[0].abs().max())})

    for linear in architecture.linears:
        if linear.block is not None:
            model.get_submodule(linear.module).register_forward_pre_hook(watch(linear.name))
    with torch.inference_mode():
        model(tokens())
    return found


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        ("llama", "W4A16_ASYM"),
        ("llama", "W8A8"),
        ("qwen2", "W4A8"),
        ("llama", "W4AFP8"),
        ("llama", "FP8"),
        ("qwen2", "FP8_DYNAMIC"),
        ("llama", "FP8_BLOCK"),
        ("llama", "NVFP4A16"),
        ("phi3", "NVFP4"),
        ("llama", "MXFP4"),
        ("llama", "MXFP8"),
        ("phi3", "FP8"),
        ("phi3", "W4A16_ASYM"),
    ],
)
def test_transformers_computes_our_decode_with_rounded_inputs(family: str, preset: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype="BF16")
    checkpoint = open_checkpoint(source)
    architecture = detect(checkpoint)
    plan = planned(architecture, preset, "bf16")
    assert FORM.refuses(architecture, plan, checkpoint) == []
    maxima = maxima_of(source, architecture)
    out = tmp_path / "out"
    write(checkpoint, architecture, out, {}, "compressed-tensors", plan=plan, maxima=maxima)
    small = preset.startswith(("NVFP4", "MXFP"))
    dtype = torch.bfloat16 if small else torch.float32
    theirs, ours = logits(out, dtype), our_logits(source, out, architecture, plan, maxima, dtype)
    spread = float(ours.std())
    rounded = FORM.activations(preset) is not None
    off = float(np.sqrt(np.square(theirs - ours).mean())) / spread
    # an input on the border of two codes may fall to either side, and bfloat16 rounds between operations
    assert off < (0.1 if small else 0.03 if rounded else 1e-5), off
    plain = logits(source, dtype)
    assert float(np.sqrt(np.square(ours - plain).mean())) > (3 if small else 1) * off * spread


def test_several_groups_name_their_modules(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="F32")
    checkpoint = open_checkpoint(source)
    architecture = detect(checkpoint)
    roles = {Role.FFN_DOWN: "int8-g128", Role.ATTN_OUTPUT: "fp8_e4m3-channel"}
    grids = {
        linear.name: "f32" if linear.block is None else roles.get(linear.role, "int4-g128")
        for linear in architecture.linears
    }
    out = tmp_path / "out"
    write(checkpoint, architecture, out, grids, "compressed-tensors")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "mixed-precision"
    listed = [target for group in settings["config_groups"].values() for target in group["targets"]]
    assert len(listed) == len(set(listed)) == 14
    opened = FORM.open(out, architecture)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(tokens()).logits
    same = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    same.load_state_dict({name: torch.from_numpy(read_tensor(opened, name)) for name in opened.names()}, strict=False)
    with torch.inference_mode():
        ours = same(tokens()).logits
    assert float((theirs - ours).abs().max()) <= 1e-5 * float(ours.std())


def test_shards(tmp_path: Path) -> None:
    """Many shards with their index are the same tensors as one file."""
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", "llama", dtype="BF16"))
    architecture = detect(checkpoint)
    form = FolderFormat(CompressedTensors(), shard_bytes=40_000)
    grids = {linear.name: "bf16" if linear.block is None else "int4-g128" for linear in architecture.linears}
    write(checkpoint, architecture, tmp_path / "one", grids, "compressed-tensors")
    write(checkpoint, architecture, tmp_path / "many", grids, form)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    parts: dict[str, Any] = {}
    for shard in shards:
        found = torch_file(shard)
        assert {name for name, place in index["weight_map"].items() if place == shard.name} == found.keys()
        parts |= found
    whole = torch_file(tmp_path / "one" / "model.safetensors")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    again = form.open(tmp_path / "many", architecture)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert set(again.names()) == set(checkpoint.names())


def torch_file(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(path))


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Checkpoint:
    """The folder with its settings changed."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return SafetensorsCheckpoint(folder)


def regrouped(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings["config_groups"]["group_0"].update(fields)


def weighted(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings["config_groups"]["group_0"]["weights"].update(fields)


def twice(settings: dict[str, Any]) -> None:
    group = settings["config_groups"]["group_0"]
    settings["config_groups"]["group_1"] = {**group, "weights": {**group["weights"], "num_bits": 8}}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (twice, BadInputError, "config groups group_0, group_1 all mean"),
        (regrouped(targets=["re:.*q_proj"]), BadInputError, "no config group means it"),
        (regrouped(targets=["re:(", "Linear"]), BadInputError, "no regular expression"),
        (regrouped(weights=None), UnsupportedError, "does not quantize weights"),
        (regrouped(format="marlin-24"), UnsupportedError, "marlin-24"),
        (weighted(actorder="group"), UnsupportedError, "g_idx"),
        (weighted(num_bits=9), UnsupportedError, "no place for grid 'int9-g128'"),
        (weighted(num_bits=8), BadInputError, "its settings call for"),
        (weighted(group_size=64), BadInputError, "weight_scale is BF16"),
        (lambda settings: settings["ignore"].append("model.layers.9.mlp"), BadInputError, "model.layers.9.mlp"),
        (lambda settings: settings["ignore"].append("re:.*o_proj"), BadInputError, "on the ignore list"),
        (lambda settings: settings.update(config_groups={}), BadInputError, "no config_groups"),
    ],
)
def test_settings_that_contradict_the_tensors(
    change: Callable[[dict[str, Any]], None], error: type[Exception], said: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", "llama", dtype="BF16"))
    architecture = detect(checkpoint)
    grids = {linear.name: "bf16" if linear.block is None else "int4-g128" for linear in architecture.linears}
    write(checkpoint, architecture, tmp_path / "out", grids, "compressed-tensors")
    with pytest.raises(error, match=said.replace("(", r"\(")):
        FORM.read(changed(tmp_path / "out", change)).names()


@pytest.mark.parametrize("lost", ["weight_scale", "weight_packed"])
def test_a_missing_tensor_is_named(lost: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "in", "llama", dtype="F32"))
    architecture = detect(checkpoint)
    grids = {linear.name: "f32" if linear.block is None else "int8-g128" for linear in architecture.linears}
    write(checkpoint, architecture, tmp_path / "out", grids, "compressed-tensors")
    file = tmp_path / "out" / "model.safetensors"
    tensors = {name: value for name, value in torch_file(file).items() if not name.endswith(f"1.mlp.up_proj.{lost}")}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BadInputError, match=r"model\.layers\.1\.mlp\.up_proj"):
        FORM.read(SafetensorsCheckpoint(tmp_path / "out")).names()
