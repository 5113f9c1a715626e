"""Statistics streamed block by block against forward hooks on the whole model in transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from anyquant.calibrate.stream import collect
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.linear import Role
from anyquant.models import streaming
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.memory import MemoryCheckpoint

DOCUMENTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (40, 7, 40, 1, 65)
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "model", "llama", hidden=64)


def whole_model_moments(folder: Path, documents: list[list[int]]) -> dict[str, Any]:
    """Mean square of each Linear module's input, by module path, from one ordinary forward pass per document."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, arguments: Any) -> None:
            squares = arguments[0].double().square().sum((0, 1))
            sums[name] = sums.get(name, 0) + squares

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for document in documents:
            model(torch.tensor([document]), use_cache=False)
    tokens = sum(map(len, documents))
    return {name: (total / tokens).numpy() for name, total in sums.items()}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_moments_equal_hooks_on_the_whole_model(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_checkpoint(tmp_path / "model", family, hidden=64, tied=tied)
    checkpoint = open_checkpoint(folder)
    architecture = detect(checkpoint)
    statistics = collect(checkpoint, architecture, DOCUMENTS)
    expected = whole_model_moments(folder, DOCUMENTS)
    matrices = [linear for linear in architecture.linears if linear.role is not Role.EMBEDDING]
    for linear in matrices:
        found = statistics.importance(linear)
        assert found is not None and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[linear.module], rtol=1e-5)
    embedding = statistics.importance(architecture.by_name["embedding"])
    assert (embedding is not None) == tied  # a tied one is the head
    if embedding is not None:
        np.testing.assert_allclose(embedding, expected["lm_head"], rtol=1e-5)
    np.testing.assert_allclose(statistics.moments["output_input"].second_moment, expected["lm_head"], rtol=1e-5)
    assert {moment.count for moment in statistics.moments.values()} == {sum(map(len, DOCUMENTS))}


def test_at_most_one_block_has_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    apply = streaming.StreamedModel.apply

    def spy(model: streaming.StreamedModel, index: int, block: Any, *others: Any) -> Any:
        layers = model.module.model.layers
        seen.append([i for i, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())])
        outer = [model.module.model.embed_tokens.weight, model.module.lm_head.weight]
        assert all(weight.is_meta for weight in outer)
        return apply(model, index, block, *others)

    monkeypatch.setattr(streaming.StreamedModel, "apply", spy)
    checkpoint = open_checkpoint(llama)
    collect(checkpoint, detect(checkpoint), DOCUMENTS)
    assert sorted(map(tuple, seen)) == [(0,)] * 4 + [(1,)] * 4  # four lengths, two blocks


def test_the_digest_tells_statistics_apart(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    architecture = detect(checkpoint)
    first, again = (collect(checkpoint, architecture, DOCUMENTS).digest() for _ in range(2))
    assert first == again != collect(checkpoint, architecture, DOCUMENTS[:-1]).digest()


def test_progress_reaches_its_total(llama: Path) -> None:
    class Recorded:
        total = done = 0.0

        def start(self, task: str, total: float, unit: str) -> None:
            self.total = total

        def advance(self, amount: float) -> None:
            self.done += amount

        def place(self, where: str) -> None: ...

        def finish(self) -> None:
            assert self.done == self.total == sum(map(len, DOCUMENTS))

        def say(self, message: str) -> None: ...

    checkpoint = open_checkpoint(llama)
    progress = Recorded()
    collect(checkpoint, detect(checkpoint), DOCUMENTS, progress)
    assert progress.total


@pytest.mark.parametrize("documents", [[], [[]]])
def test_no_tokens_is_a_usage_error(llama: Path, documents: list[list[int]]) -> None:
    checkpoint = open_checkpoint(llama)
    with pytest.raises(UsageError, match="no tokens"):
        collect(checkpoint, detect(checkpoint), documents)


def test_a_token_outside_the_vocabulary_is_named(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    with pytest.raises(UsageError, match="token 999999"):
        collect(checkpoint, detect(checkpoint), [[1, 2, 999999]])


def test_bad_weights_and_configs_are_bad_input(llama: Path) -> None:
    checkpoint = MemoryCheckpoint.of(llama)
    architecture = detect(checkpoint)
    name = "model.layers.1.mlp.up_proj.weight"
    sound = checkpoint.arrays[name]
    checkpoint.arrays[name] = sound * np.inf
    with pytest.raises(BadInputError, match=r"block 1, model\.layers\.1\.mlp\.down_proj"):
        collect(checkpoint, architecture, DOCUMENTS)
    checkpoint.arrays[name] = sound[:-1]
    with pytest.raises(BadInputError, match=f"tensor {name} has shape"):
        collect(checkpoint, architecture, DOCUMENTS)
    del checkpoint.arrays[name]
    with pytest.raises(BadInputError, match=f"tensor {name} is missing"):
        collect(checkpoint, architecture, DOCUMENTS)
    checkpoint.arrays[name] = sound
    checkpoint.config |= {"hidden_act": "no_such_activation"}
    with pytest.raises(BadInputError, match=r"config\.json does not describe a llama model"):
        collect(checkpoint, architecture, DOCUMENTS)
    checkpoint.config |= {"num_hidden_layers": 10**9}
    with pytest.raises(BadInputError, match="num_hidden_layers 1000000000"):
        collect(checkpoint, architecture, DOCUMENTS)
    checkpoint.config |= {"num_hidden_layers": 2, "model_type": "mamba", "hidden_act": "silu"}
    with pytest.raises(UnsupportedError, match=r"'mamba' has no blocks at model\.layers"):
        collect(checkpoint, architecture, DOCUMENTS)


def test_foreign_switches_in_the_config_never_reach_transformers(llama: Path) -> None:
    checkpoint = MemoryCheckpoint.of(llama)
    architecture = detect(checkpoint)
    expected = collect(checkpoint, architecture, DOCUMENTS).digest()
    checkpoint.config |= {
        "auto_map": {"AutoModelForCausalLM": "evil--evil.Evil"},
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "quantization_config": {"quant_method": "awq"},
        "pad_token_id": 10**6,
        "torch_dtype": "float16",
        "dtype": "float16",
    }
    assert collect(checkpoint, architecture, DOCUMENTS).digest() == expected
