"""Quantized folders for tests: what must come out of them, and damaged copies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from anyquant.core.checkpoint import Checkpoint, read_view
from anyquant.core.linear import Linear
from anyquant.formats.folder.scheme import APART
from anyquant.grids import grid as find_grid
from anyquant.store.safetensors import SafetensorsCheckpoint


def as_quantized(checkpoint: Checkpoint, linear: Linear, grid: str) -> npt.NDArray[np.float32]:
    """What a Linear decodes to on its grid; those apart are as in the source."""
    weights = read_view(checkpoint, linear.view, 0, linear.view.rows)
    if linear.role in APART:
        return weights
    made = find_grid(grid)
    params, codes = made.quantize(weights)
    return made.decode(codes, params)


def altered(
    source: Path, folder: Path, change: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any] | None]
) -> SafetensorsCheckpoint:
    """A copy with other settings and tensors; None takes one away."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    found = {**load_file(source / "model.safetensors"), **tensors}
    save_file({name: one for name, one in found.items() if one is not None}, folder / "model.safetensors")
    return SafetensorsCheckpoint(folder)
