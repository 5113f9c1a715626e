"""AutoRound against a slow reference in double precision, and what it gains on small blocks of every kind of grid."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.blocks import SmallBlock, small_block
from algorithms.slow_feedback import Pairs
from anyquant.algorithms.autoround import ALGORITHM, States, descend, tune
from anyquant.algorithms.gptq import quantize as feed_errors_back
from anyquant.algorithms.offsets import LatticeOffsets, Learned, offsets_of
from anyquant.algorithms.rtn import quantize as round_to_nearest
from anyquant.core.errors import UsageError
from anyquant.core.grid import Grid
from anyquant.core.qtensor import QTensor
from anyquant.grids import grid


def loss_of(block: SmallBlock, matrices: Mapping[str, QTensor]) -> float:
    return States(block).judge(matrices).loss


def rounded(block: SmallBlock, function: Any = round_to_nearest) -> dict[str, QTensor]:
    return {name: function(replace(task, options={})) for name, task in block.matrices.items()}


@dataclass
class Slow:
    """SignRound of one layer as it is written down, on "int4-g128" with its scales, double precision."""

    weights: Any
    scale: Any
    offset: Any

    def codes(self) -> Any:
        return np.clip(np.rint(self.weights / self.scale + self.offset), -8, 7)

    def step(self, states: Any, rate: float) -> None:
        error = states @ (self.codes() * self.scale - self.weights).T
        gradient = error.T @ states
        rounded = np.rint(self.weights / self.scale + self.offset)
        passes = (rounded >= -8) & (rounded <= 7)
        self.offset = np.clip(self.offset - rate * np.sign(gradient * passes), -0.5, 0.5)


def test_the_first_steps_are_those_of_the_slow_reference() -> None:
    block = small_block(grid("int4-g128"), layers=1)
    task = block.matrices["up"]
    start = round_to_nearest(task)
    ours = offsets_of(task, start, Learned(roundings=True, scales=False))
    assert isinstance(ours, LatticeOffsets)
    weights = task.weights.astype(np.float64)
    slow = Slow(weights, np.repeat(start.params["scale"].astype(np.float64), 128, axis=1), np.zeros_like(weights))
    for iteration in range(5):
        batches, rate = [iteration % 4, (iteration + 1) % 4], 0.1 * (1 - iteration / 5)
        descend({"up": ours}, batches, rate, States(block))
        slow.step(np.concatenate([block.states[b].reshape(-1, 128).numpy() for b in batches]).astype(np.float64), rate)
        agree = np.isclose(ours.offset.numpy(), slow.offset, atol=1e-6)
        assert agree.mean() > 0.999  # a gradient of almost 0 may have either sign
        np.testing.assert_array_equal(ours.result().codes[agree], slow.codes()[agree])
    assert np.abs(slow.offset).max() > 0.25 and (slow.codes() != start.codes).mean() > 0.1


def test_factors_of_scales_follow_their_gradient_and_end_as_stored_parameters() -> None:
    block = small_block(grid("int4-g64"), layers=1)
    task = block.matrices["up"]
    start = round_to_nearest(task)
    ours = offsets_of(task, start, Learned(roundings=False, scales=True))
    assert isinstance(ours, LatticeOffsets)
    factors = torch.ones((128, 2, 1), dtype=torch.float64, requires_grad=True)
    values = torch.from_numpy(start.decode()).double().view(128, 2, 64) * factors
    states = block.states[0].double()
    target = states @ torch.from_numpy(task.weights).double().T
    (states @ values.view(128, 128).T - target).square().sum().backward()
    descend({"up": ours}, [0], 0.1, States(block))
    assert factors.grad is not None
    np.testing.assert_allclose(ours.factor.numpy(), 1 - 0.1 * factors.grad.sign()[..., 0].numpy(), rtol=1e-6)
    found = ours.result().params["scale"]
    np.testing.assert_allclose(found, start.params["scale"] * ours.factor.numpy(), rtol=0.02)
    np.testing.assert_array_equal(found.view(np.uint32) & 0xFFFF, 0)  # bfloat16


@pytest.mark.parametrize(
    "chosen",
    [grid("int3-g64"), grid("int2-g64-asym"), grid("q4_0"), grid("nf4-g64"), grid("int4-tensor"), Pairs()],
    ids=lambda chosen: str(chosen.name),
)
def test_it_beats_rounding_by_far(chosen: Grid) -> None:
    block = small_block(chosen, {"start": "rtn", "iterations": 32})
    ours = tune(block)
    assert loss_of(block, ours) < 0.75 * loss_of(block, rounded(block))
    assert all(matrix.grid is chosen for matrix in ours.values())


def test_it_is_never_worse_than_where_it_began() -> None:
    block = small_block(grid("int3-g64"), {"iterations": 24})
    ours = loss_of(block, tune(block))
    assert ours <= loss_of(block, rounded(block, lambda task: feed_errors_back(replace(task, options={"refine": 1}))))
    assert ours < 0.5 * loss_of(block, rounded(block))
    nothing = small_block(grid("int3-g64"), {"iterations": 0, "start": "rtn"})
    for name, matrix in tune(nothing).items():
        np.testing.assert_array_equal(
            matrix.decode(), round_to_nearest(replace(block.matrices[name], options={})).decode()
        )
    far = small_block(grid("int3-g64"), {"iterations": 4, "rate": 0.5, "start": "rtn", "minmax": False})
    assert loss_of(far, tune(far)) <= loss_of(far, rounded(far))


def test_a_super_block_grid_is_tuned_with_its_stored_scales() -> None:
    block = small_block(grid("q4_k"), {"iterations": 24, "start": "rtn"}, layers=1)
    wide = np.concatenate([block.matrices["up"].weights] * 2, axis=1)
    stats = block.matrices["up"].stats
    assert stats is not None
    task = replace(
        block.matrices["up"], weights=wide, stats=replace(stats, second_moment=np.tile(stats.second_moment, 2))
    )
    doubled = SmallBlock({"up": task}, tuple(torch.cat([states, states.flip(2)], dim=2) for states in block.states))
    assert loss_of(doubled, tune(doubled)) < 0.85 * loss_of(doubled, rounded(doubled))


def test_pruned_weights_stay_zero_and_floats_stay_as_they_are() -> None:
    for chosen in (grid("int3-g64"), Pairs()):
        block = small_block(chosen, {"iterations": 12, "start": "rtn"}, masked=True)
        for name, matrix in tune(block).items():
            assert not matrix.decode()[~block.matrices[name].keep].any()
    block = small_block(grid("f16"), {"iterations": 4, "start": "rtn"})
    np.testing.assert_array_equal(tune(block)["up"].decode(), rounded(block)["up"].decode())


def test_blocks_of_rows_may_reach_beyond_the_matrix() -> None:
    block = small_block(grid("fp8_e4m3-block"), {"iterations": 8}, layers=1)
    task = replace(block.matrices["up"], weights=block.matrices["up"].weights[:100])
    block = replace(block, matrices={"up": task})
    assert loss_of(block, tune(block)) < 0.5 * loss_of(block, rounded(block))


def test_it_is_deterministic_and_the_seed_matters() -> None:
    results = []
    for seed in (1, 1, 2):
        block = small_block(grid("int3-g64"), {"iterations": 8, "start": "rtn", "batch": 4, "seed": seed})
        results.append(tune(block)["down"])
    np.testing.assert_array_equal(results[0].codes, results[1].codes)
    assert (results[0].codes != results[2].codes).any()


def test_what_does_not_carry_over_to_unseen_batches_is_not_kept() -> None:
    block = small_block(grid("int3-g64"), {"iterations": 16, "start": "rtn", "minmax": False})
    strange = (*block.states[:3], 30 * torch.flip(block.states[3], dims=(2,)))
    odd = SmallBlock({name: replace(task, stats=None) for name, task in block.matrices.items()}, strange)
    ours, theirs = States(odd).judge(tune(odd)), States(odd).judge(rounded(odd))
    assert States(odd).seen == [0, 1, 2]
    assert ours.unseen <= theirs.unseen and ours.loss <= theirs.loss


def test_options_are_checked_and_say_which_statistics_are_needed() -> None:
    assert ALGORITHM.needed({"start": "gptq"}) == {"second_moment", "hessian"}
    assert ALGORITHM.needed({"start": "rtn"}) == {"second_moment"}
    for options in ({"start": "best"}, {"iterations": -1}, {"batch": 0}, {"rate": -0.1}):
        with pytest.raises(UsageError, match=f"autoround: option {next(iter(options))} is"):
            tune(small_block(grid("int3-g64"), options))
    block = small_block(grid("int3-g64"), {"iterations": 8})
    uneven = {**block.matrices, "down": replace(block.matrices["down"], options={"iterations": 9})}
    with pytest.raises(UsageError, match="down: autoround's option iterations is 9, but 8 for others of the block"):
        tune(replace(block, matrices=uneven))
    assert tune(replace(block, matrices={})) == {}
