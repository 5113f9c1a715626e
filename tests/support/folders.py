"""Model folders run by transformers, and folders changed by hand: what tests of folder formats share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import load_file, save_file

from anyquant.core.checkpoint import Checkpoint, read_tensor
from anyquant.core.linear import Role
from anyquant.core.plan import EMPTY
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint

APART = (Role.EMBEDDING, Role.HEAD)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def logits(folder: Path, dtype: torch.dtype, state: Mapping[str, Any] | None = None) -> npt.NDArray[np.float32]:
    """Next-token logits on fixed tokens; `state` replaces the weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if state is not None:
        model.load_state_dict({name: torch.from_numpy(value).to(dtype) for name, value in state.items()}, strict=False)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 600, (1, 96)))
    with torch.inference_mode():
        return np.asarray(model(tokens).logits[0].float().numpy())


def chosen(architecture: Architecture, grid: str, apart: str, changes: Mapping[str, str] = EMPTY) -> dict[str, str]:
    """`grid` for every Linear of the blocks, `apart` for embedding and head, but for `changes`."""
    return {linear.name: apart if linear.role in APART else grid for linear in architecture.linears} | dict(changes)


def open_model(folder: Path) -> tuple[Checkpoint, Architecture]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, detect(checkpoint)


def decoded(checkpoint: Checkpoint) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor, float32."""
    return {name: read_tensor(checkpoint, name) for name in checkpoint.names()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None = None) -> None:
    """Put these tensors, and these entries of quantization_config, into a folder."""
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("quantization_config", {}).update(settings or {})
    (folder / "config.json").write_text(json.dumps(config))
