"""What every folder that is read as the model it stands for has in common: its texts are those of that model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.formats.folder.config import CONFIG, without_settings


@dataclass(frozen=True, eq=False)
class StoredFolder:
    """`stored` is the folder as it is on disk. Subclasses say which tensors it stands for."""

    stored: Checkpoint

    @property
    def location(self) -> str:
        return self.stored.location

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return without_settings(self.stored.config)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.stored.metadata

    def text_file(self, name: str) -> bytes | None:
        """The folder's own, config.json as it was before anything was quantized."""
        if name == CONFIG:
            return json.dumps(self.config, indent=2, ensure_ascii=False).encode()
        return self.stored.text_file(name)
