"""Progress: where long work says how far it is. The sink is passed in; nobody below the command line prints."""

from typing import Protocol


class Progress(Protocol):
    def start(self, task: str, total: float, unit: str) -> None:
        """A task of `total` units ("weights", "tokens" ...) begins."""
        ...

    def advance(self, amount: float) -> None:
        """`amount` more units of the current task are done. Called from any thread."""
        ...

    def place(self, where: str) -> None:
        """Where the current task is: "block 3 of 32"."""
        ...

    def finish(self) -> None:
        """The current task is done."""
        ...

    def say(self, message: str) -> None:
        """One line a person should read."""
        ...


class Silent:
    """The sink that shows nothing."""

    def start(self, task: str, total: float, unit: str) -> None:
        return

    def advance(self, amount: float) -> None:
        return

    def place(self, where: str) -> None:
        return

    def finish(self) -> None:
        return

    def say(self, message: str) -> None:
        return
