"""Formats: how a quantized model lies on disk, one folder each, found by name and loaded when used."""

from collections.abc import Mapping
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UnsupportedError
from anyquant.core.registry import Registry
from anyquant.formats.base import Format, Rules
from anyquant.formats.folder.config import SETTINGS
from anyquant.formats.folder.format import FolderFormat

FORMATS: Registry[Format] = Registry(
    "format",
    {
        "gguf": "anyquant.formats.gguf.format:FORMAT",
        "compressed-tensors": "anyquant.formats.compressed_tensors.scheme:FORMAT",
        "auto-round": "anyquant.formats.autoround.scheme:FORMAT",
        "awq": "anyquant.formats.awq.scheme:FORMAT",
        "gptq": "anyquant.formats.gptq.scheme:FORMAT",
        "modelopt": "anyquant.formats.modelopt.scheme:FORMAT",
        "quark": "anyquant.formats.quark.scheme:FORMAT",
        "fp8": "anyquant.formats.fp8.scheme:FORMAT",
        "mlx": "anyquant.formats.mlx.scheme:FORMAT",
        "bitsandbytes": "anyquant.formats.bitsandbytes.scheme:FORMAT",
        "torchao": "anyquant.formats.torchao.scheme:FORMAT",
        "hqq": "anyquant.formats.hqq.scheme:FORMAT",
    },
    "anyquant.formats",
)

STATE = "state"


def rules(name: str) -> Rules:
    """What can be planned for: any format, or the neutral state ("state"), which `store.state` writes."""
    if name == STATE:
        from anyquant.formats.state import RULES

        return RULES
    return FORMATS.get(name)


def folder_format(config: Mapping[str, Any], where: str) -> FolderFormat | None:
    """The format of a Hugging Face folder by its config.json; None where nothing in it is quantized.

    Raises UnsupportedError for a way of quantizing that no format reads.
    """
    if not any(config.get(key) for key in SETTINGS):
        return None
    formats = [FORMATS.get(name) for name in FORMATS.names()]
    folders = [one for one in formats if isinstance(one, FolderFormat)]
    found = next((one for one in folders if one.claims(config)), None)
    if found is None:
        settings = next(config[key] for key in SETTINGS if config.get(key))
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        known = ", ".join(one.name for one in folders)
        raise UnsupportedError(f"{where}: quantization method {method!r} is not read; known: {known}")
    return found


def as_model(stored: Checkpoint) -> Checkpoint:
    """A quantized folder as the model that it stands for, decoded as it is read; any other checkpoint as it is.

    Raises as `folder_format`, and BadInputError where settings and tensors contradict each other.
    """
    form = folder_format(stored.config, stored.location)
    if form is None:
        return stored
    found = form.read(stored)
    _ = found.modules  # contradictions are told now, not in the middle of the work
    return found
