"""The divergence of variants, all in one pass, against whole transformers models with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from anyquant.calibrate.variants import Variant, divergences, share
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import UsageError
from anyquant.core.linear import Linear, Role
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint

DOCUMENTS = [[int(token) for token in np.random.default_rng(n).integers(0, 300, n)] for n in (20, 7, 20)]


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_divergences_are_those_of_whole_models(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", hidden=64, tied=tied)
    monkeypatch.setattr(StreamedModel, "logit_rows", 8 * 6)
    checkpoint = open_checkpoint(folder)
    model = StreamedModel(checkpoint, detect(checkpoint))

    def changed(linear: Linear) -> Float32:
        weights = read_view(checkpoint, linear.view, 0, linear.shape[0])
        noise = np.random.default_rng(len(linear.name)).standard_normal(weights.shape)
        found: Float32 = (weights + 0.05 * weights.std() * noise).astype(np.float32)
        return found

    apart = [linear for linear in model.architecture.linears if linear.block is None]
    variants = [
        Variant("two", tuple(one for one in model.architecture.linears if one.block == 0)[:2]),
        Variant("late", tuple(one for one in model.architecture.linears if one.block == 1)[-1:]),
        *(Variant(linear.role.value, (linear,)) for linear in apart),
    ]
    found = divergences(model, DOCUMENTS, variants, changed, tmp_path / "scratch")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = [reference(torch.tensor([one])).logits[0].double().log_softmax(-1) for one in DOCUMENTS]
        for variant in variants:
            other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            parameters = dict(other.named_parameters())
            for linear in variant.linears:
                parameters[f"{linear.module}.weight"].copy_(torch.from_numpy(changed(linear)))
            for index, document in enumerate(DOCUMENTS):
                logits = other(torch.tensor([document])).logits[0].double().log_softmax(-1)
                divergence = float((expected[index].exp() * (expected[index] - logits)).sum())
                assert found[variant.name][index] == pytest.approx(divergence, rel=1e-3)
    assert len(found) == (3 if tied else 4)
    assert not list((tmp_path / "scratch").iterdir())


def test_what_a_variant_costs() -> None:
    checkpoint = [Linear("x", role, None, block, "", "") for role, block in ((Role.ATTN_Q, 3), (Role.HEAD, None))]  # type: ignore[arg-type]
    assert share(Variant("x", (checkpoint[0],)), 4) == 0.25
    assert share(Variant("x", (checkpoint[1],)), 4) == 0.0


def test_no_tokens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", "llama", hidden=64))
    with pytest.raises(UsageError, match="no tokens"):
        divergences(
            StreamedModel(checkpoint, detect(checkpoint)), [[]], [], lambda linear: np.zeros(0, np.float32), tmp_path
        )
