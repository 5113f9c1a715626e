"""The neutral state: one entry per distinct content, and nothing in the folder that was not verified."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from anyquant.calibrate.stats import Moments
from anyquant.core.errors import AnyQuantError
from anyquant.core.linear import Linear
from anyquant.core.progress import Silent
from anyquant.pipeline.rows import Direct, Unweighted
from anyquant.pipeline.state import verify_state, write_state
from anyquant.store.publish import Stage
from support.checkpoints import make_checkpoint
from support.jobs import job_of

Values = npt.NDArray[np.float32]
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


class ByBlock:
    """An importance that differs between the blocks."""

    def moment(self, linear: Linear) -> Moments | None:
        found = self.importance(linear)
        return None if found is None else Moments(found, 1)

    def importance(self, linear: Linear) -> Values | None:
        return np.linspace(0.1, 1.0 + (linear.block or 0), linear.view.columns, dtype=np.float32)


def changed(folder: Path, change: Callable[[dict[str, npt.NDArray[np.generic]]], None]) -> Path:
    make_checkpoint(folder, "llama")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_equal_weights_with_other_inputs_are_rounded_for_their_own(tmp_path: Path) -> None:
    """As in models whose blocks or experts began as copies of each other."""

    def copy(tensors: dict[str, npt.NDArray[np.generic]]) -> None:
        for name in list(tensors):
            if ".layers.1." in name:
                tensors[name] = tensors[name.replace(".1.", ".0.")].copy()

    job = job_of(changed(tmp_path / "model", copy), "state", grid="q4_k")
    with Stage(tmp_path / "out") as stage:
        keys = write_state(job, Direct(job, ByBlock()), ByBlock(), stage, 1, Silent())
    assert keys["blocks.0.attn_q"] != keys["blocks.1.attn_q"]
    with Stage(tmp_path / "out") as stage:
        keys = write_state(job, Direct(job, Unweighted()), Unweighted(), stage, 1, Silent())
    assert keys["blocks.0.attn_q"] == keys["blocks.1.attn_q"]


def test_equal_values_of_another_shape_are_another_entry(tmp_path: Path) -> None:
    def clear(tensors: dict[str, npt.NDArray[np.generic]]) -> None:
        for name in (UP, DOWN):
            tensors[name] = np.zeros_like(tensors[name])

    job = job_of(changed(tmp_path / "model", clear), "state", grid="q4_0")
    with Stage(tmp_path / "out") as stage:
        write_state(job, Direct(job, Unweighted()), Unweighted(), stage, 1, Silent())
        assert verify_state(job, stage.folder, Unweighted(), 1, Silent())["blocks.0.ffn_up"] == 0


@pytest.mark.parametrize("name", ["carried.safetensors", "config.json"])
def test_a_changed_byte_beside_the_entries_is_found(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    job = job_of(tmp_path / "model", "state", grid="q4_0")
    with Stage(tmp_path / "out") as stage:
        write_state(job, Direct(job, Unweighted()), Unweighted(), stage, 1, Silent())
        verify_state(job, stage.folder, Unweighted(), 1, Silent())
        path = stage.folder / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(AnyQuantError, match=name):
            verify_state(job, stage.folder, Unweighted(), 1, Silent())
