"""Formats: how a quantized model lies on disk, one folder each, found by name and loaded when used."""

from anyquant.core.registry import Registry
from anyquant.formats.base import Format, Rules

FORMATS: Registry[Format] = Registry(
    "format",
    {
        "gguf": "anyquant.formats.gguf.format:FORMAT",
        "compressed-tensors": "anyquant.formats.compressed_tensors.scheme:FORMAT",
        "bitsandbytes": "anyquant.formats.bitsandbytes.scheme:FORMAT",
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
