"""The terminal is left as it was found."""

import pytest

from anyquant.cli.progress import TerminalProgress

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_cursor_comes_back_however_the_work_ends(
    error: type[BaseException] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take any stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    try:
        with TerminalProgress() as progress:
            progress.start("quantize", 10, "w")
            progress.advance(5)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    shown = capsys.readouterr().err
    assert HIDE in shown
    assert shown.rindex(SHOW) > shown.rindex(HIDE)
