"""The column loops of the algorithms, compiled by Numba on first use."""

from numba import njit


def _probe() -> None:
    """A function that is never compiled."""


def _can_cache() -> bool:
    """Whether Numba has a place for compiled code, beside its source or in the user's cache folder."""
    try:
        njit(cache=True)(_probe)
    except RuntimeError:
        return False
    return True


CACHE = _can_cache()
