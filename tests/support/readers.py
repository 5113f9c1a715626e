"""Readers that live in environments of their own: tests/readers/<name>, built under .readers/ by `make readers`."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).parent.parent.parent


def python_of(name: str) -> Path:
    """The interpreter of a reader's environment. Skips the test where it is not built."""
    found = ROOT / ".readers" / name
    if not (found / ".installed").exists():
        pytest.skip(f"not verified in {name}: run make readers")
    return found / "bin" / "python"


def run(name: str, script: str, *arguments: str | Path) -> str:
    """Run tests/readers/<name>/<script> there. Raises RuntimeError with the end of what it printed."""
    # its packages are those of the environment alone
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python_of(name)), str(ROOT / "tests" / "readers" / name / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}/{script} failed: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def read(name: str, out: Path, folders: Sequence[Path], *options: str) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """What the reader found in each folder, by the folder's name."""
    out.mkdir(parents=True)
    run(name, "read.py", out, *folders, *options)
    found = {}
    for folder in folders:
        with np.load(out / f"{folder.name}.npz") as arrays:
            found[folder.name] = {key: arrays[key] for key in arrays.files}
    return found
