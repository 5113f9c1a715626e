"""The first half of a QLoRA: a quantized base and an adapter become an artifact of the merged model."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from anyquant import api
from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import OutputError, UsageError
from anyquant.evaluation.limits import Contract, DropLimit
from anyquant.formats import as_model
from anyquant.pipeline.work import source_identity
from anyquant.store.open import open_checkpoint
from anyquant.transforms.merge import Merged
from support.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An NF4 base, and an adapter on it."""
    folder = tmp_path_factory.mktemp("chain")
    source, base = make_checkpoint(folder / "in", "llama", dtype="BF16"), folder / "base"
    report = api.make(source, target="bitsandbytes", preset="NF4", out=base, data_free=True)
    assert report.target == "bitsandbytes"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def test_what_is_made_are_the_merged_weights(chain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = chain
    report = api.make(base, adapter=adapter, target="transformers", grid="f32", out=tmp_path / "out", data_free=True)
    assert report.model == f"{base} + {adapter}"
    made, decoded = open_checkpoint(tmp_path / "out"), as_model(open_checkpoint(base))
    merged = Merged(decoded, adapter)
    assert len(merged.merged) == 4
    for name in merged.names():
        np.testing.assert_array_equal(read_tensor(made, name), read_tensor(merged, name))
        assert (name in merged.merged) != np.array_equal(read_tensor(made, name), read_tensor(decoded, name))
    planned = api.plan(base, adapter=adapter, target="transformers", preset="W4A16", data_free=True)
    assert isinstance(planned.job.source, Merged)


def test_another_adapter_is_another_run(chain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = chain
    decoded = as_model(open_checkpoint(base))
    assert source_identity(Merged(decoded, adapter)) != source_identity(decoded)
    with pytest.raises(OutputError, match="lies inside"):
        api.make(base, adapter=adapter, target="transformers", grid="f32", out=adapter / "out", data_free=True)
    limits = Contract(max_drop=(DropLimit("metric.py:score:higher", 0.01),))
    with pytest.raises(UsageError, match="--adapter"):
        api.make(base, adapter=adapter, target="transformers", out=tmp_path / "out", contract=limits)
