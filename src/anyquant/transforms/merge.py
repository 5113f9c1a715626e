"""A low-rank adapter merged into the weights as they are read: W + scale * B A, in float32 (LoRA, arXiv 2106.09685).

Source: peft 0.21, tuners/lora/config.py, tuners/lora/layer.py (get_delta_weight) and utils/save_and_load.py, whose
`merge_and_unload` is the oracle of the tests.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.core.checkpoint import Checkpoint, TensorSpec, read_rows
from anyquant.core.dtypes import DTYPES, Bytes, Float32
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.store.safetensors import SafetensorsCheckpoint
from anyquant.store.strict_json import parse_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
STEP = 256  # rows multiplied at once, at fixed places: the bytes of a row do not depend on what is read with it
FACTOR = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")

# keys of a config that say how the adapter was trained, or are heeded here
HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type"),
        *("peft_version", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying", "r", "lora_alpha"),
        *("use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "bias"),
        "init_lora_weights",
    }
)
# ways to begin that leave the base as it was; the others (pissa, olora, corda, loftq, lora_ga) take something out of it
INNOCENT = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """What is added to a matrix: scale * left @ right, by the names of the adapter's tensors.

    `turned`: the product is that of the transposed matrix (an embedding; GPT-2's Conv1D): right^T @ left^T.
    """

    left: str
    right: str
    scale: float
    turned: bool


class Merged:
    """`base` with the adapter in `folder`. Merged matrices are F32, the others as they are stored.

    Raises BadInputError for an adapter that is damaged or does not fit the base, UnsupportedError for one that is more
    than a sum of low rank, each by the name of the tensor or key. Safe to read from threads.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self.base = base
        self.folder = folder
        self.location = base.location
        settings = _settings(folder)
        if not (folder / WEIGHTS).is_file():
            raise BadInputError(f"{folder}: there is no {WEIGHTS}; is this an adapter? Pickles are not read")
        self._adapter = SafetensorsCheckpoint(folder, WEIGHTS)
        self._sums: dict[str, LowRank] = {}
        self._replaced: dict[str, str] = {}
        self._match(settings)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.base.metadata

    @property
    def merged(self) -> Sequence[str]:
        """The tensors that differ from those of the base."""
        return [name for name in self.names() if name in self._sums or name in self._replaced]

    def text_file(self, name: str) -> bytes | None:
        """A companion file of the base, such as its tokenizer."""
        return self.base.text_file(name)

    def names(self) -> Sequence[str]:
        return self.base.names()

    def spec(self, name: str) -> TensorSpec:
        owner, called = self._owner(name)
        stored = owner.spec(called)
        if name in self._sums:
            return TensorSpec(name, "F32", stored.shape, 4 * stored.elements)
        return TensorSpec(name, stored.dtype, stored.shape, stored.nbytes)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        """See core.checkpoint.Checkpoint."""
        owner, called = self._owner(name)
        if name not in self._sums:
            owner.read_into(called, start, stop, buffer)
            return
        spec = self.spec(name)
        if not 0 <= start <= stop <= spec.rows or buffer.size != 4 * (stop - start) * spec.row_length:
            raise AnyQuantError(f"{name}: rows [{start}, {stop}) do not fit the tensor or the buffer")
        values = buffer.view(np.float32).reshape(stop - start, spec.row_length)
        values[:] = read_rows(owner, called, start, stop)
        left, right = self._factors(self._sums[name])
        scale = np.float32(self._sums[name].scale)
        for first in range(start // STEP * STEP, stop, STEP):
            change = (left[first : first + STEP] @ right) * scale
            low, high = max(first, start), min(first + STEP, stop)
            values[low - start : high - start] += change[low - first : high - first]

    def _owner(self, name: str) -> tuple[Checkpoint, str]:
        """Where a tensor is read from, before anything is added to it, and what it is called there."""
        replaced = self._replaced.get(name)
        return (self.base, name) if replaced is None else (self._adapter, replaced)

    def _factors(self, found: LowRank) -> tuple[Float32, Float32]:
        left, right = (
            read_rows(self._adapter, name, 0, self._adapter.spec(name).rows) for name in (found.left, found.right)
        )
        return (np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)) if found.turned else (left, right)

    def _match(self, settings: Mapping[str, Any]) -> None:
        """Find the place of every tensor of the adapter."""
        halves: dict[str, dict[str, str]] = {}
        for name in self._adapter.names():
            path = name.removeprefix(PREFIX)
            match = FACTOR.fullmatch(path)
            if match is not None:
                halves.setdefault(match[1], {})[match[2] or match[3]] = name
            elif "lora_" in path:
                raise UnsupportedError(f"{self.folder}: {name} is no factor of a low-rank sum (DoRA, a bias ...)")
            else:
                self._replace(name, path.replace(".base_layer.", ".").replace(".modules_to_save.", "."))
        for path, names in halves.items():
            if set(names) != {"A", "B"}:
                raise BadInputError(f"{self.folder}: {next(iter(names.values()))} has no other factor beside it")
            self._add(path, names["B"], names["A"], settings)
        if not halves and not self._replaced:
            raise BadInputError(f"{self.folder}: {WEIGHTS} holds no tensors")

    def _add(self, path: str, left: str, right: str, settings: Mapping[str, Any]) -> None:
        target = self._target(left, f"{path}.weight")
        embedding = "lora_embedding_" in left
        (out, rank), (low, columns) = (self._matrix(name) for name in (left, right))
        wanted = _pattern_value(settings, "rank_pattern", path, settings.get("r", 8))
        if rank != low or rank != wanted:
            raise BadInputError(
                f"{self.folder}: {left} and {right} have ranks {rank} and {low}, their config says {wanted}"
            )
        alpha = _pattern_value(settings, "alpha_pattern", path, settings.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        shape = self.base.spec(target).shape
        straight, turned = shape == (out, columns), shape == (columns, out)
        if settings.get("fan_in_fan_out") and straight and turned and not embedding:
            raise UnsupportedError(
                f"{self.folder}: fan_in_fan_out leaves open which way round {target} is, as it is square"
            )
        turns = embedding or (not straight and bool(settings.get("fan_in_fan_out")))
        if not (turned if turns else straight):
            raise BadInputError(
                f"{self.folder}: {left} and {right} make a matrix of {out} x {columns}, {target} of {self.location} is "
                f"{list(shape)}"
            )
        self._sums[target] = LowRank(left, right, scale, turns)

    def _replace(self, name: str, path: str) -> None:
        target = self._target(name, path)
        found, wanted = self._adapter.spec(name), self.base.spec(target)
        if found.shape != wanted.shape or not DTYPES[found.dtype].floating:
            raise BadInputError(
                f"{self.folder}: {name} is {found.dtype} {list(found.shape)} and cannot replace {target} of "
                f"{self.location}, {list(wanted.shape)}"
            )
        self._replaced[target] = name

    def _target(self, name: str, target: str) -> str:
        if target not in self.base.names():
            raise BadInputError(
                f"{self.folder}: {name} matches no tensor of {self.location}; was the adapter trained on another model?"
            )
        if not DTYPES[self.base.spec(target).dtype].floating:
            raise BadInputError(f"{self.location}: {target} holds no floating-point weights to merge with")
        tied = self.base.config.get("tie_word_embeddings") and "lm_head.weight" not in self.base.names()
        if tied and "embed" in target:
            raise UnsupportedError(
                f"{self.folder}: {name} changes the embedding, which is also the head of {self.location}; untie them"
            )
        return target

    def _matrix(self, name: str) -> tuple[int, int]:
        spec = self._adapter.spec(name)
        if len(spec.shape) != 2 or spec.dtype not in DTYPES or not DTYPES[spec.dtype].floating:
            raise BadInputError(f"{self.folder}: {name} is {spec.dtype} {list(spec.shape)}, not a matrix of weights")
        return spec.shape[0], spec.shape[1]


def _settings(folder: Path) -> Mapping[str, Any]:
    """The adapter's config. Raises UnsupportedError for what is more than a sum of low rank."""
    path = folder / CONFIG
    try:
        data = path.read_bytes() if path.stat().st_size <= 1 << 20 else b""
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read: {error.strerror}; is this the folder of an adapter?") from None
    settings = parse_json(data, str(path))
    if settings.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA is merged")
    if settings.get("bias", "none") != "none":
        raise UnsupportedError(f"{path}: bias is {settings['bias']!r}; only adapters without trained biases are merged")
    begun = settings.get("init_lora_weights", True)
    if begun not in INNOCENT:
        raise UnsupportedError(
            f"{path}: init_lora_weights is {begun!r}, for which the base was changed, too; save it as plain LoRA first "
            "(path_initial_model_for_weight_conversion)"
        )
    for key, value in settings.items():
        if key not in HARMLESS and value:
            raise UnsupportedError(f"{path}: {key} is {value!r}, which may change what is computed and is not merged")
    for key in ("r", "lora_alpha"):
        _expect_positive(settings.get(key, 8), f"{path}: {key}")
    for key in ("rank_pattern", "alpha_pattern"):
        table = settings.get(key) or {}
        if not isinstance(table, dict):
            raise BadInputError(f"{path}: {key} is not an object")
        for pattern, value in table.items():
            _expect_positive(value, f"{path}: {key} of {pattern!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadInputError(f"{path}: {key}: {pattern!r} is not a pattern: {error}") from None
    return settings


def _expect_positive(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise BadInputError(f"{what} is {value!r}, not a number above 0")


def _pattern_value(settings: Mapping[str, Any], table: str, path: str, usual: Any) -> Any:
    """What the first pattern says that matches the whole path or its end, as peft's get_pattern_key finds it."""
    for pattern, value in (settings.get(table) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return usual


def with_adapter(base: Checkpoint, folder: str | Path | None) -> Checkpoint:
    """`base` with the adapter in `folder`, if there is one."""
    return base if folder is None else Merged(base, Path(folder))
