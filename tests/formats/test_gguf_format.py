"""GGUF files judged by their real readers: gguf.GGUFReader, and llama.cpp against transformers, logits by logits."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError
from anyquant.core.linear import Carried, Linear, Role
from anyquant.core.plan import Layout
from anyquant.formats import FORMATS
from anyquant.formats.gguf.metadata import file_type, refuse_scaling
from anyquant.formats.gguf.names import paired_rows
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.runtimes.llamacpp import LlamaCpp
from anyquant.store.open import open_checkpoint
from support.checkpoints import PROBE_TEXTS, make_checkpoint
from support.write import Change, make_plan, write

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 3.0}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
    "yarn with attention factor": (
        "llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.3},
    ),
    "yarn with mscale": (
        "llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        | {"mscale": 0.7, "mscale_all_dim": 1.2},
    ),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + index / 8 for index in range(32)],
            "long_factor": [2.0 + index / 2 for index in range(32)],
            "original_max_position_embeddings": 256,
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint and what transformers computes on `tokens`."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: Tokenizer
    tokens: list[int]
    logits: npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Case]]:
    root = tmp_path_factory.mktemp("gguf")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    @cache
    def make(family: str, tied: bool, variant: str) -> Case:
        config: dict[str, Any] = {}
        if variant in ROPES:
            config = {"rope_parameters": {"rope_theta": 3000.0, **ROPES[variant][1]}}
        if variant == "longrope":
            config["original_max_position_embeddings"] = 256
        if variant == "biases":
            config = {"attention_bias": True, "mlp_bias": True}
        folder = make_checkpoint(
            root / f"{family}-{tied}-{variant}".replace(" ", "-"), family, tied=tied, config=config
        )
        checkpoint = open_checkpoint(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = tokenizer.encode(" ".join(PROBE_TEXTS[:12])).ids[:192]
        return Case(checkpoint, detect(checkpoint), tokenizer, tokens, reference(folder, tokens))

    yield lambda family, tied=False, variant="": make(family, tied, variant)
    torch.set_num_threads(threads)


def reference(folder: Path, tokens: list[int]) -> npt.NDArray[np.float32]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: npt.NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def mean_kl(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Mean KL(reference || other) over positions, nats per token."""
    first, second = (torch.from_numpy(np.array(x)).double().log_softmax(-1) for x in (reference, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def kl_of(
    case: Case, folder: Path, grid: str, change: Change | None = None, architecture: Architecture | None = None
) -> float:
    write(case.checkpoint, architecture or case.architecture, folder, grid, change=change)
    with LlamaCpp.open(folder / "model.gguf", context=256, threads=1) as model:
        return mean_kl(case.logits, model.logits(case.tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family: str, cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases(family)
    assert kl_of(case, tmp_path / "f32", "f32") < 1e-8  # asked for: 1e-5
    assert kl_of(case, tmp_path / "f16", "f16") < 1e-4  # asked for: 1e-3
    with LlamaCpp.open(tmp_path / "f32" / "model.gguf", threads=1) as model:
        for text in PROBE_TEXTS:
            assert model.tokenize(text) == case.tokenizer.encode(text).ids, text


@pytest.mark.parametrize(("family", "tied", "variant"), [("llama", True, ""), ("llama", False, "biases")])
def test_tied_heads_and_biases(
    family: str, tied: bool, variant: str, cases: Callable[..., Case], tmp_path: Path
) -> None:
    assert kl_of(cases(family, tied, variant), tmp_path, "f32") < 1e-8


@pytest.mark.parametrize("variant", ROPES)
def test_rotary_scalings(variant: str, cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases(ROPES[variant][0], variant=variant)
    assert kl_of(case, tmp_path / "right", "f32") < 1e-8
    plain = dataclasses.replace(case.architecture.dimensions, rope_scaling={})
    wrong = dataclasses.replace(case.architecture, dimensions=plain)
    assert kl_of(case, tmp_path / "wrong", "f32", architecture=wrong) > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_without_the_row_permutation_it_fails(family: str, cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases(family)
    head = case.architecture.dimensions.head_dim

    def undo(item: Linear | Carried, values: Float32) -> Float32:
        if item.role not in (Role.ATTN_Q, Role.ATTN_K):
            return values
        undone = np.empty_like(values)
        undone[paired_rows(len(values), head)] = values
        return undone

    assert kl_of(case, tmp_path, "f32", change=undo) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_wrong_theta_it_fails(family: str, cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases(family)
    wrong = dataclasses.replace(case.architecture.dimensions, rope_theta=10000.0)
    assert kl_of(case, tmp_path, "f32", architecture=dataclasses.replace(case.architecture, dimensions=wrong)) > 1e-2


@pytest.mark.parametrize(
    ("family", "variant", "names"),
    [
        ("llama", "", ["blocks.0.attn_norm", "blocks.1.ffn_norm", "output_norm"]),
        ("mistral", "", ["blocks.1.attn_norm"]),
        ("phi3", "", ["blocks.0.ffn_norm"]),
        ("qwen2", "", ["blocks.0.attn_q_bias", "blocks.1.attn_k_bias", "blocks.0.attn_v_bias"]),
        ("qwen3", "", ["blocks.0.attn_q_norm", "blocks.1.attn_k_norm"]),
        ("llama", "biases", ["blocks.0.attn_k_bias", "blocks.1.attn_output_bias", "blocks.0.ffn_down_bias"]),
    ],
)
def test_without_one_norm_or_bias_it_fails(
    family: str, variant: str, names: list[str], cases: Callable[..., Case], tmp_path: Path
) -> None:
    case = cases(family, variant=variant)
    for name in names:

        def drop(item: Linear | Carried, values: Float32, name: str = name) -> Float32:
            if item.name != name:
                return values
            return np.zeros_like(values) if name.endswith("bias") else np.ones_like(values)

        assert kl_of(case, tmp_path / name, "f32", change=drop) > 1e-2, name


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gguf_reader_sees_the_planned_file(family: str, cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases(family)
    chosen = {
        linear.name: "q8_0" if linear.role in (Role.EMBEDDING, Role.FFN_DOWN) else "bf16"
        for linear in case.architecture.linears
    }
    layout = write(case.checkpoint, case.architecture, tmp_path, chosen)
    assert (tmp_path / "model.gguf").stat().st_size == layout.nbytes
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in read.tensors}
    parts = {part.name: part for part in layout.files[0].parts}
    assert tensors.keys() == parts.keys()
    for name, tensor in tensors.items():
        found = (tensor.tensor_type.name, tuple(map(int, tensor.shape))[::-1], tensor.data_offset, tensor.n_bytes)
        assert found == (parts[name].dtype, parts[name].shape, parts[name].offset, parts[name].nbytes)
        assert tensor.data_offset % 32 == 0
    assert dict(FORMATS.get("gguf").parts(tmp_path)) == parts
    sizes = case.architecture.dimensions
    for key, wanted in {
        "general.architecture": {"llama": "llama", "phi3": "phi3"}[family],
        "general.file_type": 32,
        "general.quantization_version": 2,
        f"{family}.context_length": sizes.context,
        f"{family}.feed_forward_length": sizes.intermediate,
        f"{family}.attention.head_count_kv": sizes.kv_heads,
        f"{family}.rope.freq_base": 3000.0,
    }.items():
        assert read.fields[key].contents() == wanted, key
    if family == "phi3":
        width = sum(case.architecture.by_name[f"blocks.0.attn_{letter}"].view.rows for letter in "qkv")
        assert parts["blk.0.attn_qkv.weight"].shape == (width, sizes.hidden)
        assert parts["blk.1.ffn_up.weight"].shape == (2 * sizes.intermediate, sizes.hidden)


@pytest.mark.parametrize(("family", "variant"), [("llama", "biases"), ("phi3", "longrope"), ("qwen3", "")])
def test_open_gives_the_source_back(family: str, variant: str, cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases(family, variant=variant)
    write(case.checkpoint, case.architecture, tmp_path, "f32")
    opened = FORMATS.get("gguf").open(tmp_path, case.architecture)
    assert set(opened.names()) == set(case.checkpoint.names())
    for name in opened.names():
        source = read_tensor(case.checkpoint, name)
        assert opened.spec(name).shape == source.shape
        np.testing.assert_array_equal(read_tensor(opened, name), source)
        if source.ndim == 2:  # rows that start and end inside a head and, where fused, in different Linears
            span = np.empty((len(source) - 40, source.shape[1]), dtype=np.float32)
            opened.read_into(name, 17, len(source) - 23, span.reshape(-1).view(np.uint8))
            np.testing.assert_array_equal(span, source[17:-23])


def test_open_decodes_the_bytes_of_the_artifact(cases: Callable[..., Case], tmp_path: Path) -> None:
    """The same logits from llama.cpp on the file as from transformers on our decoding of it."""
    case = cases("llama")
    write(case.checkpoint, case.architecture, tmp_path, "q8_0")
    opened = FORMATS.get("gguf").open(tmp_path / "model.gguf", case.architecture)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    down = stored["blk.1.ffn_down.weight"]
    expected = gguf.quants.dequantize(down.data, down.tensor_type)
    np.testing.assert_array_equal(read_tensor(opened, "model.layers.1.mlp.down_proj.weight"), expected)
    with pytest.raises(BadInputError, match="another model"):
        FORMATS.get("gguf").open(tmp_path, _with_vocabulary(case.architecture, 64))


def _with_scaling(architecture: Architecture, **changes: float) -> Architecture:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **changes}
    return dataclasses.replace(
        architecture, dimensions=dataclasses.replace(architecture.dimensions, rope_scaling=scaling)
    )


def _with_vocabulary(architecture: Architecture, rows: int) -> Architecture:
    first = architecture.linears[0]
    view = dataclasses.replace(first.view, rows=rows)
    return dataclasses.replace(architecture, linears=(dataclasses.replace(first, view=view), *architecture.linears[1:]))


def test_the_same_input_gives_the_same_bytes(cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases("qwen2")
    layouts: list[Layout] = [
        write(case.checkpoint, case.architecture, tmp_path / name, "q8_0") for name in ("one", "two")
    ]
    assert (tmp_path / "one" / "model.gguf").read_bytes() == (tmp_path / "two" / "model.gguf").read_bytes()
    assert layouts[0] == layouts[1]


def test_what_cannot_be_written_is_refused_before_any_work(cases: Callable[..., Case], tmp_path: Path) -> None:
    form = FORMATS.get("gguf")
    folder = make_checkpoint(tmp_path / "moe", "qwen3_moe")
    checkpoint = open_checkpoint(folder)
    architecture = detect(checkpoint)
    grids = {linear.name: "q8_0" for linear in architecture.linears}
    plan = make_plan(form, architecture, grids, "q8_0", "F32")
    assert "mixture-of-experts" in form.refuses(architecture, plan, checkpoint)[0]

    case = cases("llama")
    grids = {linear.name: "int4-g128" for linear in case.architecture.linears}
    plan = make_plan(form, case.architecture, grids, "int4-g128", "F16")
    reasons = "; ".join(form.refuses(case.architecture, plan, case.checkpoint))
    assert "int4-g128" in reasons and "as F16" in reasons
    assert "beta_fast" in "; ".join(refuse_scaling(_with_scaling(case.architecture, beta_fast=16.0)))
    odd = dataclasses.replace(case.architecture, family="gpt_neox")
    assert "gpt_neox" in form.refuses(odd, plan, case.checkpoint)[0]


def test_planning_rules(cases: Callable[..., Case]) -> None:
    form, phi3 = FORMATS.get("gguf"), cases("phi3").architecture
    ties = form.ties(phi3)
    assert {name for name, group in ties.items() if group == "blk.1.attn_qkv.weight"} == {
        f"blocks.1.attn_{letter}" for letter in "qkv"
    }
    assert ties["blocks.0.ffn_gate"] == ties["blocks.0.ffn_up"] and "blocks.0.ffn_down" not in ties
    assert form.ties(cases("llama").architecture) == {}
    head, embedding, down = (phi3.by_name[name] for name in ("head", "embedding", "blocks.0.ffn_down"))
    assert form.default_grid(head, phi3, "q4_k", "bf16")[0] == "q6_k"
    assert form.default_grid(embedding, phi3, "q4_k", "bf16")[0] == "q4_k"
    assert form.default_grid(embedding, phi3, "int4-g128", "bf16")[0] == "bf16"
    narrow = dataclasses.replace(down, view=dataclasses.replace(down.view, columns=96))
    assert (form.fallback("q4_k", down), form.fallback("q4_k", narrow)) == (None, "q5_0")


def test_a_window_becomes_the_context(cases: Callable[..., Case]) -> None:
    """llama.cpp attends to everything in these families: equal to the model only inside the window."""
    case = cases("llama")
    form = FORMATS.get("gguf")
    grids = {linear.name: "q8_0" for linear in case.architecture.linears}
    plan = make_plan(form, case.architecture, grids, "Q4_K_M", "F32")
    assert file_type(case.architecture, plan) == 15
    windowed = dataclasses.replace(
        case.architecture, dimensions=dataclasses.replace(case.architecture.dimensions, window=100)
    )
    prefix = form.layout(windowed, plan, case.checkpoint).files[0].prefix
    key = b"llama.context_length"
    start = prefix.index(key) + len(key) + 4
    assert int.from_bytes(prefix[start : start + 4], "little") == 100
