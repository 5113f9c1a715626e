"""MLX folders judged by `mx.dequantize` and by mlx-lm, and mlx-lm's own folders as we read them."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from anyquant.algorithms.base import Task
from anyquant.core.checkpoint import read_tensor
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.core.plan import Decision
from anyquant.core.qtensor import QTensor
from anyquant.formats import FORMATS
from anyquant.formats.folder.format import FolderFormat
from anyquant.formats.mlx.layouts import layout
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.pipeline.artifacts import runtime_name
from anyquant.pipeline.planner import Model, make_plan
from anyquant.pipeline.recipe import Recipe, Rule
from anyquant.pipeline.steps import quantized
from anyquant.runtimes.mlx import RUNTIME
from anyquant.store.open import open_checkpoint
from anyquant.store.safetensors_layout import write_safetensors_header
from support.checkpoints import make_checkpoint
from support.folders import open_model
from support.write import make_plan as planned
from support.write import write

mx = pytest.importorskip("mlx.core")
mx.set_default_device(mx.cpu)

FORM = FORMATS.get("mlx")
AFFINE = [f"affine{bits}-g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
INTEGERS = ["int2-g32", "int3-g64", "int4-g128", "int8-g64", "int4-g64-asym", "int5-g32-asym", "int8-g128-asym"]
FLOATS = ["mxfp4", "mxfp8_e4m3", "nvfp4-bare"]
TOKENS = np.random.default_rng(1).integers(0, 600, 96)


def weights_of(rows: int = 16, columns: int = 384) -> Float32:
    random = np.random.default_rng(2)
    return (random.standard_normal((rows, columns)) * 0.05 + random.standard_normal((rows, 1)) * 0.02).astype(
        np.float32
    )


def dequantized(settings: Mapping[str, Any], *arrays: Any) -> Float32:
    """What MLX makes of stored arrays: weight, scales and perhaps biases."""
    return np.array(mx.dequantize(*(mx.array(one) for one in arrays), dtype=mx.float32, **settings))


def their_logits(source: Path, decoded: Mapping[str, Float32]) -> npt.NDArray[np.float32]:
    """Those of transformers, in float32, with the weights replaced."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in decoded.items()}, strict=False)
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(TOKENS)[None]).logits[0].numpy())


def our_values(out: Path, architecture: Architecture) -> dict[str, Float32]:
    opened = FORM.open(out, architecture)
    return {name: read_tensor(opened, name) for name in opened.names()}


@pytest.mark.parametrize("name", [*AFFINE, *INTEGERS, *FLOATS])
def test_what_is_packed_is_what_mx_dequantize_reads(name: str) -> None:
    """The arithmetic of affine groups may be fused in MLX, so that the last bit differs; small floats are exact."""
    made, kind, weights = find_grid(name), layout(name), weights_of()
    params, codes = made.quantize(weights)
    rows = QTensor(made, weights.shape, codes, params)
    raw = kind.pack(rows, weights.shape)
    words, *rest = (one.reshape(len(weights), -1) for one in raw)
    scales = [one.view(np.float32) if kind.mode == "affine" else one for one in rest]
    values = dequantized(kind.settings(), words.view(np.uint32), *scales)
    exact = 0.0 if kind.mode != "affine" else 1e-6 * float(np.abs(weights).max())
    np.testing.assert_allclose(rows.decode(), values, rtol=0, atol=exact)
    back = kind.unpack([one.reshape(-1) for one in raw], len(weights), weights.shape)
    np.testing.assert_array_equal(back.codes, codes)
    for key, value in params.items():
        np.testing.assert_array_equal(back.params[key], value)
        assert back.params[key].dtype == value.dtype


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "grid"),
    [
        ("llama", "BF16", False, "affine4-g64"),
        ("llama", "F16", False, "int4-g64-asym"),
        ("qwen2", "F16", True, "affine3-g32"),
        ("qwen2", "BF16", True, "nvfp4-bare"),
        ("phi3", "BF16", False, "affine6-g128"),
        ("qwen3", "F32", True, "mxfp4"),
        ("mistral", "BF16", False, "mxfp8_e4m3"),
    ],
)
def test_mlx_lm_loads_it_and_computes_our_decode(
    family: str, dtype: str, tied: bool, grid: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "in", family, dtype=dtype, tied=tied)
    checkpoint, architecture = open_model(source)
    out = tmp_path / "out"
    written = write(checkpoint, architecture, out, grid, "mlx")
    assert sum(path.stat().st_size for path in out.iterdir()) == written.nbytes
    assert runtime_name(out) == "mlx" and RUNTIME.check(out) == []
    decoded = our_values(out, architecture)
    assert decoded.keys() == set(checkpoint.names())
    with RUNTIME.load(out) as session:
        theirs = session.logits(TOKENS.tolist())
        session.clear()
        session.decode(TOKENS[:90].tolist())
        last = [session.step(int(token)) for token in TOKENS[90:]][-1]
        assert session.vocabulary == architecture.dimensions.vocabulary
        assert len("".join(session.generate("Once upon", 5))) > 0
        assert list(session.generate("Once upon", 5, 1.0, 3)) == list(session.generate("Once upon", 5, 1.0, 3))
    ours = their_logits(source, decoded)
    spread = float(ours.std())
    assert np.abs(theirs - ours).max() <= 2e-4 * spread
    assert np.abs(theirs[-1] - last).max() <= 2e-4 * spread
    changed = "model.layers.1.self_attn.o_proj.weight"
    wrong = {**decoded, changed: decoded[changed] * np.float32(1.02)}
    assert np.abs(their_logits(source, wrong) - theirs).max() > 1e-3 * spread


