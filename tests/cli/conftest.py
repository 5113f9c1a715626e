"""The command line as a function, and small models for it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from anyquant.cli.main import main
from support.checkpoints import make_checkpoint

WORDS = "the model reads a block of rows and writes it to its place where nothing else stays in memory at all".split()  # noqa: SIM905


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`anyquant` with these arguments, in this process."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["anyquant", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small checkpoint of a family; read only."""
    base = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        folder = base / family
        if not folder.exists():
            make_checkpoint(folder, family, shard_bytes=2_000_000 if family == "mistral" else None)
        return folder

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough words for three splits of short documents."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(0).choice(WORDS, 6000)
    path.write_text("\n".join(" ".join(words[start : start + 12]) for start in range(0, len(words), 12)))
    return path
