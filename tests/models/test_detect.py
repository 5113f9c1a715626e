"""Detection: every byte has a place, views are the right rows, and whatever is unknown is refused by name."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from anyquant.core.checkpoint import Checkpoint, TensorSpec, read_rows, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from models.altered import Altered
from support.checkpoints import FAMILIES, make_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    **{f"{family}-tied": {"family": family, "tied": True} for family in ("llama", "qwen3", "phi3")},
    **{f"{family}-stacked": {"family": family, "stacked": True} for family in ("mixtral", "qwen2_moe", "qwen3_moe")},
    "llama-biased": {"family": "llama", "config": {"attention_bias": True, "mlp_bias": True}},
    "llama-sharded": {"family": "llama", "dtype": "BF16", "shard_bytes": 300_000},
    "qwen3-biased": {"family": "qwen3", "config": {"attention_bias": True}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant, made once."""
    base = tmp_path_factory.mktemp("models")
    return {name: make_checkpoint(base / name, **how) for name, how in VARIANTS.items()}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> Checkpoint:
    return open_checkpoint(folders["llama"])


def accounted_rows(architecture: Architecture) -> dict[str, list[tuple[int, int]]]:
    """Tensor to the (start, stop) ranges of its rows, or elements of a 1-D one, that have a place."""
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for linear in architecture.linears:
        ranges[linear.view.tensor].append((linear.view.start, linear.view.start + linear.view.rows))
    for carried in architecture.carried:
        ranges[carried.tensor].append((carried.start, carried.start + carried.length))
    return ranges


