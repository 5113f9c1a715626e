"""Runs that quantize rows when they are asked for do all steps of a chain."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant import api
from anyquant.core.corrections import LowRank, Mask
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid
from anyquant.pipeline import blocks
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.store.state import StateReader
from support.checkpoints import make_checkpoint


@pytest.mark.parametrize("name", ["int4-g32", "fp8_e4m3-block", "nf4-g64-double", "nvfp4", "iq4_xs"])
def test_rows_of_a_qtensor_decode_to_the_rows(name: str) -> None:
    grid, random = find_grid(name), np.random.default_rng(0)
    weights = random.standard_normal((384, 256)).astype(np.float32)
    params, codes = grid.quantize(weights, None, grid.prepare(float(np.abs(weights).max())) or None)
    left, right = (random.standard_normal(shape).astype(np.float16) for shape in ((384, 3), (3, 256)))
    corrections = LowRank(left, right), Mask(random.random((384, 256)) < 0.5)
    whole = QTensor(grid, (384, 256), codes, params, corrections=corrections)
    np.testing.assert_allclose(whole.rows(128, 256).decode(), whole.decode()[128:256], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "calibration"),
    [
        ("wanda", {"text": "TEXT"}),
        ("magnitude", {"text": "TEXT"}),
        ("magnitude", {"data_free": True}),
        ("magnitude -> lorc", {"data_free": True}),
    ],
)
def test_what_is_asked_for_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, calibration: dict[str, Any]
) -> None:
    """Half of the weights are zero, with and without a text, and with matrices that are handled in pieces."""
    monkeypatch.setattr(blocks, "BLOCK_WEIGHTS", 1 << 14)
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "many", "red", "roofs"], 4000)
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    if "text" in calibration:
        calibration = {"text": str(tmp_path / "text.txt"), "tokens": 512, "context": 64}
    model = make_checkpoint(tmp_path / "llama", "llama", blocks=1)
    options = {"rank": 4} if "lorc" in algorithm else {}
    recipe = Recipe(grid="int4-g32", algorithm=algorithm, options=options, calibration=Calibration(**calibration))
    report = api.make(model, out=tmp_path / "out", recipe=recipe, threads=2)
    assert report.chain.startswith(algorithm.split()[0])
    state = StateReader(tmp_path / "out", find_grid)
    found = state.entry("blocks.0.ffn_down").load()
    assert [one.kind for one in found.corrections][:1] == ["mask"]
    kept = found.corrections[0]
    assert isinstance(kept, Mask) and abs(kept.keep.mean() - 0.5) < 0.01
    if "lorc" in algorithm:
        assert [one.kind for one in found.corrections] == ["mask", "low_rank"]
    else:
        assert (found.decode() == 0).mean() > 0.49
