"""Model types without a class here: structure, logits and statistics against plain transformers."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from anyquant.calibrate.chain import Chain
from anyquant.core.checkpoint import read_view
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.formats import FORMATS
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.store.open import open_checkpoint
from models.altered import Altered
from support.structural import MODELS, SMALL, make

DOCUMENTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (40, 7, 40, 1, 35)
]
KINDS = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: make(base / name, name) for name in MODELS}


def whole(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    model = getattr(transformers, MODELS[model_type][0]).from_pretrained(folder, dtype=dtype).eval()
    model.config._experts_implementation = "eager"  # the others do not take float64
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_every_byte_has_a_place_and_every_matrix_a_linear(folders: dict[str, Path], model_type: str) -> None:
    checkpoint = open_checkpoint(folders[model_type])
    architecture = detect(checkpoint)
    assert architecture.family == f"transformers:{model_type}" and not architecture.unused
    elements: dict[str, int] = defaultdict(int)
    for linear in architecture.linears:
        elements[linear.view.tensor] += linear.shape[0] * linear.shape[1]
    for carried in architecture.carried:
        elements[carried.tensor] += carried.length
    assert elements == {name: checkpoint.spec(name).elements for name in checkpoint.names()}
    model = whole(folders[model_type], model_type)
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, KINDS) and architecture.block_path in name
    }
    linears = {
        linear.module: linear for linear in architecture.linears if linear.block is not None and linear.expert is None
    }
    assert linears.keys() == matrices.keys()
    for name, module in matrices.items():
        weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        found = read_view(checkpoint, linears[name].view, 0, linears[name].shape[0])
        np.testing.assert_array_equal(found, weight.detach().numpy())


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_equal_the_whole_model(folders: dict[str, Path], model_type: str) -> None:
    checkpoint = open_checkpoint(folders[model_type])
    streamed = StreamedModel(checkpoint, detect(checkpoint))
    batches = streamed.embed(DOCUMENTS)
    streamed.run_blocks(batches)
    model = whole(folders[model_type], model_type)
    with streamed.head() as head, torch.no_grad():
        for batch in batches:
            for row, index in enumerate(batch.documents):
                expected = model(torch.tensor([DOCUMENTS[index]])).logits[0].numpy()
                found = head(batch.states[row])
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("model_type", MODELS)
def test_statistics_equal_hooks_on_the_whole_model(folders: dict[str, Path], model_type: str) -> None:
    """Linears with the same input in float64 share a group, others do not; the moments are those of the hooks."""
    checkpoint = open_checkpoint(folders[model_type])
    chain = Chain(StreamedModel(checkpoint, detect(checkpoint)), DOCUMENTS)
    needs = frozenset({"hessian"})
    found: dict[str, Any] = {}
    for index in range(3):
        with chain.block(index) as live:
            for linear in live.linears:
                weights = live.weights(linear)
                live.assign(linear, weights)
                np.testing.assert_array_equal(weights, live.weights(linear))
            found |= live.advance(needs)
    found["output_input"] = chain.head(needs)
    model = whole(folders[model_type], model_type, torch.float64)
    seen: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        return lambda module, arguments: seen.setdefault(name, []).append(
            arguments[0].reshape(-1, arguments[0].shape[-1])
        )

    for name, module in model.named_modules():
        if isinstance(module, KINDS):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for document in DOCUMENTS:
            model(torch.tensor([document]))
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    linears = [linear for linear in chain.model.architecture.linears if linear.module in inputs]
    assert len(linears) >= 3 * 4
    for linear in linears:
        x = inputs[linear.module]
        expected = (x.T @ x / len(x)).numpy()
        np.testing.assert_allclose(found[linear.input_group].hessian, expected, rtol=1e-4, atol=1e-5 * expected.max())
    for one in linears:
        for other in linears:
            equal = torch.equal(inputs[one.module], inputs[other.module])
            assert equal == (one.input_group == other.input_group), (one.name, other.name)


@pytest.mark.parametrize("separate", [True, False])
def test_experts_of_an_unknown_model_type(tmp_path: Path, separate: bool) -> None:
    """One tensor per expert and matrix as published, or stacked: the same Linears, the same statistics."""
    folder = make(tmp_path / "one", "olmoe")
    model = whole(folder, "olmoe")
    if not separate:
        model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    checkpoint = open_checkpoint(folder if separate else tmp_path / "stacked")
    architecture = detect(checkpoint)
    by_name = {linear.name: linear for linear in architecture.linears if linear.block == 1}
    experts = model.model.layers[1].mlp.experts
    for expert in range(4):
        gate, up = experts.gate_up_proj[expert].detach().chunk(2)
        down = experts.down_proj[expert].detach()
        for kind, role, weight in (("gate_up", "gate", gate), ("gate_up", "up", up), ("down", "down", down)):
            linear = by_name[f"blocks.1.mlp.experts.{expert}.{kind}_proj.ffn_{role}"]
            assert linear.role == f"ffn_{role}" and linear.expert == expert
            np.testing.assert_array_equal(read_view(checkpoint, linear.view, 0, linear.shape[0]), weight.numpy())
    chain = Chain(StreamedModel(checkpoint, architecture), DOCUMENTS)
    for index in range(2):
        with chain.block(index) as live:
            found = live.advance(frozenset({"second_moment"}))
    seen: list[Any] = []
    experts.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    with torch.no_grad():
        for document in DOCUMENTS:
            model(torch.tensor([document]))
    states, chosen = (torch.cat([arguments[place] for arguments in seen]) for place in (0, 1))
    for expert in range(4):
        mine = states[(chosen == expert).any(-1)].double()
        moments = found[f"blocks.1.mlp.experts.{expert}.gate_up_proj.input"]
        assert moments.count == len(mine) > 0
        np.testing.assert_allclose(moments.second_moment, mine.square().mean(0).numpy(), rtol=1e-4)


def test_roles_and_groups_of_gpt2(folders: dict[str, Path]) -> None:
    architecture = detect(open_checkpoint(folders["gpt2"]))
    block = {linear.name: linear for linear in architecture.linears if linear.block == 1}
    assert {name: linear.role.value for name, linear in block.items()} == {
        "blocks.1.attn.c_attn": "attn_q",
        "blocks.1.attn.c_proj": "attn_output",
        "blocks.1.mlp.c_fc": "ffn_up",
        "blocks.1.mlp.c_proj": "ffn_down",
    }
    assert block["blocks.1.attn.c_attn"].shape == (96, 32) and block["blocks.1.attn.c_attn"].view.transposed
    assert architecture.tied and architecture.by_name["embedding"].input_group == "output_input"


def test_published_names_without_the_inner_model_and_with_constants(folders: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 as it is published: no "transformer." before the names, and the attention's mask beside the weights."""
    state = load_file(folders["gpt2"] / "model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in state.items()}
    renamed["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folders["gpt2"] / "config.json").read_text())
    checkpoint = open_checkpoint(tmp_path)
    architecture = detect(checkpoint)
    assert architecture.unused == {"h.0.attn.bias": "a constant, which transformers computes"}
    states = []
    for found in (checkpoint, open_checkpoint(folders["gpt2"])):
        streamed = StreamedModel(found, detect(found))
        batches = streamed.embed(DOCUMENTS)
        streamed.run_blocks(batches)
        states.append(torch.cat([batch.states.flatten() for batch in batches]))
    assert torch.equal(*states)


def test_gguf_refuses_them_by_name(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["gpt_neox"])
    architecture = detect(checkpoint)
    reasons = FORMATS.get("gguf").refuses(architecture, None, checkpoint)  # type: ignore[arg-type]
    assert len(reasons) == 1 and "'transformers:gpt_neox'" in reasons[0]


def test_what_cannot_be_described_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folders["opt"])
    with pytest.raises(UnsupportedError, match="unknown model_type 'no_such_model'; known: llama"):
        detect(Altered(checkpoint, {"model_type": "no_such_model"}))
    with pytest.raises(UnsupportedError, match=r"already quantized \(quantization_config: awq\)"):
        detect(Altered(checkpoint, {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(BadInputError, match=r"model\.decoder\.layers\.1\.fc1\.weight is missing"):
        detect(Altered(checkpoint, tensors={"model.decoder.layers.1.fc1.weight": None}))
    with pytest.raises(BadInputError, match="claims num_hidden_layers 1000000000"):
        detect(Altered(checkpoint, {"num_hidden_layers": 10**9}))
    with pytest.raises(BadInputError, match="does not describe a opt model"):
        detect(Altered(checkpoint, {"num_attention_heads": 5}))
    settings: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    config: Any = transformers.CONFIG_MAPPING["llama4_text"](
        **{**settings, "intermediate_size": 16, "intermediate_size_mlp": 48}
    )
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "llama4")
    with pytest.raises(UnsupportedError, match=r"experts\.down_proj are not applied one by one"):
        detect(open_checkpoint(tmp_path / "llama4"))
    odd = open_checkpoint(make(tmp_path / "odd", "gemma2", num_key_value_heads=3))
    with pytest.raises(BadInputError, match=r"model\.layers\.0 cannot be run"):
        detect(odd)


def test_an_encoder_without_a_head(folders: dict[str, Path], tmp_path: Path) -> None:
    """BERT in its first names, with what its files held besides; the statistics behind it are of its last states."""
    torch.manual_seed(3)
    model = transformers.BertModel(whole(folders["bert"], "bert").config).eval()  # type: ignore[no-untyped-call]
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in model.state_dict().items()}
    state = {name.replace("LayerNorm.bias", "LayerNorm.beta"): value for name, value in state.items()}
    state |= {"embeddings.position_ids": torch.arange(64)[None], "cls.seq_relationship.bias": torch.zeros(2)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((folders["bert"] / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    architecture = detect(checkpoint)
    assert set(architecture.unused) == {"embeddings.position_ids", "cls.seq_relationship.bias"}
    assert "head" not in architecture.by_name and architecture.class_name == "BertModel"
    chain = Chain(StreamedModel(checkpoint, architecture), DOCUMENTS)
    for index in range(3):
        with chain.block(index) as live:
            live.advance()
    with torch.no_grad():
        states = torch.cat([model(torch.tensor([document])).last_hidden_state[0] for document in DOCUMENTS])
    found = chain.head(frozenset())
    np.testing.assert_allclose(found.second_moment, states.square().mean(0).numpy(), rtol=1e-4)
    with pytest.raises(UnsupportedError, match="BertModel computes no logits"), chain.model.head():
        pass


def test_foreign_switches_never_reach_transformers(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["gpt_neox"])
    changes = {
        "auto_map": {"AutoModelForCausalLM": "evil--evil.Evil"},
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "experts_implementation": "someone/kernel",
        "architectures": ["Evil"],
        "dtype": "float16",
    }
    assert detect(Altered(checkpoint, changes)).linears == detect(checkpoint).linears
