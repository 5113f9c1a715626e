"""The main job on the built-in model, as `make demo` runs it."""

from pathlib import Path

import pytest

import anyquant as aq


@pytest.mark.slow
def test_the_demo_keeps_its_contract_and_evaluate_reproduces_it(tmp_path: Path) -> None:
    report = aq.make("demo", target="llama.cpp", quality="balanced", out=tmp_path / "out")
    assert report.status == "pass"
    assert report.loss is not None and report.loss.documents >= 30
    assert report.nbytes == (tmp_path / "out" / "model.gguf").stat().st_size < 0.4 * report.source_bytes
    # the twin shows the conversion, the artifact what 8-bit activations add
    assert report.conversion is not None and report.conversion.mean_kl < 1e-8
    assert report.conversion.arithmetic is not None and 1e-5 < report.conversion.arithmetic < 5e-3
    # visibly trained: far below the vocabulary of 2048
    assert report.loss.reference_perplexity < 60
    # the search beats llama.cpp's own mixtures: the smallest that kept this limit was Q4_K_S
    stock = aq.plan("demo", target="llama.cpp", preset="Q4_K_S").job.layout.nbytes
    assert report.nbytes < 0.9 * stock
    assert 2 < sum(not point.chosen for point in report.points) <= 12
    again = aq.evaluate(tmp_path / "out", against="demo")
    assert again.mean_kl.value == pytest.approx(report.loss.mean_kl[0], rel=1e-3)
    text = "".join(aq.run(tmp_path / "out", "The function returns", tokens=8))
    assert text.strip()
