"""Logits of streamed models against transformers' own forward pass of the whole model."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from anyquant.core.progress import Silent
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint

DOCUMENTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (40, 7, 40, 1, 65)
]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_found_however_they_are_stored(tmp_path: Path, family: str, stacked: bool) -> None:
    folder = make_checkpoint(tmp_path / "model", family, hidden=64, stacked=stacked)
    checkpoint = open_checkpoint(folder)
    streamed = StreamedModel(checkpoint, detect(checkpoint))
    batches = streamed.embed(DOCUMENTS)
    streamed.run_blocks(batches, Silent())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with streamed.head() as head, torch.no_grad():
        for batch in batches:
            for row, index in enumerate(batch.documents):
                expected = model(torch.tensor([DOCUMENTS[index]])).logits[0].numpy()
                np.testing.assert_allclose(head(batch.states[row]), expected, rtol=0, atol=1e-4)
