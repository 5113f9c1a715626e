"""Staged runs handle a block in parts, and head and embedding in pieces: neither shows in the result."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from anyquant import api
from anyquant.calibrate.chain import Chain
from anyquant.core.errors import UsageError
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.pipeline import matrix, scene
from anyquant.pipeline.recipe import Calibration, Recipe, Rule
from anyquant.pipeline.statistics import refuse_imatrix
from anyquant.runtimes.activations import RoundedInput, rounding_of
from anyquant.store.open import open_checkpoint
from anyquant.store.state import StateReader
from support.checkpoints import make_checkpoint
from support.jobs import job_of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "many", "red", "roofs"], 4000)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", blocks=1)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("model") / "mixtral", "mixtral", blocks=1)
    return folder


def made(model: Path, text: Path, out: Path, recipe: Recipe) -> StateReader:
    calibration = Calibration(text=str(text), tokens=512, context=64)
    wish = Recipe(**{**vars(recipe), "calibration": calibration})
    api.make(model, out=out, recipe=wish, threads=1)
    return StateReader(out, find_grid)


def test_pieces_of_the_head_begin_at_blocks_of_the_grid(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(grid="int8-g32", head="fp8_e4m3-block", algorithm="gptq")
    whole = made(llama, text, tmp_path / "whole", recipe)
    monkeypatch.setattr(matrix, "CHUNK_WEIGHTS", 200 * 256)  # 200 rows, where blocks have 128
    pieces = made(llama, text, tmp_path / "pieces", recipe)
    assert np.array_equal(pieces.entry("head").load().decode(), whole.entry("head").load().decode())


def test_static_scales_stay_known_when_another_reader_of_the_input_does_not_ask(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        grid="int8-channel",
        algorithm="gptq",
        activations="int8-tensor:static",
        rules=(Rule(role="attn_k", grid="f16"),),
    )
    plan = made(llama, text, tmp_path / "out", recipe).plan
    static = {name for name, decision in plan["decisions"].items() if decision["input_activation"]}
    assert "blocks.0.attn_q" in static and static == set(plan["activation_maxima"])


def test_a_scale_of_all_tokens_is_calibrated_so_that_no_token_depends_on_its_neighbours(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    """NVFP4 has a scale for the whole tensor above those of its groups."""
    maxima = made(llama, text, tmp_path / "out", Recipe(grid="nvfp4", activations="nvfp4")).plan["activation_maxima"]
    rounding = rounding_of(RoundedInput("", "nvfp4", maxima["blocks.0.attn_q"]))
    tokens = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 256)).astype(np.float32))
    tokens[5] *= 1e5
    assert torch.equal(rounding(tokens)[:5], rounding(tokens[:5]))
    with pytest.raises(UsageError, match="data-free"):
        job_of(llama, "state", False, grid="nvfp4", activations="nvfp4")


def test_experts_in_parts_are_as_together(
    mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(grid="int4-g32", algorithm="rtn", rules=(Rule(role="ffn_up", algorithm="gptq"),))
    together = made(mixtral, text, tmp_path / "together", recipe)
    monkeypatch.setattr(matrix, "HESSIAN_BYTES", 1)
    parts = made(mixtral, text, tmp_path / "parts", recipe)
    assert dict(parts.entries) == dict(together.entries)


def test_a_transform_goes_without_hessians_for_which_there_is_no_room(
    mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scene, "HESSIAN_BYTES", 4 * 256 * 256 * 3)  # of eleven inputs, the first three have room
    recipe = Recipe(grid="int3-g32", algorithm="awq", calibration=Calibration(text=str(text), tokens=512, context=64))
    report = api.make(mixtral, out=tmp_path / "out", recipe=recipe, threads=1)
    assert "awq: block 0: no room for the Hessians of 8 inputs" in report.notes
    assert any("scaled by activation" in note for note in report.notes)


def test_an_expert_that_is_observed_alone_and_not_reached(mixtral: Path) -> None:
    """One token reaches two of four experts; each of the others is on its own: a unit Hessian is assumed."""
    checkpoint = open_checkpoint(mixtral)
    chain = Chain(StreamedModel(checkpoint, detect(checkpoint)), [[5]])
    with chain.block(0) as block:
        experts = [linear for linear in block.linears if linear.name.endswith("ffn_gate") and linear.expert is not None]
        counts = []
        for linear in experts:
            found = block.observe(frozenset({"hessian"}), [linear])[linear.input_group]
            counts.append(found.count)
            assert found.hessian is not None
            if not found.count:
                assert np.array_equal(found.hessian, np.eye(linear.shape[1]))
                assert linear.name in block.unrouted
    assert sorted(counts) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("wish", "refused"),
    [
        ({"algorithm": "wanda"}, ""),
        ({"algorithm": "gptq"}, "gptq needs"),
        ({"algorithm": "magnitude"}, "behind the quantized"),
        ({"grid": "int8-channel", "activations": "int8-tensor:static"}, "behind the quantized"),
        ({"algorithm": "rotate"}, "original channels"),
    ],
)
def test_an_importance_file_is_used_or_refused(llama: Path, wish: dict[str, str], refused: str) -> None:
    recipe = {"grid": "int4-g32", "calibration": Calibration(imatrix="given.gguf"), **wish}
    job = job_of(llama, "state", True, **recipe)
    with pytest.raises(UsageError, match=refused) if refused else nullcontext():
        refuse_imatrix(job)
