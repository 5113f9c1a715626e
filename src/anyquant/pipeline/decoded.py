"""A decoded artifact as a model: with the config and the tokenizer of the model that it was made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyquant.core.checkpoint import Checkpoint, TensorSpec
from anyquant.core.dtypes import Bytes
from anyquant.core.errors import UnsupportedError
from anyquant.core.qtensor import QTensor
from anyquant.core.quantized import QuantizedCheckpoint
from anyquant.formats import FORMATS
from anyquant.models.detect import detect


@dataclass(frozen=True, eq=False)
class DecodedSource:
    """The tensors of a decoded artifact with the config and the small files of the model it came from."""

    decoded: Checkpoint
    source: Checkpoint

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.decoded.metadata

    def text_file(self, name: str) -> bytes | None:
        return self.source.text_file(name)

    def names(self) -> Sequence[str]:
        return self.decoded.names()

    def spec(self, name: str) -> TensorSpec:
        return self.decoded.spec(name)

    def read_into(self, name: str, start: int, stop: int, buffer: Bytes) -> None:
        self.decoded.read_into(name, start, stop, buffer)

    def grid_of(self, tensor: str) -> str | None:
        """See core.quantized; None where the decoded artifact knows no codes."""
        return self.decoded.grid_of(tensor) if isinstance(self.decoded, QuantizedCheckpoint) else None

    def quantized_rows(self, tensor: str, start: int, stop: int) -> QTensor:
        """See core.quantized."""
        if not isinstance(self.decoded, QuantizedCheckpoint):
            raise UnsupportedError(f"{self.location}: {tensor} is not quantized")
        return self.decoded.quantized_rows(tensor, start, stop)


def gguf_model(file: Path, like: Checkpoint) -> Checkpoint:
    """A GGUF file as a model whose config and tokenizer are those of the folder `like`.

    Raises BadInputError when it was made from another model.
    """
    architecture = detect(like)
    return DecodedSource(FORMATS.get("gguf").open(file, architecture), like)
