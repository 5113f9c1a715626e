"""A folder opened by mlx-lm on MLX's CPU backend, as Linux has it: the code that Macs run, but for the Metal kernels.

Scales, biases, norms and what else is stored in floating point become float32, which changes no value, so that MLX
computes in float32: what is measured is what the folder says. Apple's GPUs compute in the type of the model. Nothing is
downloaded, and the folder names no code that is run (`model_file` is refused by mlx-lm itself).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.extras import require
from anyquant.runtimes.base import Logits
from anyquant.runtimes.folder import TOKENIZER, FolderSession, read_config

# what transformers and mlx-lm compute alike, as the tests of the format show
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")


def _refusals(folder: Path) -> list[str]:
    config = read_config(folder)
    reasons = []
    if config.get("model_type") not in FAMILIES:
        reasons.append(f"model type {config.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    if "model_file" in config:
        reasons.append("its config.json names a file of code, which is never run")
    if "quantization" not in config and config.get("quantization_config"):
        reasons.append("its weights are quantized in another format's way")
    if not (folder / TOKENIZER).is_file():
        reasons.append(f"there is no {TOKENIZER}")
    return reasons


class MlxSession(FolderSession):
    """A loaded folder."""

    def __init__(self, folder: Path, context: int) -> None:
        self._mx: Any = require("mlx.core")
        utils, cache, trees = require("mlx_lm.utils"), require("mlx_lm.models.cache"), require("mlx.utils")
        self._new_cache = cache.make_prompt_cache
        # mlx-lm makes the arrays of a model on whatever device is the default
        self._mx.set_default_device(self._mx.cpu)
        try:
            self._model, config = utils.load_model(folder)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise BadInputError(f"{folder}: mlx-lm cannot load it: {error}") from None
        self._model.update(trees.tree_map(self._single, self._model.parameters()))
        self._vocabulary = int(config["vocab_size"])
        super().__init__(folder, context, _ends(config))
        self._cache: Any = None

    def _single(self, array: Any) -> Any:
        return array.astype(self._mx.float32) if self._mx.issubdtype(array.dtype, self._mx.floating) else array

    @property
    def vocabulary(self) -> int:
        return self._vocabulary

    def logits(self, tokens: Sequence[int]) -> Logits:
        """float32 (tokens, vocabulary) of a fresh sequence. Raises UsageError when it is longer than the context."""
        self._expect_room(tokens)
        return self._numpy(self._model(self._tokens(tokens))[0])

    def clear(self) -> None:
        """Forget the sequence so far."""
        self._cache = None

    def _advance(self, ids: list[int]) -> Logits:
        if self._cache is None:
            self._cache = self._new_cache(self._model)
        return self._numpy(self._model(self._tokens(ids), cache=self._cache)[0, -1])

    def _tokens(self, ids: Sequence[int]) -> Any:
        return self._mx.array(np.array([ids], dtype=np.int32))

    def _numpy(self, values: Any) -> Logits:
        found: Logits = np.array(values.astype(self._mx.float32))
        return found

    def close(self) -> None:
        self._model, self._cache = None, None


def _ends(config: Mapping[str, Any]) -> list[int | None]:
    """mlx-lm puts the ids of generation_config.json in the place of the model's own."""
    ends = config.get("eos_token_id")
    return list(ends) if isinstance(ends, list) else [ends]


class MlxRuntime:
    """Opens folders with mlx-lm."""

    name = "mlx"
    default_cache: str | None = None

    def check(self, artifact: Path) -> list[str]:
        """Every reason why the folder cannot be opened, from its config alone."""
        return _refusals(artifact)

    def load(
        self, artifact: Path, context: int = 512, threads: int | None = None, cache: str | None = None
    ) -> MlxSession:
        """Open the folder; MLX's CPU backend chooses its own `threads`.

        Raises UnsupportedError with all reasons of `check`, and for a `cache`.
        """
        if cache is not None:
            raise UnsupportedError(
                f"{artifact}: mlx-lm is run without a key-value cache type ({cache}); only llama.cpp can be told"
            )
        reasons = _refusals(artifact)
        if reasons:
            raise UnsupportedError(f"{artifact}: mlx-lm cannot run it: {'; '.join(reasons)}")
        return MlxSession(artifact, context)


RUNTIME = MlxRuntime()
