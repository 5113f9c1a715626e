"""--kv-cache: judged together with the weights, kept in the artifact, told to who deploys it."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf

from cli.conftest import Call
from support.checkpoints import make_checkpoint

Model = Callable[[str], Path]
SHORT = ("--context", "64", "--tokens", "512", "--threads", "1", "-q")


def test_the_contract_is_of_weights_and_cache_together(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    """Float32 weights lose nothing; what is lost is the cache's, and the contract fails for it."""
    source = model("llama")
    job = ("make", source, "--for", "llama.cpp", "--grid", "f32", "--embedding", "f32", "--head", "f32")
    job = (*job, "--text", text, *SHORT, "--max-kl", "0.001", "--json")
    plain = call(*job, "-o", tmp_path / "plain")
    assert plain.code == 0, plain.err
    made = call(*job, "--kv-cache", "q8_0,Q4_0", "-o", tmp_path / "out")
    assert made.code == 3, made.err
    report = json.loads(made.out)
    loss, kept = report["loss"]["mean_kl"][0], json.loads(plain.out)
    assert kept["loss"]["mean_kl"][0] < 1e-4 < 0.001 < loss
    # the conversion is that of the weights alone: the cache does not blur the proof
    assert report["conversion"]["mean_kl"] < 1e-6
    assert report["recipe"]["kv_cache"] == "q8_0,q4_0"

    advice = report["deployment"]
    assert advice["command"] == (
        "llama-server -m model.gguf -c 512 --cache-type-k q8_0 --cache-type-v q4_0 --flash-attn on"
    )
    sizes = json.loads((source / "config.json").read_text())
    elements = sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    assert advice["kv_bytes_per_token"] == elements // 32 * (34 + 18)
    assert kept["deployment"]["command"] == "llama-server -m model.gguf -c 512"
    assert (kept["deployment"]["kv_cache"], kept["deployment"]["kv_bytes_per_token"]) == ("f16", elements * 4)
    for page in ("report.md", "report.html"):
        assert "--cache-type-v q4_0" in (tmp_path / "out" / page).read_text()

    # the file knows what it was made for, so measuring it again needs no flag
    field = gguf.GGUFReader(tmp_path / "out" / "model.gguf").get_field("anyquant.kv_cache")
    assert field is not None
    assert field.contents() == "q8_0,q4_0"
    again = ("evaluate", tmp_path / "out", "--against", source, "--threads", "1", "-q", "--json")
    values = {}
    for types in (None, "f32", "q4_0"):
        flags = () if types is None else ("--kv-cache", types)
        found = call(*again, *flags, "--text", text, "--tokens", "2200", "--context", "64")
        assert found.code in (0, 3), found.err
        values[types] = _mean_kl(json.loads(found.out))
    assert values["f32"] < 1e-4 < values[None] < values["q4_0"]
    assert call("run", tmp_path / "out", "the model", "--kv-cache", "q4_0", "--threads", "1", "--tokens", "4").code == 0


def _mean_kl(found: dict[str, dict[str, float]]) -> float:
    return found["mean_kl"]["value"]


def test_what_cannot_be_done_is_refused_before_the_work(call: Call, model: Model, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    make_checkpoint(narrow, "qwen3", config={"head_dim": 80})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('version = 1\ngrid = "q8_0"\nkv_cache = "q5"\n')
    llama = ("--for", "llama.cpp", "--preset", "Q8_0", "--kv-cache")
    for arguments, code, words in (
        ((narrow, *llama, "q8_0"), 6, "takes heads in blocks of 32, the model's have 80"),
        ((narrow, *llama, "f16,q4_1"), 6, "a key-value cache of q4_1 takes heads"),
        ((model("llama"), *llama, "q6_k"), 2, "unknown type of the key-value cache 'q6_k'"),
        ((model("llama"), "--for", "llama.cpp", "--recipe", recipe), 2, "did you mean q5_"),
        ((model("llama"), "--for", "vllm", "--kv-cache", "q8_0"), 6, "can be told to llama.cpp only"),
        ((model("llama"), "--grid", "int8-channel", "--kv-cache", "q8_0"), 6, "can be told to llama.cpp only"),
    ):
        for verb, out in (("plan", ()), ("make", ("-q", "-o", tmp_path / "out"))):
            refused = call(verb, *arguments, *out)
            assert (refused.code, words in refused.err) == (code, True), refused
            assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert call("plan", narrow, *llama, "bf16").code == 0
