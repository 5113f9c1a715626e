"""One make for several targets: one calibration, one text, each artifact in its own runtime, one report for all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import anyquant as aq
from anyquant.calibrate import stream
from anyquant.store.manifest import verify_manifest
from cli.conftest import Call

Model = Callable[[str], Path]
FAMILY = "llama"
SHORT = ("--context", "64", "--tokens", "2048", "--threads", "1", "-q")


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_three_targets_within_one_limit(
    call: Call, model: Model, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = []
    real = stream.collect
    monkeypatch.setattr("anyquant.pipeline.statistics.collect", lambda *given: collected.append(1) or real(*given))
    out, source = tmp_path / "out", model(FAMILY)
    limits = ("--max-kl", "0.5", "--algorithm", "rtn", "--text", text)
    made = call("make", source, "--for", "vllm,mlx,llama.cpp", *limits, *SHORT, "-o", out)
    assert made.code == 0, made.err
    assert len(collected) == 1
    together = load(out / "report.json")
    assert together["status"] == "pass"
    assert list(together["targets"]) == ["vllm", "mlx", "llama.cpp"]
    texts = set()
    for name, facts in together["targets"].items():
        own = load(out / facts["report"])
        assert (facts["status"], facts["nbytes"]) == (own["status"], own["nbytes"])
        assert facts["mean_kl"] == own["loss"]["mean_kl"] and own["target"] == name
        texts.add(own["data"]["certify"]["sha256"])
        again = call("evaluate", out / facts["artifact"], "--against", source, "-q")
        assert again.code == 0, again.err
        assert "reproduced: " in again.out
        verify_manifest(out / name)
    assert len(texts) == 1
    page = (out / "report.html").read_text()
    assert "vllm/report.html" in page and "<svg" in page and "style.css" not in page
    assert f"{together['targets']['mlx']['nbytes']:,}" in page and "pass" in page
    assert (out / "report.md").read_text().count("\n| ") == 1 + 3
    for name in ("vllm", "mlx", "llama.cpp"):
        assert name in made.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    unnamed = call("evaluate", out, "--against", source, "-q")
    assert unnamed.code == 5 and str(out / "vllm") in unnamed.err
    replaced = call("make", source, "--for", "vllm,mlx", "--data-free", "-q", "-o", out, "--force")
    assert replaced.code == 0, replaced.err
    assert not (out / "llama.cpp").exists()
    assert load(out / "report.json")["status"] == "unmeasured"


def test_targets_of_one_format_get_one_plan(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    """Error feedback is not repeated either: the finished blocks of the first are those of the second."""
    out, source = tmp_path / "out", model(FAMILY)
    job = ("--for", "transformers,vllm", "--max-size", "16bpw", "--text", text)
    made = call("make", source, *job, "--context", "64", "--tokens", "2048", "--threads", "1", "-o", out)
    assert made.code == 0, made.err
    one, other = (load(out / name / "report.json") for name in ("transformers", "vllm"))
    assert one["recipe"] == other["recipe"]
    assert one["hashes"]["model.safetensors"] == other["hashes"]["model.safetensors"]
    assert "same tensors as transformers" in load(out / "report.json")["sentences"][0]
    assert "found for transformers" in other["sentences"][0]
    assert made.err.count("sensitivity pass") == 1


def test_the_worst_verdict_is_the_verdict(call: Call, model: Model, tmp_path: Path) -> None:
    out, source, grid = tmp_path / "out", model(FAMILY), ("--grid", "int4-g32-f16", "--data-free")
    sizes = {
        name: json.loads(call("plan", source, "--for", name, *grid, "--json").out)["bytes"] for name in ("awq", "gptq")
    }
    assert sizes["awq"] < sizes["gptq"]  # whose g_idx takes room
    made = call("make", source, "--for", "awq,gptq", *grid, "--max-size", f"{sizes['awq']}B", "-q", "-o", out)
    assert made.code == 3, made.err
    together = load(out / "report.json")
    assert together["status"] == "fail"
    assert {name: facts["status"] for name, facts in together["targets"].items()} == {"awq": "pass", "gptq": "fail"}


def test_python_takes_a_list(model: Model, tmp_path: Path) -> None:
    found = aq.make(model(FAMILY), target=["gptq", "awq"], grid="int4-g32-f16", data_free=True, out=tmp_path / "out")
    assert list(found.reports) == ["gptq", "awq"] and found.status == "unmeasured"
    assert (tmp_path / "out" / "awq" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "said", "code"),
    [
        (("--for", "vllm,"), "a name is empty", 2),
        (("--for", "vllm,vllm"), "names vllm twice", 2),
        (("--for", "vllm,lamma.cpp"), "did you mean llama.cpp", 2),
        (("--for", "vllm,mlx", "--grid", "q4_k"), "no place for grid", 6),
        (("--for", "llama.cpp,vllm", "--grid", "q4_k"), "compressed-tensors has no place for grid", 6),
        (("--for", "llama.cpp,vllm", "--preset", "Q4_K_M"), "Q4_K_M", 2),
        (("--for", "vllm,mlx", "--max-kl", "0.1", "--sensitivity", "x.json"), "file of one target", 2),
        (("--for", "llama.cpp,awq", "--max-drop", "m.py:f:higher=0.1"), "nothing here runs one for awq", 2),
    ],
)
def test_refused_before_anything_is_done(
    call: Call, model: Model, tmp_path: Path, flags: tuple[str, ...], said: str, code: int
) -> None:
    (tmp_path / "m.py").write_text("def f(session, split):\n    return [1.0] * 40\n")
    made = call("make", model(FAMILY), *flags, "-q", "-o", tmp_path / "out")
    assert (made.code, made.out) == (code, "")
    assert said in made.err
    assert not (tmp_path / "out").exists()
