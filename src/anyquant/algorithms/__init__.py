"""One algorithm, one file: which value of a grid each weight takes. Loaded by name when used."""

from anyquant.algorithms.base import Algorithm
from anyquant.core.registry import Registry

BUILTIN = ("rtn", "hqq", "gptq", "autoround", "codebook", "sparsegpt", "wanda", "magnitude", "lorc", "eora")

ALGORITHMS: Registry[Algorithm] = Registry(
    "algorithm", {name: f"anyquant.algorithms.{name}:ALGORITHM" for name in BUILTIN}, "anyquant.algorithms"
)
