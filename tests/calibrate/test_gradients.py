"""Gradients streamed block by block against autograd through whole transformers models in float64."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from anyquant.calibrate import roundtrip
from anyquant.calibrate.gradients import OutputStatistics, collect_output_statistics
from anyquant.core.errors import BadInputError, UsageError
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint

DOCUMENTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (40, 7, 40, 1, 65)
]
ORDERED = sorted(DOCUMENTS, key=len)  # as batches are
TOKENS = sum(map(len, DOCUMENTS))
ANSWERS = torch.from_numpy(np.random.default_rng(5).integers(0, 300, TOKENS))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in full float32 wherever the tests run, and the head in several pieces."""
    monkeypatch.setattr(roundtrip, "fast_products", nullcontext)
    monkeypatch.setattr(StreamedModel, "logit_rows", 30 * 8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "model", "llama", hidden=64)


def opened(folder: Path) -> StreamedModel:
    checkpoint = open_checkpoint(folder)
    return StreamedModel(checkpoint, detect(checkpoint))


def given_answers() -> Any:
    left = list(ANSWERS)

    def draw(logits: Any) -> Any:
        return torch.stack([left.pop(0) for _ in logits])

    return draw


def by_autograd(folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Mean of g g^T at the output of each Linear's module, by its path."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    outputs: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(
                lambda module, given, output, name=name: outputs.setdefault(name, []).append(output)
            )
    likelihood, left = 0.0, ANSWERS
    for document in ORDERED:
        chosen, left = left[: len(document)], left[len(document) :]
        logits = model(torch.tensor([document]), use_cache=False).logits[0]
        likelihood = likelihood + logits.log_softmax(-1)[torch.arange(len(document)), chosen].sum()
    total: dict[str, npt.NDArray[np.float64]] = {}
    for name, several in outputs.items():
        found = torch.autograd.grad(likelihood, several, retain_graph=True)  # type: ignore[arg-type]
        rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in found])
        total[name] = (rows.T @ rows / TOKENS).numpy()
    return total


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2_moe"])
def test_statistics_are_those_of_autograd_through_the_whole_model(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", family, hidden=64, blocks=3)
    expected = by_autograd(tmp_path / "model")
    model = opened(tmp_path / "model")
    found = collect_output_statistics(model, DOCUMENTS, tmp_path / "out", draw=given_answers())
    compared = 0
    for linear in (one for one in model.architecture.linears if one.block is not None):
        values = found.of(linear)
        if linear.expert is not None or linear.role.value == "router":
            assert values is None
            continue
        at = slice(linear.view.start, linear.view.start + linear.view.rows)
        reference = expected[linear.module][at, at]
        assert values is not None and values.dtype == np.float32
        np.testing.assert_allclose(values, reference, rtol=1e-4, atol=2e-5 * np.abs(reference).max())
        compared += 1
    assert compared >= 12


def test_many_outputs_have_diagonal_blocks_only(llama: Path, tmp_path: Path) -> None:
    model = opened(llama)
    whole = collect_output_statistics(model, DOCUMENTS, tmp_path / "whole", draw=given_answers())
    parts = collect_output_statistics(model, DOCUMENTS, tmp_path / "parts", most_outputs=180, draw=given_answers())
    for linear in (one for one in model.architecture.linears if one.block is not None):
        expected, found = whole.of(linear), parts.of(linear)
        assert expected is not None and found is not None
        if linear.shape[0] <= 180:
            np.testing.assert_array_equal(found, expected)
            continue
        assert found.shape == (3, 180, 180)  # of 512
        for index, block in enumerate(found):
            at = slice(180 * index, min(180 * index + 180, 512))
            height = at.stop - at.start
            np.testing.assert_allclose(block[:height, :height], expected[at, at], rtol=1e-4, atol=1e-7)
            assert not block[height:].any() and not block[:, height:].any()


def test_the_same_numbers_each_time_and_from_the_folder(llama: Path, tmp_path: Path) -> None:
    model = opened(llama)
    linear = model.architecture.linears[3]
    assert not OutputStatistics.complete(tmp_path / "one")
    first, second = (collect_output_statistics(model, DOCUMENTS, tmp_path / name) for name in ("one", "two"))
    assert OutputStatistics.complete(tmp_path / "one")
    again = OutputStatistics(tmp_path / "one")
    assert first.digest(linear) == second.digest(linear) == again.digest(linear) != ""
    np.testing.assert_array_equal(first.of(linear), again.of(linear))
    path = tmp_path / "one" / f"output-{linear.name}.f32"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(BadInputError, match="damaged"):
        again.of(linear)
    assert {path.suffix for path in (tmp_path / "two").iterdir()} == {".f32", ".json"}


def test_tokens_are_drawn_from_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(20000, 4)
    drawn = roundtrip.Sampler(1)(logits)
    shares = np.bincount(drawn.numpy(), minlength=4) / 20000
    np.testing.assert_allclose(shares, logits[0].softmax(-1).numpy(), atol=0.01)
    assert shares[2] == 0


def test_no_tokens(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        collect_output_statistics(opened(llama), [[]], tmp_path / "out")
