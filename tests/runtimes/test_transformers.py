"""Streamed logits against transformers' own forward pass of the whole model, and checkpoints of decoded weights."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from anyquant.core.checkpoint import read_rows, read_tensor, read_view
from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.linear import Linear, Role, View
from anyquant.models import streaming
from anyquant.models.architecture import Architecture, Dimensions
from anyquant.models.detect import detect
from anyquant.runtimes.transformers import DecodedCheckpoint, TransformersRuntime
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.memory import MemoryCheckpoint

Matrix = npt.NDArray[np.float32]
DOCUMENTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (40, 7, 40, 1, 65)
]
VARIANTS = {
    "llama": {},
    "llama-scaled": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 3000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
}


def whole(folder: Path, documents: list[list[int]]) -> list[Matrix]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return [model(torch.tensor([document])).logits[0].numpy() for document in documents]


def divergence(reference: Matrix, other: Matrix) -> float:
    """Mean KL(reference || other) over positions, in float64."""
    p, q = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_whole_model(
    tmp_path: Path, variant: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", variant.split("-")[0], hidden=64, tied=tied, config=VARIANTS[variant])
    monkeypatch.setattr(streaming, "LOGIT_ELEMENTS", 30 * 512)  # longer documents come in several pieces
    checkpoint = open_checkpoint(folder)
    streamed = list(TransformersRuntime(checkpoint, detect(checkpoint)).logits(DOCUMENTS))
    for document, found, expected in zip(DOCUMENTS, streamed, whole(folder, DOCUMENTS), strict=True):
        assert found.dtype == np.float32 and found.shape[0] == len(document)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert divergence(expected, found) < 1e-8


def test_each_block_is_called_as_the_model_calls_it(tmp_path: Path) -> None:
    """A window in the second block only: the two blocks get different masks."""
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    folder = make_checkpoint(tmp_path / "model", "qwen2", hidden=64, config=window)
    checkpoint = MemoryCheckpoint.of(folder)
    config = dict(checkpoint.config)
    checkpoint.config |= {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
    architecture = detect(checkpoint)  # which does not take such a model yet
    expected = whole(folder, DOCUMENTS)
    mixed, full = (list(TransformersRuntime(checkpoint, architecture, c).logits(DOCUMENTS)) for c in (config, None))
    assert max(np.abs(a - b).max() for a, b in zip(mixed, expected, strict=True)) < 1e-4
    assert max(np.abs(a - b).max() for a, b in zip(full, expected, strict=True)) > 1e-2


def test_a_config_of_older_spelling_means_the_same(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", hidden=64)
    checkpoint = MemoryCheckpoint.of(folder)
    architecture = detect(checkpoint)
    new = next(TransformersRuntime(checkpoint, architecture).logits(DOCUMENTS))
    theta = checkpoint.config.pop("rope_parameters")["rope_theta"]
    old = {**checkpoint.config, "rope_theta": theta, "rope_scaling": None}
    np.testing.assert_array_equal(new, next(TransformersRuntime(checkpoint, architecture, old).logits(DOCUMENTS)))


def test_a_checkpoint_without_config_asks_for_one(tmp_path: Path) -> None:
    checkpoint = MemoryCheckpoint.of(make_checkpoint(tmp_path / "model", "llama", hidden=64))
    architecture = detect(checkpoint)
    checkpoint.config = {}
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        TransformersRuntime(checkpoint, architecture)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_decoded_weights_take_the_place_of_the_source(tmp_path: Path, family: str) -> None:
    """Oracle: the same change made in the whole transformers model, written out and loaded again."""
    folder = make_checkpoint(tmp_path / "model", family, hidden=64, tied=family == "llama")
    checkpoint = open_checkpoint(folder)
    architecture = detect(checkpoint)

    def coarse(name: str) -> Matrix:
        linear = architecture.by_name[name]
        # each Linear has its own change, so that a row taken from a neighbour shows
        step = np.float32(0.01 + 0.002 * (sum(map(ord, name)) % 7))
        matrix: Matrix = np.round(read_view(checkpoint, linear.view, 0, linear.shape[0]) / step) * step
        return matrix

    decoded = DecodedCheckpoint(checkpoint, architecture, coarse)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = dict(model.named_parameters())
    for linear in architecture.linears:
        target = state[linear.view.tensor].data
        target[linear.view.start : linear.view.start + linear.view.rows] = torch.from_numpy(coarse(linear.name))
    model.save_pretrained(tmp_path / "changed")
    found = list(TransformersRuntime(decoded, architecture).logits(DOCUMENTS))
    for one, other, source in zip(found, whole(tmp_path / "changed", DOCUMENTS), whole(folder, DOCUMENTS), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
        assert np.abs(one - source).max() > 1e-3


def mixed(linears: list[Linear]) -> Architecture:
    return Architecture("x", "x", Dimensions(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0), tuple(linears), (), False, "")


def test_decoded_rows_of_mixed_and_transposed_tensors() -> None:
    stored = np.arange(24, dtype=np.float32).reshape(8, 3)
    base = MemoryCheckpoint({"plain": stored, "experts": -stored.reshape(2, 4, 3)})
    linears = [
        Linear("middle", Role.ATTN_Q, View("plain", 2, 3, 3), 0, "g", "m"),
        *(
            Linear(f"e{i}", Role.FFN_UP, View("experts", 4 * i, 3, 4, transposed=True), 0, "g", "m", expert=i)
            for i in range(2)
        ),
    ]
    matrices = {linear.name: np.full(linear.shape, 100.0 + i, np.float32) for i, linear in enumerate(linears)}
    matrices["e1"] = np.arange(12, dtype=np.float32).reshape(3, 4)
    decoded = DecodedCheckpoint(base, mixed(linears), matrices.__getitem__)

    expected = stored.copy()
    expected[2:5] = 100
    np.testing.assert_array_equal(read_tensor(decoded, "plain"), expected)
    np.testing.assert_array_equal(read_rows(decoded, "plain", 4, 7), expected[4:7])
    np.testing.assert_array_equal(read_view(decoded, linears[2].view, 0, 3), matrices["e1"])
    assert read_tensor(decoded, "experts").shape == (2, 4, 3)
    assert (read_rows(decoded, "experts", 0, 4) == 101).all()

    matrices["middle"] = np.zeros((3, 4), np.float32)
    fresh = DecodedCheckpoint(base, mixed(linears), matrices.__getitem__)
    with pytest.raises(BadInputError, match=r"middle decodes to shape \(3, 4\)"):
        read_tensor(fresh, "plain")
