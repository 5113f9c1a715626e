"""A checkpoint seen through changes: other config values, tensors added, removed or reshaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.dtypes import Bytes


@dataclass
class Altered:
    """`changes` replace config fields (None removes one), `tensors` replace specs (None removes a tensor)."""

    base: Checkpoint
    changes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorSpec | None] = field(default_factory=dict)
    location: str = "altered"

    @property
    def config(self) -> Mapping[str, Any]:
        merged = {**self.base.config, **self.changes}
        return {key: value for key, value in merged.items() if self.changes.get(key, 0) is not None}

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.base.metadata

    def names(self) -> Sequence[str]:
        removed = {name for name, spec in self.tensors.items() if spec is None}
        added = [name for name, spec in self.tensors.items() if spec is not None]
        return sorted({*self.base.names(), *added} - removed)

    def spec(self, name: str) -> TensorSpec:
        return self.tensors.get(name) or self.base.spec(name)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        self.base.read_into(name, start, stop, buffer)
