"""llama.cpp against `transformers` on a tiny Llama whose GGUF is written here by hand: the oracle of the format too."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.runtimes import _llama_binding as binding
from anyquant.runtimes.llamacpp import RUNTIME, LlamaCpp, Options

TEXT = (
    "The quick brown fox jumps over the lazy dog; it's 12345 o'clock, and naïve cafés serve tea 🙂.\n\n  Twice daily! "
)


@dataclass(frozen=True)
class Tiny:
    model: LlamaForCausalLM
    tokenizer: Tokenizer
    folder: Path

    def path(self, kind: str) -> Path:
        return self.folder / f"{kind}.gguf"


def make_model(vocabulary: int, heads: int = 8) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.normal_(0, 0.12)
            elif "lm_head" in name:
                parameter.normal_(0, 0.16)
            else:
                parameter.normal_(0, 0.06)
    return model


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with the GPT-2 pre-tokenizer, a control token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 20, "import sys\nfrom pathlib import Path\n" * 5], trainer)
    return tokenizer


def interleave(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Rotary pairs are (i, i + half) in transformers and (2i, 2i + 1) in ggml: the rows of q and k move accordingly."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, kind: str) -> None:
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([name for name, _ in tokens])
    writer.add_token_types([3 if number < 2 else 1 for _, number in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith("q_proj.weight"):
            values = interleave(values, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = interleave(values, config.num_key_value_heads)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        writer.add_tensor(target, values.astype(np.float16) if kind == "f16" and values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer.get_vocab_size())
    made = Tiny(model, tokenizer, tmp_path_factory.mktemp("gguf"))
    for kind in ("f32", "f16"):
        write_gguf(made.path(kind), model, tokenizer, kind)
    yield made


def opened(tiny: Tiny, kind: str, context: int = 256, cache: str = "f32") -> LlamaCpp:
    return LlamaCpp.open(tiny.path(kind), context, threads=1, options=Options(cache=cache))


def reference(tiny: Tiny, ids: list[int]) -> npt.NDArray[np.float64]:
    with torch.no_grad():
        return tiny.model(torch.tensor([ids])).logits[0].double().numpy()


def divergence(reference: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Mean KL(reference || other) over positions, nats, in float64."""
    first, second = (torch.log_softmax(torch.from_numpy(x.astype(np.float64)), -1) for x in (reference, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_logits_equal_those_of_transformers(tiny: Tiny) -> None:
    """The float32 cache is what allows a limit this small: a float16 cache alone costs more than it."""
    ids = [0, *tiny.tokenizer.encode(TEXT * 3).ids]
    wanted = reference(tiny, ids)
    probabilities = torch.softmax(torch.from_numpy(wanted), -1)
    entropy = float(-(probabilities * probabilities.log()).sum(-1).mean())
    assert entropy < 0.7 * np.log(tiny.tokenizer.get_vocab_size()), "a flat model would hide errors"
    found = {}
    for kind, cache in (("f32", "f32"), ("f32", "f16"), ("f16", "f32")):
        with opened(tiny, kind, cache=cache) as model:
            logits = model.logits(ids)
            assert logits.shape == (len(ids), model.vocabulary) and logits.dtype == np.float32
            found[kind, cache] = divergence(wanted, logits)
    assert found["f32", "f32"] < 1e-8
    assert 1e-8 < found["f32", "f16"] < 1e-3
    assert 1e-8 < found["f16", "f32"] < 1e-3


def test_sequences_are_independent_and_steps_agree_with_whole_prompts(tiny: Tiny) -> None:
    ids = [0, *tiny.tokenizer.encode(TEXT).ids]
    with opened(tiny, "f32") as model:
        model.logits(ids[::-1])
        whole = model.logits(ids)
        model.clear()
        stepped = np.stack([model.decode(ids[:5]), *(model.step(token) for token in ids[5:])])
        with opened(tiny, "f16") as other:
            other.logits(ids)
            np.testing.assert_allclose(model.logits(ids), whole, atol=1e-3)
    np.testing.assert_allclose(stepped, whole[4:], atol=1e-3)


def test_prompts_longer_than_one_batch(tiny: Tiny) -> None:
    ids = [0, *tiny.tokenizer.encode(TEXT * 10).ids]
    assert len(ids) > 512, "longer than one batch"
    with opened(tiny, "f32", context=1024) as model:
        assert model.context == 1024 > model.trained_context == 512
        assert divergence(reference(tiny, ids), model.logits(ids)) < 1e-8
        assert model.memory.cache == 1024 * 2 * 2 * 128 * 4
        with pytest.raises(UsageError, match="1025 tokens do not fit the context of 1024"):
            model.logits([2] * 1025)


def test_tokens_equal_those_of_tokenizers(tiny: Tiny) -> None:
    with opened(tiny, "f32") as model:
        assert model.vocabulary == tiny.tokenizer.get_vocab_size()
        for text in (TEXT, "", " ", "\n\n\n", "don't  STOP 3.14e10", "日本語 🙂 مرحبا"):
            ids = model.tokenize(text)
            assert ids == [0, *tiny.tokenizer.encode(text).ids]
            assert model.detokenize(ids) == text
        plain, special = model.tokenize("a</s>"), model.tokenize("a</s>", add_special=False, parse_special=True)
        assert 1 not in plain and special[1:] == [1]
        assert model.ends(1) and not model.ends(0)


def test_greedy_generation_follows_the_argmax_of_transformers(tiny: Tiny) -> None:
    prompt = "The quick brown"
    ids = [0, *tiny.tokenizer.encode(prompt).ids]
    start = len(ids)
    while len(ids) < start + 12:
        following = int(np.argmax(reference(tiny, ids)[-1]))
        if following == 1:
            break
        ids.append(following)
    with opened(tiny, "f32") as model:
        assert "".join(model.generate(prompt, 12)) == model.detokenize(ids[start:])
        drawn = ["".join(model.generate(prompt, 8, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert list(model.generate(prompt, 0)) == []
        with pytest.raises(UsageError, match="negative"):
            model.generate(prompt, -1)


def test_refusals_are_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    sound, broken = tiny.path("f32").read_bytes(), tmp_path / "broken.gguf"
    cases: list[tuple[bytes, type[Exception], str]] = [
        (b"PK\x03\x04 zip", BadInputError, "not a GGUF file"),
        (sound[:5000], BadInputError, "refuses .*broken.gguf: "),
        (sound[:-1000], BadInputError, "not within the file bounds"),
        (sound.replace(b"llama", b"lluma"), UnsupportedError, "unknown model architecture: 'lluma'"),
        (sound.replace(b"gpt-2", b"gpt-X"), UnsupportedError, "unknown pre-tokenizer type: 'gpt-X'"),
        (sound.replace(b"blk.1.ffn_up", b"blk.1.ffn_uq"), BadInputError, "'blk.1.ffn_up.weight' not found"),
    ]
    for content, kind, message in cases:
        broken.write_bytes(content)
        with pytest.raises(kind, match=message) as caught:
            LlamaCpp.open(broken)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInputError, match=r"cannot read .*absent\.gguf: No such file"):
        LlamaCpp.open(tmp_path / "absent.gguf")
    with pytest.raises(UsageError, match="unknown type of the key-value cache 'fp16'; did you mean"):
        opened(tiny, "f32", cache="fp16")
    with (
        opened(tiny, "f32") as model,
        pytest.raises(UsageError, match="token 300 at position 1 is not in the vocabulary of 300"),
    ):
        model.logits([0, 300])
    with pytest.raises(UsageError, match="closed"):
        model.tokenize("too late")


def test_only_the_pinned_wheel_is_accepted(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert f"xllamacpp=={binding.PIN}" in project["project"]["optional-dependencies"]["llamacpp"]
    assert RUNTIME.check(tiny.path("f32")) == []
    monkeypatch.setattr(binding, "PIN", "2020")
    binding.load.cache_clear()
    with pytest.raises(UnsupportedError, match="needs exactly 2020; run: pip install xllamacpp==2020"):
        binding.load()
    assert len(RUNTIME.check(tiny.path("f32"))) == 1


def test_a_moved_field_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = binding.load()
    assert binding.self_test(library.c) == []
    monkeypatch.setattr(binding, "CONTEXT_CACHE_TYPES", binding.CONTEXT_CACHE_TYPES - 4)
    assert binding.self_test(library.c) == ["default cache types: (0, 1), not (1, 1)"]
