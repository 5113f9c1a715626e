"""Types of the key-value cache: their bytes are llama.cpp's own, and what is measured goes through them."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.pipeline.artifacts import cache_of
from anyquant.runtimes.huggingface import RUNTIME as TRANSFORMERS
from anyquant.runtimes.kv_cache import CACHE_TYPES, CacheTypes
from anyquant.runtimes.llamacpp import RUNTIME
from runtimes.test_llamacpp import TEXT, Tiny, divergence, make_model, make_tokenizer, write_gguf

BLOCKS, WIDTH, HEAD = 2, 128, 32  # of the model that test_llamacpp makes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    made = Tiny(make_model(tokenizer.get_vocab_size()), tokenizer, tmp_path_factory.mktemp("gguf"))
    write_gguf(made.path("f16"), made.model, tokenizer, "f16")
    yield made


def test_logits_go_through_the_cache(tiny: Tiny) -> None:
    """The same float16 weights: only the cache differs, and fewer bits of it lose more. Keys and values apart."""
    ids = [0, *tiny.tokenizer.encode(TEXT * 3).ids]
    found = {}
    for types in (*CACHE_TYPES, "q4_0,f16", "f16,q4_0"):
        with RUNTIME.load(tiny.path("f16"), 4096, 1, types) as session:
            found[types] = session.logits(ids)
            kept = BLOCKS * CacheTypes.parse(types).nbytes(WIDTH) * session.context
            # llama.cpp reports hundredths of a MiB
            assert abs(session.memory.cache - kept) <= (1 << 20) / 100, types
    loss = {types: divergence(found["f32"], logits) for types, logits in found.items()}
    assert loss["f32"] == 0
    assert 0 < loss["f16"] < loss["bf16"] < loss["q8_0"] < loss["q5_0"] < loss["q4_0"]
    assert loss["q8_0"] > 1e-4
    assert loss["q5_1"] > loss["q8_0"]
    assert loss["q4_1"] > loss["q5_1"]
    for one in ("q4_0,f16", "f16,q4_0"):
        assert 0.01 < loss[one] < loss["q4_0"]


def test_steps_read_back_what_was_written(tiny: Tiny) -> None:
    """Token by token, as a server generates: the same distributions as of a whole prompt, through the same cache."""
    ids = [0, *tiny.tokenizer.encode(TEXT).ids]
    with RUNTIME.load(tiny.path("f16"), 256, 1, "q8_0,q4_0") as session:
        whole = session.logits(ids)
        session.clear()
        stepped = np.stack([session.step(token) for token in ids])
    with RUNTIME.load(tiny.path("f16"), 256, 1) as session:
        exact = session.logits(ids)
    assert divergence(whole, stepped) < 0.01 * divergence(exact, whole)


def test_names_and_bytes() -> None:
    assert CacheTypes.parse(" Q8_0 , q4_0") == CacheTypes("q8_0", "q4_0")
    assert [str(CacheTypes.parse(text)) for text in ("q8_0", "q8_0,q8_0", "f16,q4_1")] == ["q8_0", "q8_0", "f16,q4_1"]
    for name in CACHE_TYPES:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert CacheTypes(name, name).nbytes(1024) == 2 * 1024 // block * size
    # llama.cpp computes with flash attention exactly where it must
    assert [CacheTypes.parse(text).flash_attention for text in ("q8_0,f16", "f16,q8_0", "f32")] == [False, True, False]
    for text, message in (("q8", "did you mean q8_0"), ("", "unknown type"), ("f16,f16,f16", "one for keys")):
        with pytest.raises(UsageError, match=message) as caught:
            CacheTypes.parse(text)
        assert "\n" not in str(caught.value)


def test_heads_must_fill_blocks(tmp_path: Path) -> None:
    """What we refuse beforehand, llama.cpp refuses itself or computes wrongly."""
    assert CacheTypes.parse("q8_0,q4_0").refuses(HEAD) == []
    assert CacheTypes.parse("f16").refuses(80) == CacheTypes.parse("f32,bf16").refuses(80) == []
    reasons = CacheTypes.parse("q8_0,f16").refuses(80)
    assert len(reasons) == 1
    assert "blocks of 32, the model's have 80" in reasons[0]
    tokenizer = make_tokenizer()
    narrow = Tiny(make_model(tokenizer.get_vocab_size(), heads=16), tokenizer, tmp_path)
    write_gguf(narrow.path("f32"), narrow.model, tokenizer, "f32")
    ids = [0, *tokenizer.encode(TEXT).ids]
    found = {}
    for types in ("f32", "q8_0,f16"):
        with RUNTIME.load(narrow.path("f32"), 256, 1, types) as session:
            found[types] = session.logits(ids)
    assert divergence(found["f32"], found["q8_0,f16"]) > 1, "without flash attention llama.cpp takes it, and is wrong"
    for types in ("f16,q8_0", "q8_0"):
        with pytest.raises(UnsupportedError, match="block size 32 does not divide"):
            RUNTIME.load(narrow.path("f32"), 256, 1, types)
    for types in ("q8_0,f16", "f16,q8_0", "q8_0"):
        with pytest.raises(UnsupportedError, match="blocks of 32, the model's have 16") as caught:
            cache_of(narrow.path("f32"), types)
        assert "\n" not in str(caught.value)
    assert cache_of(narrow.path("f32"), None) == "f16"


def test_transformers_cannot_be_told(tmp_path: Path) -> None:
    assert TRANSFORMERS.default_cache is None
    with pytest.raises(UnsupportedError, match=r"only llama\.cpp can be told"):
        TRANSFORMERS.load(tmp_path, cache="q8_0")
