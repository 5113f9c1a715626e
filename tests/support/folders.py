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
from anyquant.formats import FORMATS
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.store.open import open_checkpoint
from support.quantized import as_quantized
from support.write import write

APART = (Role.EMBEDDING, Role.HEAD)
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def logits(folder: Path, dtype: torch.dtype, state: Mapping[str, Any] | None = None) -> npt.NDArray[np.float32]:
    """Next-token logits on fixed tokens; `state` replaces the weights."""
    return logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), state)


def logits_of(model: Any, state: Mapping[str, Any] | None = None) -> npt.NDArray[np.float32]:
    """As `logits`, of a model that is loaded."""
    if state is not None:
        tensors = {name: torch.from_numpy(value).to(model.dtype) for name, value in state.items()}
        model.load_state_dict(tensors, strict=False)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 600, (1, 96)))
    with torch.inference_mode():
        return np.asarray(model(tokens).logits[0].float().numpy())


def chosen(architecture: Architecture, grid: str, apart: str, changes: Mapping[str, str] = EMPTY) -> dict[str, str]:
    """`grid` for every Linear of the blocks, `apart` for embedding and head, but for `changes`."""
    return {linear.name: apart if linear.role in APART else grid for linear in architecture.linears} | dict(changes)


def open_model(folder: Path) -> tuple[Checkpoint, Architecture]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, detect(checkpoint)


def written_and_read(
    target: str, source: Path, out: Path, grid: str, apart: str, changes: Mapping[str, str] = EMPTY
) -> tuple[Architecture, Checkpoint]:
    """Write a folder of a format, on grids as `chosen` has them, and read it: it has the bytes that were planned, the
    tensors of the source, and of each Linear the values that its grid gives."""
    form = FORMATS.get(target)
    checkpoint, architecture = open_model(source)
    grids = chosen(architecture, grid, apart, changes)
    planned = write(checkpoint, architecture, out, grids, target)
    assert sum(path.stat().st_size for path in out.iterdir()) == planned.nbytes
    found = form.open(out, architecture)
    assert set(found.names()) == set(checkpoint.names())
    for linear in architecture.linears:
        expected = as_quantized(checkpoint, linear, grids[linear.name])
        part = slice(linear.view.start, linear.view.start + linear.view.rows)
        np.testing.assert_array_equal(read_tensor(found, linear.view.tensor)[part], expected, linear.name)
    return architecture, found


def facts(golden: Path, name: str) -> dict[str, Any]:
    """What a tool under tools/ recorded beside tensors of the same name."""
    found: dict[str, Any] = json.loads((golden / f"{name}.json").read_text())
    return found


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
