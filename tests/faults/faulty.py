"""Storage systems that fail, shorten or kill at the N-th call."""

import os
import signal
from collections.abc import Callable
from typing import Any

from anyquant.store.system import System

CALLS = [name for name, value in vars(System).items() if callable(value) and not name.startswith("_")]


class Counting(System):
    """Counts calls; `self.calls` lists their names in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, name: str) -> None:
        self.calls.append(name)

    def after(self, name: str) -> None:
        return


class Failing(Counting):
    """The call with index `number` (from 0), and it alone, raises OSError(code)."""

    def __init__(self, number: int, code: int) -> None:
        super().__init__()
        self.number, self.code = number, code

    def before(self, name: str) -> None:
        super().before(name)
        if len(self.calls) == self.number + 1:
            raise OSError(self.code, os.strerror(self.code))

    @property
    def failed(self) -> bool:
        return len(self.calls) > self.number


class Broken(Failing):
    """The call with index `number` and all after it fail: the device is gone."""

    def before(self, name: str) -> None:
        Counting.before(self, name)
        if self.failed:
            raise OSError(self.code, os.strerror(self.code))


class Killed(Counting):
    """The process dies without a trace right before or right after the call with index `number`."""

    def __init__(self, number: int, late: bool) -> None:
        super().__init__()
        self.number, self.late = number, late

    def before(self, name: str) -> None:
        super().before(name)
        if not self.late and len(self.calls) == self.number + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(self, name: str) -> None:
        if self.late and len(self.calls) == self.number + 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Short(Counting):
    """Every read and write moves one byte only."""

    def pread(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        return super().pread(descriptor, buffer[:1], offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        return super().pwrite(descriptor, data[:1], offset)


class Unsynced(System):
    """fsync does nothing: what it protects from, a power loss, is not simulated here, and it takes most of the time."""

    def fsync(self, descriptor: int) -> None:
        return


def _counted(name: str) -> Callable[..., Any]:
    original = getattr(Unsynced, name)

    def call(self: Counting, *arguments: Any) -> Any:
        try:
            self.before(name)
        except OSError:
            if name == "close":  # Linux frees the descriptor even when close reports an error
                original(self, *arguments)
            raise
        try:
            return original(self, *arguments)
        finally:
            self.after(name)

    return call


for _name in CALLS:
    setattr(Counting, _name, _counted(_name))


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
