"""Inner products streamed block by block against autograd through whole transformers models in float64."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from anyquant.calibrate import inner_products as module
from anyquant.calibrate import roundtrip
from anyquant.calibrate.inner_products import inner_products
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UsageError
from anyquant.core.linear import Linear, Role
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.store.open import open_checkpoint
from support.checkpoints import FAMILIES, make_checkpoint
from support.structural import make

DOCUMENTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (30, 7, 30, 1, 45)
]
DRAWS, CANDIDATES, PIECE = 2, 3, 20
ORDERED = sorted(range(len(DOCUMENTS)), key=lambda index: len(DOCUMENTS[index]))  # as batches are
ANSWERS = {
    index: torch.from_numpy(np.random.default_rng(index).integers(0, 300, (DRAWS, len(document))))
    for index, document in enumerate(DOCUMENTS)
}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in full float32 wherever the tests run; head and embedding in several pieces."""
    monkeypatch.setattr(roundtrip, "fast_products", nullcontext)
    monkeypatch.setattr(module, "fast_products", nullcontext)
    monkeypatch.setattr(StreamedModel, "logit_rows", 8 * PIECE)


def opened(folder: Path, batch_tokens: int = 1) -> StreamedModel:
    checkpoint = open_checkpoint(folder)
    return StreamedModel(checkpoint, detect(checkpoint), batch_tokens=batch_tokens)


def given_answers() -> Any:
    """The answers of one document after the other, in the pieces that the head works on."""
    pieces = [
        ANSWERS[index][draw, start : start + PIECE]
        for index in ORDERED
        for start in range(0, len(DOCUMENTS[index]), PIECE)
        for draw in range(DRAWS)
    ]
    left: Iterator[Any] = iter(pieces)
    return lambda logits: next(left)


def errors_of(model: StreamedModel) -> Any:
    def errors(linear: Linear, first: int, rows: int) -> Float32:
        weights = read_view(model.checkpoint, linear.view, 0, linear.shape[0])
        noise = np.random.default_rng(len(linear.name)).standard_normal((CANDIDATES, *linear.shape))
        found: Float32 = (noise * weights.std()).astype(np.float32)[:, first : first + rows]
        return found

    return errors


def wanted(model: StreamedModel) -> dict[str, int]:
    return {one.name: CANDIDATES for one in model.architecture.linears if one.role is not Role.ROUTER}


def by_autograd(folder: Path, model: StreamedModel) -> dict[str, Any]:
    """<gradient of a document, error> of every Linear: by name, (candidates, draws, documents), in float64."""
    float_model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    parameters = dict(float_model.named_parameters())
    errors, found = errors_of(model), {name: np.zeros((CANDIDATES, DRAWS, len(DOCUMENTS))) for name in wanted(model)}
    for index, document in enumerate(DOCUMENTS):
        for draw in range(DRAWS):
            float_model.zero_grad()
            logits = float_model(torch.tensor([document]), use_cache=False).logits[0]
            logits.log_softmax(-1)[torch.arange(len(document)), ANSWERS[index][draw]].sum().backward()
            for name in found:
                linear = model.architecture.by_name[name]
                place = model.places.get(name)
                parameter = parameters[f"{linear.module}.weight" if place is None else place.parameter]
                if parameter.grad is None:
                    continue
                gradient = parameter.grad if place is None else place.of(parameter.grad)
                products = errors(linear, 0, linear.shape[0]).astype(np.float64) * gradient.numpy()
                found[name][:, draw, index] = products.sum(axis=(1, 2))
    return found


@pytest.mark.parametrize("family", ["llama", "tied", "phi3", "qwen3_moe", "gpt2", "gemma2"])
def test_products_are_those_of_autograd_through_the_whole_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family in FAMILIES or family == "tied":
        more = {"tied": True} if family == "tied" else {}
        make_checkpoint(tmp_path / "model", "llama" if family == "tied" else family, hidden=64, blocks=2, **more)
    else:
        make(tmp_path / "model", family)
    monkeypatch.setattr(module, "ROOM", 1 << 40)
    model = opened(tmp_path / "model")
    expected = by_autograd(tmp_path / "model", model)
    found = inner_products(model, DOCUMENTS, wanted(model), errors_of(model), tmp_path, DRAWS, draw=given_answers())
    assert found.lengths == tuple(map(len, DOCUMENTS))
    assert found.values.keys() == expected.keys()
    for name, values in found.values.items():
        assert np.abs(expected[name]).max() > 0 or name in found.unseen
        np.testing.assert_allclose(
            values, expected[name], rtol=1e-5, atol=1e-5 * np.abs(expected[name]).max(), err_msg=name
        )


def test_seeded_in_pieces_and_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(make_checkpoint(tmp_path / "model", "llama", hidden=64), batch_tokens=64)
    first = inner_products(model, DOCUMENTS, wanted(model), errors_of(model), tmp_path / "a", DRAWS, seed=3)
    monkeypatch.setattr(module, "ROOM", 50_000)
    second = inner_products(model, DOCUMENTS, wanted(model), errors_of(model), tmp_path / "b", DRAWS, seed=3)
    other = inner_products(model, DOCUMENTS, wanted(model), errors_of(model), tmp_path / "c", DRAWS, seed=4)
    assert first.forwards == pytest.approx(2 + 2 * DRAWS) and second.forwards > first.forwards
    for name, values in first.values.items():
        np.testing.assert_allclose(values, second.values[name], atol=1e-2 * np.abs(values).max())
        assert np.abs(values - other.values[name]).max() > 0.1 * np.abs(values).max()


def test_refusals(tmp_path: Path) -> None:
    model = opened(make_checkpoint(tmp_path / "model", "llama", hidden=64), batch_tokens=64)
    with pytest.raises(UsageError, match="no tokens"):
        inner_products(model, [[]], wanted(model), errors_of(model), tmp_path)
    with pytest.raises(BadInputError, match="not finite"):
        inner_products(
            model, DOCUMENTS, wanted(model), lambda *a: np.float32(np.inf) * errors_of(model)(*a), tmp_path, 1
        )
    experts = opened(make_checkpoint(tmp_path / "experts", "qwen3_moe", hidden=64), batch_tokens=64)
    with pytest.raises(AnyQuantError, match="one by one"):
        inner_products(experts, DOCUMENTS, wanted(experts), errors_of(experts), tmp_path)
