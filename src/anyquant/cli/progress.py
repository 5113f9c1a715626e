"""Progress on a terminal: a bar with rate and time left; without a terminal, a line now and then and at the end."""

import time
from threading import Lock
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

UNITS = {"w": "weights", "t": "tokens"}
EVERY = 30.0  # seconds between lines where there is no terminal


def rate_text(rate: float, unit: str) -> str:
    """ "12.3 M weights/s"."""
    for scale, prefix in ((1e9, "G "), (1e6, "M "), (1e3, "k ")):
        if rate >= scale:
            return f"{rate / scale:.1f} {prefix}{UNITS.get(unit, unit)}/s"
    return f"{rate:.0f} {UNITS.get(unit, unit)}/s"


def time_text(seconds: float) -> str:
    """ "1:02:03", "2:03"."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


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
        self._done, self._told, self._where, self._lock = 0.0, 0.0, "", Lock()

    def __enter__(self) -> "TerminalProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def start(self, task: str, total: float, unit: str) -> None:
        self.finish()
        self._name, self._unit, self._total, self._began = task, unit, total, time.monotonic()
        self._done, self._told, self._where = 0.0, self._began, ""
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(32, complete_style="cyan", finished_style="cyan"),
                TextColumn("{task.percentage:>3.0f} %"),
                _Rate(),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]{task.fields[where]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(task, total=total, unit=unit, where="")
            self._bar.start()

    def advance(self, amount: float) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, amount)
            return
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now - self._told >= EVERY:
                self._told = now
                self._tell(now - self._began)

    def place(self, where: str) -> None:
        self._where = where
        if self._bar is not None:
            self._bar.update(self._task, where=where)

    def _tell(self, seconds: float) -> None:
        """A line for a log: how far, how fast, how long still."""
        left = seconds * (self._total / self._done - 1) if self._done else 0.0
        parts = [f"{self._name:<12} {100 * self._done / max(self._total, 1e-9):3.0f} %"]
        parts += [rate_text(self._done / seconds, self._unit), f"{time_text(max(left, 0.0))} left", self._where]
        self._console.print(f"[dim]{'  '.join(filter(None, parts))}[/]")

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
