"""A target that nothing here runs: written, read back, measured by its decoded weights, and said to be no more."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from anyquant import api
from anyquant.core.errors import UsageError
from anyquant.evaluation.limits import Contract, DropLimit
from anyquant.pipeline import targets
from anyquant.pipeline.backends import Proof, shown
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.report import Report, render_html, render_markdown
from anyquant.pipeline.targets import Target, neutral, target
from anyquant.store.manifest import read_manifest

Models = Callable[[str], Path]
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "small", "grey", "cats", "run", "over", "red", "roofs")
ENGINE = "tensorrt-llm"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 12000)), encoding="utf-8")
    return path


def made(source: Path, text: Path | None, out: Path, goal: str = ENGINE, **wish: object) -> Report:
    calibration = Calibration(data_free=True) if text is None else Calibration(text=str(text), tokens=1024, context=64)
    recipe = Recipe(calibration=calibration, **wish)  # type: ignore[arg-type]
    return api.make(source, out=out, target=goal, recipe=recipe, threads=1)


def test_which_targets_run_here() -> None:
    assert target(ENGINE).schema_only and not target(ENGINE).neutral
    assert neutral().neutral and not neutral().schema_only
    assert not target("vllm").schema_only and not target("vllm").neutral
    assert shown(target(ENGINE), Proof(None, {})).startswith("schema-verified, not run")
    assert shown(target("vllm"), Proof(None, {})) == "read back byte for byte; not run"


def test_it_is_measured_by_its_decoded_weights_and_the_report_says_so(
    model: Models, text: Path, tmp_path: Path
) -> None:
    source = model("llama-bf16")
    report = made(source, text, tmp_path / "int4", preset="W4A16_AWQ")
    finer = made(source, text, tmp_path / "int8", preset="W8A16")
    assert report.mean_kl is not None and finer.mean_kl is not None
    assert 0 < finer.mean_kl < report.mean_kl / 10
    assert report.conversion is None and report.speed == {}
    assert report.proof.startswith("schema-verified, not run")
    assert any("TensorRT-LLM itself was not" in sentence for sentence in report.sentences)
    stored = json.loads((tmp_path / "int4" / "report.json").read_text())
    assert stored["proof"] == report.proof
    for page in (render_markdown(report), render_html(report)):
        assert "schema-verified" in page and "runtime-verified" not in page
    assert report.deployment is not None and report.deployment.command.startswith("trtllm-serve")
    settings = json.loads((tmp_path / "int4" / "hf_quant_config.json").read_text())
    assert settings["quantization"]["quant_algo"] == "W4A16_AWQ"
    assert read_manifest(tmp_path / "int4") is not None


def test_rounded_inputs_count(model: Models, text: Path, tmp_path: Path) -> None:
    """One loss with exact inputs, another where each token is rounded to 8 bits as the engine does it."""
    source, grid = model("llama-bf16"), "fp8_e4m3-channel"
    exact = made(source, text, tmp_path / "exact", grid=grid)
    rounded = made(source, text, tmp_path / "rounded", grid=grid, activations=grid)
    assert exact.mean_kl is not None and rounded.mean_kl is not None
    assert rounded.mean_kl > 1.2 * exact.mean_kl
    assert any("rounds what enters matrices on fp8_e4m3-channel" in sentence for sentence in exact.sentences)
    assert not any("rounds what enters" in sentence for sentence in rounded.sentences)


def test_without_a_measurement_it_is_schema_verified_alike(model: Models, tmp_path: Path) -> None:
    report = made(model("llama-bf16"), None, tmp_path / "out", preset="FP8_PB_WO")
    assert report.loss is None and report.proof.startswith("schema-verified, not run")


def test_a_limit_can_choose_and_a_metric_cannot_be_taken(model: Models, text: Path, tmp_path: Path) -> None:
    limit = Contract(max_kl=100.0)
    recipe = Recipe(calibration=Calibration(text=str(text), tokens=1024, context=64))
    source = model("llama-bf16")
    report = api.make(source, out=tmp_path / "out", target=ENGINE, contract=limit, recipe=recipe, threads=1)
    assert report.mean_kl is not None and report.proof.startswith("schema-verified")
    with pytest.raises(UsageError, match="nothing here runs one for tensorrt-llm"):
        limits = Contract(max_drop=(DropLimit.parse("json:loads:higher=0.1"),))
        api.make(source, out=tmp_path / "other", target=ENGINE, contract=limits, recipe=recipe, threads=1)


@pytest.mark.parametrize("preset", ["FP8_BLOCK", "FP8"])
def test_fp8_is_proved_in_transformers(
    preset: str, model: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = targets.targets()
    other: Target = replace(known["transformers"], name="eight", format="fp8", default_preset=preset, presets=(preset,))
    monkeypatch.setattr(targets, "targets", lambda: {**known, "eight": other})
    report = made(model("llama-bf16"), text, tmp_path / "out", "eight", preset=preset)
    assert report.conversion is not None and report.conversion.mean_kl < 1e-4
    assert report.proof.startswith("runtime-verified: transformers")
    scales = load_file(tmp_path / "out" / "model.safetensors")
    fused = {float(scales[f"model.layers.0.self_attn.{one}_proj.weight_scale_inv"].max()) for one in "qkv"}
    assert (len(fused) == 1) == (preset == "FP8")  # engines multiply the three at once, with one scale
