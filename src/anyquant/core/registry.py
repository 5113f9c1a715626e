"""Names to objects, loaded when used, so that `import anyquant` stays light.

A built-in is written as "module:attribute"; third parties add to a registry through an entry-point group of the same
name (`anyquant.grids`, `anyquant.algorithms`, `anyquant.formats`, `anyquant.runtimes`, `anyquant.evaluators`).
"""

import difflib
import importlib
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from anyquant.core.errors import UsageError

T = TypeVar("T")


MOST_LISTED = 24  # names in one line


def suggest(name: str, known: list[str]) -> str:
    """A clause for an error message: names that begin so, else those nearest to a mistyped one, or what is known."""
    begun = [one for one in known if name and one.lower().startswith(name.lower())][:3]
    near = begun or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    listed = sorted(known)
    more = f" and {len(listed) - MOST_LISTED} more" if len(listed) > MOST_LISTED else ""
    return f"known: {', '.join(listed[:MOST_LISTED])}{more}"


class Registry(Generic[T]):
    """`kind` is the noun used in messages, `builtin` maps a name to "module:attribute"."""

    def __init__(self, kind: str, builtin: Mapping[str, str], group: str) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._loaded: dict[str, T] = {}

    def names(self) -> list[str]:
        """Built-in names, then those of installed plug-ins."""
        return sorted({*self._builtin, *self._plugged})

    @cached_property
    def _plugged(self) -> tuple[str, ...]:
        """Finding them reads the metadata of everything that is installed: once is enough for a process."""
        return tuple(point.name for point in entry_points(group=self.group))

    def get(self, name: str) -> T:
        """The object registered as `name`. Raises UsageError with the nearest names when there is none."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> T:
        if name in self._builtin:
            module, attribute = self._builtin[name].split(":")
            loaded: T = getattr(importlib.import_module(module), attribute)
            return loaded
        for point in entry_points(group=self.group, name=name):
            plugged: T = point.load()
            return plugged
        raise UsageError(f"unknown {self.kind} {name!r}; {suggest(name, self.names())}")
