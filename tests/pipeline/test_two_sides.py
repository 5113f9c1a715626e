"""GPTQ with two sides in whole runs: the gradients are collected once, and reach the matrices."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from anyquant import api
from anyquant.core.errors import UsageError
from anyquant.pipeline import staged
from anyquant.pipeline.recipe import Calibration, Recipe
from support.checkpoints import make_checkpoint

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "other", "small", "grey", "cats", "run", "over"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 12000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", hidden=64)


def digest_of(folder: Path) -> dict[str, str]:
    """Everything but the report and the manifest, which say how long it took."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("report.", "anyquant-manifest", ".lock", "manifest"))
    }


def recipe(text: Path, algorithm: str = "gptq", sides: int = 2) -> Recipe:
    calibration = Calibration(text=str(text), tokens=512, context=64)
    return Recipe(grid="int4-g32", algorithm=algorithm, calibration=calibration, options={"sides": sides})


def test_a_stopped_run_goes_on_without_collecting_again(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = []
    collect = staged.collect_output_statistics

    def counted(*arguments: object) -> object:
        collected.append(1)
        return collect(*arguments)  # type: ignore[arg-type]

    def stop(stages: staged.Stages) -> None:
        stages.work.close()  # as the end of a process does
        raise KeyboardInterrupt

    monkeypatch.setattr(staged, "collect_output_statistics", counted)
    for name, sides in (("whole", 2), ("one", 1)):
        api.make(llama, out=tmp_path / name, recipe=recipe(text, sides=sides), threads=1)
    assert len(collected) == 1
    with monkeypatch.context() as patch:
        patch.setattr(staged.Stages, "_edges", stop)
        with pytest.raises(KeyboardInterrupt):
            api.make(llama, out=tmp_path / "out", recipe=recipe(text), threads=1)
    assert list(tmp_path.glob(".out.work/*/outputs/outputs.json")) and len(collected) == 2
    api.make(llama, out=tmp_path / "out", recipe=recipe(text), threads=1)
    assert len(collected) == 2
    assert digest_of(tmp_path / "out") == digest_of(tmp_path / "whole") != digest_of(tmp_path / "one")


def test_transforms_found_on_the_way_do_not_fit(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two sides"):
        api.make(llama, out=tmp_path / "out", recipe=recipe(text, "awq -> gptq"), threads=1)


def test_experts_have_one_side_and_the_report_says_so(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3_moe", hidden=64, blocks=1)
    report = api.make(folder, out=tmp_path / "out", recipe=recipe(text), threads=1)
    assert any("12 matrices with one side" in note and "experts" in note for note in report.notes)
