"""What sessions over a Hugging Face folder share: its config, its tokenizer, and generation token by token."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.extras import require
from anyquant.runtimes.base import Logits, sample

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
MAXIMUM_CONFIG = 64 << 20


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json. Raises BadInputError when it cannot be read as an object."""
    try:
        with (folder / CONFIG).open("rb") as file:
            config = json.loads(file.read(MAXIMUM_CONFIG))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{folder}: cannot read {CONFIG}: {error}") from None
    if not isinstance(config, dict):
        raise BadInputError(f"{folder}: {CONFIG} is not an object")
    return config


def runtime_of(config: Mapping[str, Any]) -> str:
    """The name of the runtime that opens a folder, by what its config says: mlx-lm alone reads "quantization"."""
    return "mlx" if "quantization" in config else "transformers"


class FolderSession(ABC):
    """A session (see runtimes.base) but for its model. `ends` are the ids that end a text."""

    def __init__(self, folder: Path, context: int, ends: Iterable[int | None]) -> None:
        self._tokenizer = require("tokenizers").Tokenizer.from_file(str(folder / TOKENIZER))
        self._context = context
        self._ends = frozenset(ends)

    @property
    def context(self) -> int:
        return self._context

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids by the folder's own tokenizer; special tokens in the text are always recognised by that library."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @abstractmethod
    def clear(self) -> None:
        """Forget the sequence so far."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _advance(self, ids: list[int]) -> Logits:
        """Append tokens; logits after the last one."""

    def _expect_room(self, tokens: Sequence[int]) -> None:
        if not 0 < len(tokens) <= self._context:
            raise UsageError(f"{len(tokens)} tokens do not fit a context of {self._context}")

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append tokens all at once; logits after the last one, float32 (vocabulary,)."""
        return self._advance(list(tokens))

    def step(self, token: int) -> Logits:
        """Append one token."""
        return self._advance([token])

    def generate(self, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Greedy at temperature 0, sampled otherwise; ends at the model's end-of-text token."""
        random = np.random.default_rng(seed)
        ids = self.tokenize(prompt)
        self.clear()
        logits, shown = self.decode(ids), self.detokenize(ids)
        for _ in range(tokens):
            token = sample(logits, temperature, random)
            if token in self._ends:
                return
            ids.append(token)
            text = self.detokenize(ids)
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                yield text[len(shown) :]
                shown = text
            logits = self.step(token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()
