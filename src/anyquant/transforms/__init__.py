"""One transform, one file: rewrites folded into the weights before they are quantized. Loaded by name when used."""

from anyquant.core.registry import Registry
from anyquant.transforms.base import Transform

_FILES = {"fold_norms": "fold", "rotate": "rotate", "permute": "permute", "smoothquant": "smooth", "awq": "awq"}

TRANSFORMS: Registry[Transform] = Registry(
    "transform", {name: f"anyquant.transforms.{file}:TRANSFORM" for name, file in _FILES.items()}, "anyquant.transforms"
)
