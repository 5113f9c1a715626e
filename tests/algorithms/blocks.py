"""Small blocks for tuners: a layer, and two layers with a nonlinearity and a residual stream, on correlated inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from algorithms.slow_feedback import correlated, moments
from anyquant.algorithms.base import Task
from anyquant.core.grid import Grid
from anyquant.core.plan import EMPTY


@dataclass(frozen=True)
class SmallBlock:
    """`states` are the inputs, (documents, length, hidden) of each batch."""

    matrices: Mapping[str, Task]
    states: tuple[Any, ...]
    module: Any = None
    calls: list[int] = field(default_factory=list)

    @property
    def batches(self) -> int:
        return len(self.states)

    def call(self, batch: int, weights: Mapping[str, Any]) -> Any:
        self.calls.append(batch)
        entering = self.states[batch]
        if "down" not in weights:
            return entering @ weights["up"].T
        return entering + torch.nn.functional.silu(entering @ weights["up"].T) @ weights["down"].T

    def target(self, batch: int) -> Any:
        with torch.no_grad():
            return self.call(batch, {name: torch.from_numpy(task.weights) for name, task in self.matrices.items()})

    def worked(self, share: float) -> None:
        return


def small_block(grid: Grid, options: Mapping[str, Any] = EMPTY, layers: int = 2, masked: bool = False) -> SmallBlock:
    """Hidden size 128, and 128 inside; four batches of four documents of 24 tokens."""
    up, inputs = correlated(128, 128)
    down = correlated(128, 128, seed=1)[0]
    up, inputs = up * np.float32(5), inputs[:384]
    inside = torch.nn.functional.silu(torch.from_numpy(inputs @ up.T)).numpy()
    tasks = {"up": Task(up, grid, moments(inputs), options, place="up")}
    if layers == 2:
        tasks["down"] = Task(down, grid, moments(inside), options, place="down")
    if masked:
        keeps = np.random.default_rng(2)
        tasks = {name: replace(task, keep=keeps.random(task.shape) > 0.5) for name, task in tasks.items()}
    states = torch.from_numpy(inputs).view(4, 4, 24, 128)
    return SmallBlock(tasks, tuple(states))
