"""Whether compiled code can be kept."""

from functools import cache

from anyquant.core.extras import require


def _probe() -> None:
    """A function that is never compiled."""


@cache
def can_cache() -> bool:
    """Whether Numba has a place for compiled code: beside its source, or in the user's cache folder.

    Where neither can be written (a container with a strange user id), every process compiles anew.
    """
    try:
        require("numba").njit(cache=True)(_probe)
    except RuntimeError:
        return False
    return True
