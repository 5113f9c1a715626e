"""Options of algorithms and transforms: named values with defaults whose types are binding."""

from collections.abc import Mapping
from typing import Any

from anyquant.core.errors import UsageError
from anyquant.core.registry import suggest

WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def complete_options(owner: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` updated by `given`; `owner`, an algorithm or transform, is named in messages.

    Raises UsageError for a name without a default, or a value of another type.
    """
    for name, value in given.items():
        if name not in defaults:
            advice = suggest(name, list(defaults)) if defaults else "it takes none"
            raise UsageError(f"{owner} has no option {name!r}; {advice}")
        wanted = type(defaults[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise UsageError(f"{owner}: option {name} is {value!r}, expected {WORDS.get(wanted, wanted.__name__)}")
    return {**defaults, **given}