def test_a_mutated_folder_computes_something_else(tmp_path: Path) -> None:
    """The proof sees one wrong word of a module."""
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16")
    checkpoint, architecture = open_model(source)
    out = tmp_path / "out"
    written = write(checkpoint, architecture, out, "affine4-g64", "mlx")
    ours = their_logits(source, our_values(out, architecture))
    file, part = written.locate()["model.layers.0.mlp.down_proj.weight"]
    with (out / file.path).open("r+b") as stream:
        stream.seek(part.offset)
        words = bytes(byte ^ 0x88 for byte in stream.read(part.nbytes // 4))
        stream.seek(part.offset)
        stream.write(words)
    with RUNTIME.load(out) as session:
        assert np.abs(session.logits(TOKENS.tolist()) - ours).max() > 1e-2 * float(ours.std())


def test_files_are_what_mlx_lm_writes(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "phi3", dtype="BF16", config={"vocab_size": 1024})
    checkpoint, architecture = open_model(source)
    out = tmp_path / "out"
    grids = {linear.name: "affine4-g64" for linear in architecture.linears}
    grids |= {"embedding": "affine8-g32", "blocks.0.attn_output": "bf16"}
    grids |= {f"blocks.1.{role}": "mxfp4" for role in ("ffn_gate", "ffn_up")}
    write(checkpoint, architecture, out, grids, "mlx")
    config = json.loads((out / "config.json").read_text())
    assert (
        config["quantization"]
        == config["quantization_config"]
        == {
            "group_size": 64,
            "bits": 4,
            "mode": "affine",
            "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
            "model.layers.1.mlp.gate_up_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        }
    )
    assert (config["rope_theta"], config["tie_word_embeddings"]) == (3000.0, False)
    arrays, metadata = mx.load(str(out / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    hidden = architecture.dimensions.hidden
    stored = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
    assert stored["lm_head.weight"] == (mx.uint32, (1024, hidden // 8))
    assert stored["lm_head.scales"] == stored["lm_head.biases"] == (mx.bfloat16, (1024, hidden // 64))
    assert stored["model.embed_tokens.weight"] == (mx.uint32, (1024, hidden // 4))
    assert stored["model.layers.1.mlp.gate_up_proj.scales"] == (mx.uint8, (1024, hidden // 32))
    assert "model.layers.1.mlp.gate_up_proj.biases" not in stored
    assert stored["model.layers.0.self_attn.o_proj.weight"] == (mx.bfloat16, (hidden, hidden))
    decoded = our_values(out, architecture)
    with RUNTIME.load(out) as session:
        theirs = session.logits(TOKENS.tolist())
    ours = their_logits(source, decoded)
    assert np.abs(theirs - ours).max() <= 2e-4 * float(ours.std())


def convert(source: Path, out: Path, **options: Any) -> None:
    from mlx_lm.convert import convert as mlx_convert

    with contextlib.redirect_stdout(io.StringIO()):
        mlx_convert(str(source), str(out), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": True},
        {"quantize": True, "q_bits": 3, "q_group_size": 32, "dtype": "float16"},
        {"quantize": True, "q_bits": 8, "q_group_size": 128, "dtype": "float32"},
        {"quantize": True, "quant_predicate": "mixed_3_6"},
        {"quantize": True, "q_mode": "mxfp4"},
        {"quantize": True, "q_mode": "mxfp8"},
        {"quantize": True, "q_mode": "nvfp4"},
    ],
    ids=str,
)
def test_folders_of_mlx_lm_are_read(options: Mapping[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16", blocks=3)
    convert(source, tmp_path / "out", **options)
    assert isinstance(FORM, FolderFormat)
    found = FORM.read(open_checkpoint(tmp_path / "out"))
    assert detect(found).family == "llama"
    arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
    settings = found.stored.config["quantization"]
    common = {key: settings[key] for key in ("group_size", "bits", "mode")}
    assert set(found.names()) == set(open_checkpoint(source).names())
    widths = set()
    for name in found.names():
        values = read_tensor(found, name)
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in arrays:
            assert values.ndim == 1
            continue
        own = {**common, **settings.get(path, {})}
        widths.add(own["bits"])
        scales = [arrays[f"{path}.{key}"] for key in ("scales", "biases") if f"{path}.{key}" in arrays]
        wide = [one if one.dtype == mx.uint8 else one.astype(mx.float32) for one in scales]
        theirs = dequantized(own, arrays[name], *wide)
        np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-6 if own["mode"] == "affine" else 0)
        assert found.grid_of(name) is not None
    assert len(widths) == (2 if "quant_predicate" in options else 1)


def recipe_plan(source: Path, **wishes: Any) -> Any:
    checkpoint, architecture = open_model(source)
    return make_plan(Model(architecture, checkpoint, checkpoint), FORM, Recipe(**wishes), False)


def test_embedding_and_head_are_quantized_unless_one_says_otherwise(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16")
    for wish in ({"grid": "affine4-g64"}, {"preset": "4bit"}):
        assert {one.grid for one in recipe_plan(source, **wish).decisions.values()} == {"affine4-g64"}
    kept = recipe_plan(source, grid="affine4-g64", embedding="bf16", head="affine8-g32").decisions
    assert (kept["embedding"].grid, kept["head"].grid) == ("bf16", "affine8-g32")


def test_what_groups_do_not_divide_is_named_in_the_plan(tmp_path: Path) -> None:
    """mlx-lm leaves such layers in float, and says nothing."""
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16", config={"intermediate_size": 352})
    decision = recipe_plan(source, grid="affine4-g128").decisions["blocks.0.ffn_down"]
    assert decision.grid == "affine4-g32" and "falls back" in decision.reason
    source = make_checkpoint(tmp_path / "odd", "llama", dtype="BF16", config={"intermediate_size": 336})
    for name in ("affine4-g64", "mxfp4"):
        decision = recipe_plan(source, grid=name).decisions["blocks.0.ffn_down"]
        assert decision.grid == "bf16" and "stays bf16" in decision.reason and "336" in decision.reason


def test_nvfp4_is_made_without_the_scale_that_mlx_does_not_store(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16")
    for wish in ({"grid": "nvfp4"}, {"preset": "nvfp4"}):
        for decision in recipe_plan(source, **wish).decisions.values():
            assert (decision.requested, decision.grid) == ("nvfp4", "nvfp4-bare")
            assert "mlx holds nvfp4-bare" in decision.reason
    made, weights, kind = find_grid("nvfp4"), weights_of(), layout("nvfp4")
    assert kind.grid == "nvfp4-bare"
    for power, whole in ((0, True), (3, False)):
        shared = {"global_scale": np.array([[2.0**power]], dtype=np.float32)}
        params, codes = made.quantize(weights, None, shared)
        rows = QTensor(made, weights.shape, codes, params)
        if whole:
            words, scales = kind.pack(rows, weights.shape)
            values = dequantized(kind.settings(), words.view(np.uint32), scales)
            np.testing.assert_array_equal(values, rows.decode())
        else:
            with pytest.raises(UnsupportedError, match="global scale of 8"):
                kind.pack(rows, weights.shape)


def test_scales_that_underflow_are_refused() -> None:
    made = find_grid("nvfp4-bare")
    weights = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    for size in (1.0, 0.02, 0.005):
        params, codes = made.quantize(weights * np.float32(size))
        lost = np.mean((made.decode(codes, params) - weights * np.float32(size)) ** 2) / size**2
        assert lost < 0.025
    for size in (1e-3, 1e-4):
        small = weights * np.float32(size)
        theirs = dequantized({"mode": "nvfp4"}, *mx.quantize(mx.array(small), mode="nvfp4"))
        assert np.mean((theirs - small) ** 2) > 0.1 * np.mean(small**2)
        with pytest.raises(UnsupportedError, match=r"nvfp4-bare .* underflow.*mxfp4"):
            made.quantize(small)
    decision = Decision("blocks.0.ffn_up", "nvfp4", "nvfp4-bare", "test")
    with pytest.raises(UnsupportedError, match=r"^blocks.0.ffn_up: nvfp4-bare"):
        quantized(decision, Task(weights * np.float32(1e-4), made, place="blocks.0.ffn_up"))
    params, codes = made.quantize(np.zeros((8, 256), dtype=np.float32))
    assert not made.decode(codes, params).any()


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "phi3"))

    def reasons(changes: Mapping[str, str], where: Architecture = architecture) -> str:
        grids = {linear.name: "affine4-g64" for linear in architecture.linears} | changes
        return "; ".join(FORM.refuses(where, planned(FORM, architecture, grids, "x", ""), checkpoint))

    assert reasons({}) == ""
    assert "no place for grid 'q4_k'" in reasons({"blocks.0.ffn_down": "q4_k"})
    assert "int7-g64" in reasons({"blocks.0.ffn_down": "int7-g64"})
    assert "qkv_proj is one module" in reasons({"blocks.0.attn_q": "affine8-g64"})
    assert "family gemma" in reasons({}, dataclasses.replace(architecture, family="gemma"))
    for scaling, said in (
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, "longrope"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}, "attention_factor"),
    ):
        sizes = dataclasses.replace(architecture.dimensions, rope_scaling=scaling)
        assert said in reasons({}, dataclasses.replace(architecture, dimensions=sizes))
    assert set(FORM.ties(architecture)) == {
        f"blocks.{block}.{role}" for block in range(2) for role in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    }
    made, weights = find_grid("int4-g64"), weights_of()
    params, codes = made.quantize(weights)
    groups = np.zeros(384, dtype=np.int32)
    with pytest.raises(UnsupportedError, match="act-order"):
        layout("int4-g64").pack(QTensor(made, weights.shape, codes, params, groups), weights.shape)


def test_a_scale_that_the_models_type_does_not_hold_is_refused(tmp_path: Path) -> None:
    """Integer grids have scales below the least float16."""
    checkpoint, architecture = open_model(make_checkpoint(tmp_path / "in", "llama", dtype="F16"))

    def tiny(item: Any, values: Float32) -> Float32:
        return values * np.float32(1e-7) if item.name == "blocks.0.ffn_up" else values

    write(checkpoint, architecture, tmp_path / "fine", "affine4-g64", "mlx", tiny)
    with pytest.raises(UnsupportedError, match=r"blocks.0.ffn_up, scales: .* is not a number of F16"):
        write(checkpoint, architecture, tmp_path / "out", "int4-g64", "mlx", tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("mlx")
    checkpoint, architecture = open_model(make_checkpoint(base / "in", "llama", dtype="BF16"))
    write(checkpoint, architecture, base / "out", "affine4-g64", "mlx")
    return base / "out"


def broken(folder: Path, out: Path, settings: Any = None, changes: Mapping[str, Any] | None = None) -> Path:
    """A copy with other settings, and tensors left out (None) or of another shape."""
    out.mkdir()
    config = json.loads((folder / "config.json").read_text())
    if settings is not None:
        config["quantization"] = settings if not isinstance(settings, dict) else config["quantization"] | settings
    (out / "config.json").write_text(json.dumps(config))
    parts = {part.name: (part.dtype, part.shape) for part in FORM.parts(folder).values()} | dict(changes or {})
    tensors = [(name, *facts) for name, facts in parts.items() if facts]
    header, _ = write_safetensors_header(tensors)
    sizes = {"BF16": 2, "U32": 4, "U8": 1}
    body = sum(int(np.prod(shape)) * sizes[dtype] for _, dtype, shape in tensors)
    (out / "model.safetensors").write_bytes(header + bytes(body))
    return out


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("settings", "changes", "said"),
    [
        ({"bits": 7}, None, "7 bits in groups of 64 is not read"),
        ({"bits": "4"}, None, "'4' bits"),
        ({"bits": None, "group_size": None, "mode": None}, None, "mode None"),
        ({"mode": "fp4"}, None, "mode 'fp4'"),
        ({"mode": "mxfp4"}, None, "mode 'mxfp4' with 4 bits in groups of 64"),
        ({"mode": "mxfp4", "group_size": 32}, None, "do not fit"),
        ({"bits": 8}, None, "do not fit 8 bits in groups of 64"),
        ({"group_size": 32}, None, "do not fit 4 bits in groups of 32"),
        ([4, 64], None, "not an object"),
        ({DOWN: False}, None, f"{DOWN}: config.json says that it is not quantized"),
        ({"model.layers.7.mlp.down_proj": {"bits": 4, "group_size": 64}}, None, "model.layers.7.mlp.down_proj, which"),
        ({DOWN: {"bits": 4, "group_size": 64, "global_scale": True}}, None, "whole tensor"),
        (None, {f"{DOWN}.biases": None}, f"{DOWN} has no biases"),
        (None, {f"{DOWN}.weight": None}, f"{DOWN} has scales and no weight"),
        (None, {f"{DOWN}.weight": ("U32", (256, 63))}, r"weight U32 \[256, 63\]"),
        (None, {f"{DOWN}.weight": ("BF16", (256, 64))}, "weight BF16"),
        (None, {f"{DOWN}.biases": ("BF16", (256, 7))}, rf"{DOWN}.biases is BF16 \[256, 7\]"),
        (None, {f"{DOWN}.scales": ("U8", (256, 8))}, f"{DOWN}.scales is U8"),
    ],
)
def test_bad_folders_are_refused_by_name(
    settings: Any, changes: Mapping[str, Any] | None, said: str, folder: Path, tmp_path: Path
) -> None:
    assert isinstance(FORM, FolderFormat)
    found = FORM.read(open_checkpoint(broken(folder, tmp_path / "bad", settings, changes)))
    with pytest.raises((BadInputError, UnsupportedError), match=said):
        found.names()


def test_a_folder_of_mlx_is_no_source(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"already quantized .*mlx"):
        detect(open_checkpoint(folder))


def test_what_the_runtime_does_not_open_is_said(folder: Path, tmp_path: Path) -> None:
    copy = broken(folder, tmp_path / "bad")
    assert "tokenizer" in RUNTIME.check(copy)[0]
    (copy / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert RUNTIME.check(copy) == []
    with pytest.raises(AnyQuantError, match="cache"):
        RUNTIME.load(copy, cache="q8_0")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_file": "evil.py", "model_type": "os"}))
    reasons = "; ".join(RUNTIME.check(copy))
    assert "'os'" in reasons and "file of code" in reasons
    lost = broken(folder, tmp_path / "lost", None, {f"{DOWN}.biases": None})
    (lost / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(BadInputError, match="mlx-lm cannot load it"):
        RUNTIME.load(lost)


def test_a_rule_changes_one_matrix(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "in", "llama", dtype="BF16")
    rules = (Rule(role="ffn_down", grid="affine6-g64"),)
    plan = recipe_plan(source, grid="affine4-g64", rules=rules)
    assert plan.decisions["blocks.1.ffn_down"].grid == "affine6-g64"
