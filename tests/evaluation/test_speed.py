"""Speed with a clock of our own."""

from collections.abc import Sequence

import pytest

from anyquant.core.errors import UsageError
from anyquant.evaluation.speed import measure_speed


class Slow:
    """A prompt token costs 10 ms, a step 50 ms; the first round costs ten times as much."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds = 0
        self.length = 0

    def clear(self) -> None:
        self.length = 0

    def decode(self, tokens: Sequence[int]) -> None:
        assert self.length == 0
        self.rounds += 1
        self.length += len(tokens)
        self.now += 0.010 * len(tokens) * (10 if self.rounds == 1 else 1)

    def step(self, token: int) -> None:
        self.length += 1
        self.now += 0.050 * (7 if self.rounds == 3 else 1)


def test_speed_is_a_median_without_the_first_round() -> None:
    runtime = Slow()
    found = measure_speed(runtime, [1, 2, 3, 4], generated=6, repeats=5, clock=lambda: runtime.now)
    assert runtime.rounds == 6
    assert found.prompt_per_second == pytest.approx(100.0)
    assert found.generated_per_second == pytest.approx(20.0)
    assert (found.prompt_tokens, found.generated_tokens) == (4, 6)


def test_nothing_to_time() -> None:
    with pytest.raises(UsageError, match="nothing to time"):
        measure_speed(Slow(), [])
