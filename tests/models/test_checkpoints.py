"""The small checkpoints are fit for their purpose: peaked, and every norm, bias and rotary setting matters."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from support.checkpoints import FAMILIES, PROBE_TEXTS, make_checkpoint, measure_peakedness


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("checkpoints")
    return {
        f"{family}{'-tied' if tied else ''}": make_checkpoint(base / f"{family}-{tied}", family, tied=tied)
        for family in FAMILIES
        for tied in (False, True)
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_outputs_are_peaked(folders: dict[str, Path], family: str, tied: bool) -> None:
    scores, entropy = measure_peakedness(folders[f"{family}{'-tied' if tied else ''}"])
    assert scores >= 2
    assert entropy < 0.7


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_every_norm_bias_and_the_rotary_base_matter(folders: dict[str, Path], family: str) -> None:
    """Dropping any of them, in `transformers` itself, moves the mean next-token KL above 1e-2."""
    folder = folders[family]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" ".join(PROBE_TEXTS)).ids[:128]])

    def log_p(network: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = network(tokens).logits.log_softmax(-1)
        return found

    reference = log_p(model)

    def divergence(network: torch.nn.Module) -> float:
        return float((reference.exp() * (reference - log_p(network))).sum(-1).mean())

    vectors = [name for name, value in model.named_parameters() if value.ndim == 1]
    assert len(vectors) >= 5
    for name in vectors:
        parameter = model.get_parameter(name)
        kept = parameter.data.clone()
        parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        assert divergence(model) > 1e-2, name
        parameter.data.copy_(kept)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rope_parameters["rope_theta"] = 10000.0
    assert divergence(transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)) > 1e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_tokenizers_load_as_they_were_trained(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    trained = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [loaded(text)["input_ids"] for text in PROBE_TEXTS] == [trained.encode(text).ids for text in PROBE_TEXTS]
    assert bool(loaded("")["input_ids"]) == (family in ("llama", "mistral"))
    assert len(loaded) <= json.loads((folder / "config.json").read_text())["vocab_size"]
    plain = [loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) for text in PROBE_TEXTS]
    assert plain == list(PROBE_TEXTS)
