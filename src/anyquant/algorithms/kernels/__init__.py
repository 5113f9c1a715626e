"""The column loops of the algorithms, compiled by Numba on first use."""

from anyquant.core.compiled import can_cache

CACHE = can_cache()
