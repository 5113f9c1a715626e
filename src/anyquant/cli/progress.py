"""Progress on a terminal: a bar with rate and time left; without a terminal, one line when a task ends."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

UNITS = {"w": "weights", "t": "tokens"}


def rate_text(rate: float, unit: str) -> str:
    """ "12.3 M weights/s"."""
    for scale, prefix in ((1e9, "G "), (1e6, "M "), (1e3, "k ")):
        if rate >= scale:
            return f"{rate / scale:.1f} {prefix}{UNITS.get(unit, unit)}/s"
    return f"{rate:.0f} {UNITS.get(unit, unit)}/s"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else rate_text(speed, task.fields["unit"]), style="dim")


class TerminalProgress:
    """The sink that the command line passes to long work. Everything goes to standard error.

    `with TerminalProgress() as progress:` gives the terminal its cursor back, however the work ends.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._name, self._unit, self._total, self._began = "", "", 0.0, 0.0

    def __enter__(self) -> "TerminalProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def start(self, task: str, total: float, unit: str) -> None:
        self.finish()
        self._name, self._unit, self._total, self._began = task, unit, total, time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(32, complete_style="cyan", finished_style="cyan"),
                TextColumn("{task.percentage:>3.0f} %"),
                _Rate(),
                TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(task, total=total, unit=unit)
            self._bar.start()

    def advance(self, amount: float) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, amount)

    def finish(self) -> None:
        if not self._name:
            return
        self._stop_bar()
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._console.print(
            f"[dim]{self._name:<12} {seconds:6.1f} s  {rate_text(self._total / seconds, self._unit)}[/]"
        )
        self._name = ""

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, message: str) -> None:
        self._console.print(message, markup=False)
