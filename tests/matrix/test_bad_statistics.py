"""Bad and strange calibration: a named error, where possible before any work, or a defined result that is said."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from algorithms.slow_feedback import moments
from anyquant import api
from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.calibrate.stats import Moments, Running
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid as find_grid
from anyquant.pipeline.recipe import Calibration, Recipe, Rule
from matrix.cases import COLUMNS, inputs_of, quantize, task_of
from support.checkpoints import make_checkpoint
from support.jobs import job_of

GRIDS = ("int4-g128", "q4_k", "iq3_s", "nvfp4", "fp8_e4m3-block", "int4-tensor")
DEAD = (3, 130, 131)


def run(algorithm: str, task: Task) -> QTensor:
    """What any step of a chain makes of the task, with rounding to nearest where it does not quantize itself."""
    found = ALGORITHMS.get(algorithm)
    if found.prune is not None:
        return quantize("rtn", replace(task, keep=found.prune(replace(task, options={}))))
    if found.correct is not None:
        return found.correct(replace(task, options={"rank": 4}), quantize("rtn", task))
    # by itself, tuning begins where error feedback ends
    return quantize(algorithm, replace(task, options={"start": "gptq"}) if algorithm == "autoround" else task)


def statistical() -> list[str]:
    """Algorithms that steer by statistics; those of one kind of grid come with it below."""
    algorithms = (ALGORITHMS.get(name) for name in ALGORITHMS.names())
    return [one.name for one in algorithms if one.needs | one.uses]


def pairs() -> list[tuple[str, str]]:
    return [(name, grid) for name in statistical() for grid in (("codebook3",) if name == "codebook" else GRIDS)]


STRANGE: Mapping[str, Float32] = {
    "one token": inputs_of(COLUMNS)[:1],
    "fewer tokens than channels": inputs_of(COLUMNS)[:40],
    "equal channels": np.repeat(inputs_of(COLUMNS)[:, :1], COLUMNS, axis=1),
    "dead channels": np.where(np.isin(np.arange(COLUMNS), DEAD), np.float32(0), inputs_of(COLUMNS)),
    "all zero": np.zeros((16, COLUMNS), np.float32),
    "tiny": inputs_of(COLUMNS) * np.float32(1e-15),
    "large": inputs_of(COLUMNS) * np.float32(1e15),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(("algorithm", "grid_name"), pairs())
def test_strange_statistics_have_a_defined_result(algorithm: str, grid_name: str, kind: str) -> None:
    """Finite, near the weights, the same again; with the Hessian better on the inputs that were seen."""
    stats = moments(STRANGE[kind])
    task = replace(task_of(grid_name), stats=stats)
    found = run(algorithm, task)
    values = found.decode()
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(run(algorithm, replace(task, stats=replace(stats, _memo={}))).decode(), values)
    if ALGORITHMS.get(algorithm).prune is not None:
        return
    assert np.square(values - task.weights).sum() < np.square(task.weights).sum()
    if algorithm not in ("rtn", "autoround") and kind != "all zero":  # the latter is judged on the block's own inputs
        seen, other = STRANGE[kind].astype(np.float64), quantize("rtn", replace(task, stats=None)).decode()
        with_them, without = (np.square((task.weights - some) @ seen.T).sum() for some in (values, other))
        assert with_them < 0.9 * without


@pytest.mark.parametrize("algorithm", [name for name in statistical() if ALGORITHMS.get(name).needs])
def test_what_is_needed_and_not_there_is_named(algorithm: str) -> None:
    task = replace(task_of("codebook3" if algorithm == "codebook" else "int4-g128"), stats=None, place="block 3 down")
    with pytest.raises(UsageError, match=f"block 3 down.*{algorithm if algorithm != 'autoround' else 'gptq'} needs"):
        run(algorithm, task)


@pytest.mark.parametrize("algorithm", ["gptq", "autoround", "codebook", "sparsegpt", "eora"])
def test_a_hessian_that_is_not_finite_is_named(algorithm: str) -> None:
    stats = moments(inputs_of(COLUMNS))
    assert stats.hessian is not None
    broken = stats.hessian.copy()
    broken[5, 9] = broken[9, 5] = np.nan
    task = task_of("codebook3" if algorithm == "codebook" else "int4-g128")
    with pytest.raises(BadInputError, match="block 3 down: the Hessian is not finite"):
        run(algorithm, replace(task, stats=replace(stats, hessian=broken, _memo={}), place="block 3 down"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_named(bad: float) -> None:
    running = Running(8, "block 3 down", frozenset({"hessian"}))
    activations = torch.ones(4, 8)
    activations[2, 5] = bad
    with pytest.raises(BadInputError, match="block 3 down: activation of channel 5 is not finite"):
        running.add(activations)
    with pytest.raises(UsageError, match="block 3 down: no tokens"):
        Running(8, "block 3 down").result()


# ---- at planning


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden size 96: a multiple of 32 only."""
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", hidden=96, blocks=1)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"algorithm": "gptq", "options": {"dampening": -0.1}}, "gptq: option dampening is -0.1, expected at least 0"),
        ({"algorithm": "gptq", "options": {"order": "random"}}, "gptq: option order is 'random', expected auto or"),
        ({"algorithm": "gptq", "options": {"block": 0}}, "gptq: option block is 0"),
        ({"algorithm": "gptq", "options": {"refine": -1}}, "gptq: option refine is -1"),
        ({"algorithm": "hqq", "options": {"p": 1.5}}, "hqq: option p is 1.5, expected more than 0, at most 1"),
        ({"algorithm": "hqq", "options": {"iterations": -1}}, "hqq: option iterations is -1"),
        ({"algorithm": "autoround", "options": {"iterations": -1}}, "autoround: option iterations is -1"),
        ({"algorithm": "autoround", "options": {"start": "hqq"}}, "autoround: option start is 'hqq'"),
        ({"algorithm": "wanda", "options": {"sparsity": 1.0}}, "wanda: option sparsity is 1.0, expected at least 0"),
        ({"algorithm": "wanda", "options": {"pattern": "1:4"}}, "wanda: option pattern is '1:4', expected unstr"),
        ({"algorithm": "magnitude", "options": {"pattern": "2:4", "sparsity": 0.3}}, "pattern 2:4 has sparsity 0.5"),
        ({"algorithm": "sparsegpt", "options": {"block": 0}}, "sparsegpt: option block is 0, expected at least 1"),
        ({"algorithm": "lorc", "options": {"rank": 0}}, "lorc with rank 0, but a 96 x 96 matrix takes 1 to 96"),
        ({"algorithm": "gptq -> eora", "options": {"rank": 97}}, "eora with rank 97, but a 96 x 96"),
        ({"algorithm": "codebook"}, "codebook needs a grid with a table of values per row"),
        ({"algorithm": "awq", "options": {"ratios": 0}}, "awq: option ratios is 0, expected at least 1"),
        ({"algorithm": "awq", "options": {"sites": "attn_inptu"}}, "did you mean attn_input"),
        ({"algorithm": "smoothquant", "options": {"alpha": 1.5}}, "smoothquant: option alpha is 1.5, expected 0 to 1"),
        ({"algorithm": "permute", "options": {"rows": -1}}, "permute: option rows is -1"),
        ({"algorithm": "rotate", "options": {"kind": "hadamrd"}}, "rotate: option kind is 'hadamrd'"),
        ({"activations": "int8-chanel"}, "unknown grid 'int8-chanel'; did you mean int8-channel"),
        ({"activations": "int8-channel:static"}, "use a grid ending in -tensor"),
        ({"rules": (Rule(pattern="blocks.9.*", algorithm="gptq"),)}, r"rule 0 .*blocks\.9.* matches no Linear"),
        ({"rules": (Rule(role="ffn_down", algorithm="gptq", options={"dampening": -1.0}),)}, "dampening is -1"),
        ({"rules": (Rule(role="ffn_down", algorithm="awq -> gptq"),)}, "awq changes the model as a whole"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)) + "-" + str(value.get("algorithm", "")),
)
def test_what_cannot_be_meant_is_said_at_planning(llama: Path, recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        job_of(llama, "state", importance=True, **{"grid": "int4-g32", **recipe})


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"grid": "int4-g128"}, "blocks.0.attn_q: int4-g128 does not fit: shape 96 x 96 is not a multiple"),
        ({"grid": "q4_k", "algorithm": "gptq"}, "blocks.0.attn_q: q4_k does not fit"),
        ({"grid": "int4-g32", "rules": (Rule(role="attn_v", grid="nf4-g64"),)}, "blocks.0.attn_v: nf4-g64"),
        ({"grid": "int8-channel", "activations": "mxfp8_e4m3", "rules": ()}, ""),
        ({"grid": "int4-channel", "activations": "int8-g128"}, "its input does not lie on int8-g128"),
    ],
)
def test_groups_that_do_not_divide_the_width_are_said_at_planning(llama: Path, recipe: Any, said: str) -> None:
    if not said:  # 96 is a multiple of 32
        assert job_of(llama, "state", importance=True, **recipe).plan.decisions["blocks.0.attn_q"].input_activation
        return
    with pytest.raises(UnsupportedError, match=said):
        job_of(llama, "state", importance=True, **recipe)


