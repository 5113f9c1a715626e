"""Tokens per second of a loaded model: reading a prompt, and writing one token after another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from anyquant.core.errors import UsageError


class Timed(Protocol):
    """What is timed. Both return when their result is there, not when it is queued."""

    def decode(self, tokens: Sequence[int]) -> Any:
        """Process `tokens` as one prompt, starting from an empty context."""
        ...

    def step(self, token: int) -> Any:
        """Process one more token after what was decoded."""
        ...


@dataclass(frozen=True)
class Speed:
    """Tokens per second: medians over `repeats`, after one untimed round."""

    prompt: float
    generation: float
    prompt_tokens: int
    generated_tokens: int
    repeats: int


def measure_speed(
    runtime: Timed,
    prompt: Sequence[int],
    generated: int = 32,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time `repeats` rounds of reading `prompt` and then `generated` single tokens (the prompt's own, again).

    `clock` gives seconds. Raises UsageError when there is nothing to time.
    """
    if not prompt or generated < 1 or repeats < 1:
        raise UsageError(f"nothing to time: {len(prompt)} prompt tokens, {generated} generated, {repeats} repeats")
    reading, writing = [], []
    for turn in range(repeats + 1):
        began = clock()
        runtime.decode(prompt)
        read = clock()
        for index in range(generated):
            runtime.step(prompt[index % len(prompt)])
        written = clock()
        if turn:  # the first round warms caches and thread pools
            reading.append(read - began)
            writing.append(written - read)
    return Speed(
        _rate(len(prompt), median(reading)), _rate(generated, median(writing)), len(prompt), generated, repeats
    )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else float("inf")
