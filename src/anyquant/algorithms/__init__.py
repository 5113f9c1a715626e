"""One algorithm, one file: which value of a grid each weight takes. Loaded by name when used."""

from anyquant.algorithms.base import Algorithm
from anyquant.core.registry import Registry

ALGORITHMS: Registry[Algorithm] = Registry(
    "algorithm", {"rtn": "anyquant.algorithms.rtn:ALGORITHM"}, "anyquant.algorithms"
)