@pytest.mark.parametrize("name", VARIANTS)
def test_every_byte_is_accounted_for_exactly_once(folders: dict[str, Path], name: str) -> None:
    checkpoint = open_checkpoint(folders[name])
    architecture = detect(checkpoint)
    ranges = accounted_rows(architecture)
    assert set(ranges) == set(checkpoint.names())
    for tensor, parts in ranges.items():
        spec = checkpoint.spec(tensor)
        length = spec.shape[0] if len(spec.shape) == 1 else spec.rows
        edges = [0, *(stop for _, stop in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == edges[:-1], tensor
        assert edges[-1] == length, tensor
    names = [*(linear.name for linear in architecture.linears), *(carried.name for carried in architecture.carried)]
    assert len(set(names)) == len(names)
    columns = {linear.view.tensor: linear.view.columns for linear in architecture.linears}
    assert all(checkpoint.spec(tensor).row_length == width for tensor, width in columns.items())


def matrices(model: Any, family: str, block: int) -> dict[str, torch.Tensor]:
    """Linear name to weight, split the way the modelling code of `transformers` splits its fused weights."""
    layer, config = model.model.layers[block], model.config
    attention, ffn = layer.self_attn, layer.mlp
    found = {"attn_output": attention.o_proj.weight}
    if family == "phi3":
        query = config.num_attention_heads * attention.head_dim
        key = config.num_key_value_heads * attention.head_dim
        fused = attention.qkv_proj.weight
        found |= {"attn_q": fused[:query], "attn_k": fused[query : query + key], "attn_v": fused[query + key :]}
        found["ffn_gate"], found["ffn_up"] = ffn.gate_up_proj.weight.chunk(2, dim=0)
        found["ffn_down"] = ffn.down_proj.weight
        return found
    found |= {f"attn_{part}": getattr(attention, f"{part}_proj").weight for part in "qkv"}
    if not hasattr(ffn, "experts"):
        return found | {f"ffn_{part}": getattr(ffn, f"{part}_proj").weight for part in ("gate", "up", "down")}
    found["router"] = ffn.gate.weight
    for expert in range(config.num_local_experts):
        gate, up = ffn.experts.gate_up_proj[expert].chunk(2, dim=0)
        down = ffn.experts.down_proj[expert]
        found |= {f"experts.{expert}.ffn_{k}": v for k, v in (("gate", gate), ("up", up), ("down", down))}
    return found


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "mixtral-stacked", "qwen3_moe", "qwen3_moe-stacked"])
def test_views_are_the_weights_that_transformers_applies(folders: dict[str, Path], name: str) -> None:
    checkpoint = open_checkpoint(folders[name])
    architecture = detect(checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    modules = dict(model.named_modules())
    expected = {"embedding": model.model.embed_tokens.weight, "head": model.lm_head.weight}
    for block in range(architecture.dimensions.blocks):
        expected |= {f"blocks.{block}.{k}": v for k, v in matrices(model, architecture.family, block).items()}
    assert expected.keys() == architecture.by_name.keys()
    for linear in architecture.linears:
        found: Float32 = read_view(checkpoint, linear.view, 0, linear.view.rows)
        assert np.array_equal(found, expected[linear.name].detach().numpy()), linear.name
        assert linear.module in modules


def test_linears_come_in_order_and_share_their_inputs(llama: Checkpoint) -> None:
    architecture = detect(llama)
    block = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    order = ["embedding", *(f"blocks.{index}.{role}" for index in range(2) for role in block), "head"]
    assert [linear.name for linear in architecture.linears] == order
    groups = [architecture.by_name[f"blocks.1.{role}"].input_group.removeprefix("blocks.1.") for role in block]
    assert groups == ["attn_input"] * 3 + ["attn_output_input"] + ["ffn_input"] * 2 + ["ffn_down_input"]


def test_a_biased_llama_carries_every_bias(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["llama-biased"])
    carried = detect(checkpoint).carried_by_name
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama-biased"], dtype=torch.float32)
    bias = carried["blocks.1.ffn_up_bias"]
    stored = read_rows(checkpoint, bias.tensor, 0, 1)[0, bias.start : bias.start + bias.length]
    assert np.array_equal(stored, model.model.layers[1].mlp.up_proj.bias.detach().numpy())
    assert sum(name.endswith("_bias") for name in carried) == 2 * 7


def test_unknown_tensors_are_named(llama: Checkpoint) -> None:
    extra = {f"model.layers.{i}.self_attn.sinks": TensorSpec("s", "F32", (4,), 16) for i in range(7)}
    with pytest.raises(UnsupportedError, match=r"7 tensors \(model.layers.0.self_attn.sinks, .* and 2 more\)"):
        detect(Altered(llama, tensors=extra))
    with pytest.raises(UnsupportedError, match=r"layers.2.mlp.up_proj.weight"):
        name = "model.layers.2.mlp.up_proj.weight"
        detect(Altered(llama, tensors={name: TensorSpec(name, "F32", (512, 256), 0)}))


def test_missing_and_misshapen_tensors_are_named(llama: Checkpoint) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(BadInputError, match=f"{name} is missing"):
        detect(Altered(llama, tensors={name: None}))
    with pytest.raises(BadInputError, match=r"k_proj.weight has shape \[128, 255\].*calls for \[128, 256\]"):
        detect(Altered(llama, tensors={name: TensorSpec(name, "F32", (128, 255), 0)}))
    with pytest.raises(BadInputError, match=r"lm_head.weight is missing"):
        detect(Altered(llama, tensors={"lm_head.weight": None}))


def test_leftovers_are_listed_with_their_reason(llama: Checkpoint) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    architecture = detect(Altered(llama, tensors={name: TensorSpec(name, "F32", (32,), 128)}))
    assert "rotary" in architecture.unused[name]


def test_a_head_beside_a_tied_embedding_must_be_equal_to_it(llama: Checkpoint, folders: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        detect(Altered(llama, {"tie_word_embeddings": True}))

    class Doubled(Altered):
        def read_into(self, name: str, start: int, stop: int, buffer: Any) -> None:
            super().read_into(name.replace("lm_head", "model.embed_tokens"), start, stop, buffer)

    tied = open_checkpoint(folders["llama-tied"])
    head = TensorSpec("lm_head.weight", "F32", (700, 256), 700 * 256 * 4)
    architecture = detect(Doubled(tied, tensors={"lm_head.weight": head}))
    assert architecture.tied
    assert list(architecture.unused) == ["lm_head.weight"]
    assert "head" not in architecture.by_name


@pytest.mark.parametrize(
    ("tensor", "dtype", "method"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "I32", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight_packed", "I32", "compressed-tensors"),
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", "F8_E4M3"),
        ("model.layers.0.mlp.up_proj.weight", "Q4_K", "Q4_K"),
    ],
)
def test_quantized_checkpoints_are_refused(llama: Checkpoint, tensor: str, dtype: str, method: str) -> None:
    with pytest.raises(UnsupportedError, match=f"already quantized|{method}") as caught:
        detect(Altered(llama, tensors={tensor: TensorSpec(tensor, dtype, (512, 256), 0)}))
    assert method in str(caught.value)
    assert "already quantized" in str(caught.value)
