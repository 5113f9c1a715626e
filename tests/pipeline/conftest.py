"""Checkpoints that several tests of the pipeline read, each made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.checkpoints import make_checkpoint

NARROW = {"intermediate_size": 480}  # a multiple of 32, not of 256


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small checkpoint: a family, or "llama-tied", "llama-narrow", "qwen3_moe-stacked"."""
    base = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        family, _, variant = name.partition("-")
        folder = base / name
        if not folder.exists():
            make_checkpoint(
                folder,
                family,
                tied=variant == "tied",
                stacked=variant == "stacked",
                dtype="BF16" if variant == "bf16" else "F32",
                config=NARROW if variant == "narrow" else None,
            )
        return folder

    return get
