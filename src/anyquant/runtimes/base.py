"""What a runtime is: it says whether it can open an artifact, opens it, and answers with logits, text and speed."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Speed:
    """Measured throughput in tokens per second: of a prompt taken at once, and of generation one token at a time."""

    prompt_tokens: int
    generated_tokens: int
    prompt_per_second: float
    generated_per_second: float


@dataclass(frozen=True)
class Memory:
    """Bytes that the runtime itself reports: weights, key-value cache, working buffers."""

    weights: int
    cache: int
    compute: int


class Session(Protocol):
    """An artifact opened in a runtime; also a context manager that frees it."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids, the width of the logits."""
        ...

    @property
    def context(self) -> int:
        """Most tokens that one sequence can hold."""
        ...

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids. `add_special` adds what the model's settings ask for (a BOS), `parse_special` reads the text of a
        control token, such as "<s>", as that token."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str: ...

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Logits after every position of a fresh sequence: float32 (tokens, vocabulary)."""
        ...

    def generate(self, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The continuation of `prompt`, piece by piece, at most `tokens` of them; temperature 0 is greedy."""
        ...

    def clear(self) -> None:
        """Forget the sequence so far."""
        ...

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append tokens all at once; logits after the last one, float32 (vocabulary,)."""
        ...

    def step(self, token: int) -> Logits:
        """Append one token; logits after it, float32 (vocabulary,)."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *failure: object) -> None: ...


class Runtime(Protocol):
    """Opens artifacts. `name` is what the user calls it.

    `default_cache` are the types of the key-value cache that its users have when they ask for none; None: it cannot be
    told a type.
    """

    name: str
    default_cache: str | None

    def check(self, artifact: Path) -> list[str]:
        """Every reason why the artifact cannot be opened here, found without loading it. Empty when there is none."""
        ...

    def load(self, artifact: Path, context: int = 512, threads: int | None = None, cache: str | None = None) -> Session:
        """Open the artifact for sequences of up to `context` tokens.

        `cache` names the types of the key-value cache, "q8_0" or "q8_0,q4_0" (keys, values); None: the most exact one.
        Raises UnsupportedError when the runtime cannot be told.
        """
        ...


def sample(logits: Logits, temperature: float, random: np.random.Generator) -> int:
    """A token id drawn from softmax(logits / temperature), or the most likely one at temperature 0."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
