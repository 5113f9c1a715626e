"""Tokens per second of an opened model: reading a prompt, and writing one token after another."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Protocol

from anyquant.core.errors import UsageError
from anyquant.runtimes.base import Speed


class Timed(Protocol):
    """What is timed. `decode` and `step` return when their result is there, not when it is queued."""

    def clear(self) -> None:
        """Forget the sequence so far."""
        ...

    def decode(self, tokens: Sequence[int]) -> Any:
        """Append `tokens` to the sequence, all at once."""
        ...

    def step(self, token: int) -> Any:
        """Append one token."""
        ...


def measure_speed(
    runtime: Timed,
    prompt: Sequence[int],
    generated: int = 32,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Medians over `repeats` rounds, after an untimed one: reading `prompt`, then `generated` tokens one by one.

    The tokens appended are the prompt's own, again: what they are does not change the work. `clock` gives seconds.
    Raises UsageError when there is nothing to time.
    """
    if not prompt or generated < 1 or repeats < 1:
        raise UsageError(f"nothing to time: {len(prompt)} prompt tokens, {generated} generated, {repeats} repeats")
    reading, writing = [], []
    for turn in range(repeats + 1):
        runtime.clear()
        began = clock()
        runtime.decode(prompt)
        read = clock()
        for index in range(generated):
            runtime.step(prompt[index % len(prompt)])
        written = clock()
        if turn:  # the first round warms caches and thread pools
            reading.append(read - began)
            writing.append(written - read)
    runtime.clear()
    return Speed(
        prompt_tokens=len(prompt),
        generated_tokens=generated,
        prompt_per_second=_rate(len(prompt), median(reading)),
        generated_per_second=_rate(generated, median(writing)),
    )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else float("inf")
