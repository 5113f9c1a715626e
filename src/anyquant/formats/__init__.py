"""Formats: how a quantized model lies on disk, one folder each, found by name and loaded when used."""

from anyquant.core.registry import Registry
from anyquant.formats.base import Format

FORMATS: Registry[Format] = Registry(
    "format",
    {
        "gguf": "anyquant.formats.gguf.format:FORMAT",
        "compressed-tensors": "anyquant.formats.compressed_tensors.format:FORMAT",
    },
    "anyquant.formats",
)