@pytest.mark.parametrize("algorithm", ["awq", "smoothquant", "permute"])
def test_a_transform_that_nothing_asks_for_is_said_at_planning(llama: Path, algorithm: str) -> None:
    with pytest.raises(UsageError, match=f"{algorithm} .* no matrix of the blocks is quantized"):
        job_of(llama, "state", importance=True, grid="f16", algorithm=algorithm)


@pytest.mark.parametrize(
    "algorithm", ["gptq", "autoround", "wanda", "sparsegpt", "rtn -> eora", "awq", "smoothquant", "permute"]
)
def test_statistics_that_will_not_be_there_are_said_at_planning(llama: Path, algorithm: str) -> None:
    with pytest.raises(UsageError, match="leave out --data-free"):
        job_of(llama, "state", importance=False, grid="int4-g32", algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_a_model_with_broken_activations_is_named(tmp_path: Path, algorithm: str) -> None:
    """Finite weights whose products are not: nothing is published, the place is named."""
    folder = make_checkpoint(tmp_path / "model", hidden=64, blocks=2, config={"intermediate_size": 64})
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= np.float32(1e20)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {number} and another" for number in range(4000)), encoding="utf-8")
    calibration = Calibration(text=str(text), tokens=512, context=64)
    with pytest.raises(BadInputError, match=r"(block 0|blocks\.0).*not finite|leave float32"):
        recipe = Recipe(grid="int4-g32", algorithm=algorithm, calibration=calibration)
        api.make(folder, out=tmp_path / "out", recipe=recipe, threads=1)
    assert not (tmp_path / "out").exists()


def test_moments_of_an_expert_that_no_token_reached_serve_as_well() -> None:
    """Count 0 marks assumed statistics; they steer like seen ones."""
    stats = moments(inputs_of(COLUMNS))
    assumed = Moments(stats.second_moment, 0, hessian=stats.hessian)
    task = Task(task_of("int4-g128").weights, find_grid("int4-g128"), assumed)
    np.testing.assert_array_equal(quantize("gptq", task).codes, quantize("gptq", replace(task, stats=stats)).codes)
