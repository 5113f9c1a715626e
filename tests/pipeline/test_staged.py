"""Staged runs: each block calibrated behind the quantized ones, resumed to the same bytes whenever it is killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anyquant import api
from anyquant.core.errors import BadInputError, OutputError, UnsupportedError
from anyquant.pipeline.recipe import Calibration, Recipe
from support.checkpoints import make_checkpoint
from support.jobs import job_of

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "some",
    "other",
    "small",
    "grey",
    "cats",
    "run",
    "over",
    "many",
    "long",
    "red",
    "roofs",
    "at",
    "night",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.choice(WORDS, 12000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_checkpoint(folder, "llama")
    return folder


def recipe(text: Path, **keywords: object) -> Recipe:
    return Recipe(calibration=Calibration(text=str(text), tokens=1024, context=64), **keywords)  # type: ignore[arg-type]


def digest(folder: Path) -> dict[str, str]:
    """Everything but the report, which says how long it took."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(("report.", "anyquant-manifest", ".lock", "manifest"))
    }


@pytest.mark.parametrize("target", [None, "llama.cpp"])
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(
    llama: Path, text: Path, tmp_path: Path, target: str | None
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom anyquant import api\n"
        "from anyquant.pipeline.recipe import Calibration, Recipe\n"
        "llama, text, out, target, grid = sys.argv[1:]\n"
        "calibration = Calibration(text=text, tokens=1024, context=64)\n"
        "api.make(llama, out=out, target=target or None, threads=1,\n"
        "         recipe=Recipe(grid=grid, algorithm='gptq', calibration=calibration))\n"
    )
    grid = "int4-g32" if target is None else "q4_0"

    def start(out: Path) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, str(script), str(llama), str(text), str(out), target or "", grid]
        return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "whole").wait(240) == 0
    expected = digest(tmp_path / "whole")
    kills = 0
    for needed in ("stage-0.json", "stage-1.json"):
        run = start(tmp_path / "killed")
        work = tmp_path / ".killed.work"
        while run.poll() is None and not list(work.glob(f"*/{needed}")):
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed").exists() or not kills
    assert kills
    assert start(tmp_path / "killed").wait(240) == 0
    assert digest(tmp_path / "killed") == expected
    assert not (tmp_path / ".killed.work").exists()


def test_another_recipe_begins_anew(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyquant.pipeline import staged

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staged.Stages, "_edges", stop)
        with pytest.raises(KeyboardInterrupt):
            api.make(llama, out=tmp_path / "out", recipe=recipe(text, grid="int4-g32", algorithm="gptq"), threads=1)
        assert len(list(tmp_path.glob(".out.work/*/stage-1.json"))) == 1
        with pytest.raises(KeyboardInterrupt):  # a slip of the pen does not cost what the first run has done
            api.make(llama, out=tmp_path / "out", recipe=recipe(text, grid="int2-g32", algorithm="gptq"), threads=1)
    assert len(list(tmp_path.glob(".out.work/*/stage-1.json"))) == 2
    api.make(llama, out=tmp_path / "out", recipe=recipe(text, grid="int3-g32", algorithm="gptq"), threads=1)
    whole = tmp_path / "whole"
    api.make(llama, out=whole, recipe=recipe(text, grid="int3-g32", algorithm="gptq"), threads=1)
    assert digest(tmp_path / "out") == digest(whole) and not list(tmp_path.glob(".out.work"))


@pytest.mark.parametrize(
    ("error", "finished", "kept"),
    [
        (KeyboardInterrupt, True, True),
        (KeyboardInterrupt, False, False),
        (OutputError, True, True),
        (BadInputError, True, False),
        (UnsupportedError, False, False),
    ],
)
def test_work_stays_only_where_the_same_command_can_go_on(
    llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    finished: bool,
    kept: bool,
) -> None:
    from anyquant.pipeline import staged

    def stop(*_: object) -> None:
        raise error("here")

    strange = tmp_path / ".out.work" / "of another run"
    strange.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(staged.Stages, "_edges" if finished else "run", stop)
        with pytest.raises(error):
            api.make(llama, out=tmp_path / "out", recipe=recipe(text, grid="int4-g32", algorithm="gptq"), threads=1)
    assert bool(list(tmp_path.glob(".out.work/*/stage-1.json"))) == kept
    assert strange.is_dir() and len(list(strange.parent.iterdir())) == 1 + kept
    if kept:
        return
    strange.rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(staged.Stages, "run", stop)
        with pytest.raises(error):
            api.make(llama, out=tmp_path / "out", recipe=recipe(text, grid="int4-g32", algorithm="gptq"), threads=1)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("damaged", ["states-1.bin", "stage-1.npz", "stage-0.json"])
def test_a_damaged_work_folder_is_made_again(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    from anyquant.pipeline import staged

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    wish = recipe(text, grid="int4-g32", algorithm="gptq")
    with monkeypatch.context() as patch:
        patch.setattr(staged.Stages, "_edges", stop)
        with pytest.raises(KeyboardInterrupt):
            api.make(llama, out=tmp_path / "out", recipe=wish, threads=1)
    (path,) = tmp_path.glob(f".out.work/*/{damaged}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    api.make(llama, out=tmp_path / "out", recipe=wish, threads=1)
    api.make(llama, out=tmp_path / "whole", recipe=wish, threads=1)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_run_of_other_code_or_for_another_target_begins_anew(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages that are recorded are taken over as they are, so all that they follow from tells runs apart."""
    from anyquant.pipeline import quantized

    job, other = (job_of(llama, target, True, grid="int4-g32") for target in ("state", "compressed-tensors"))
    found = [quantized._identity(job, [], {}), quantized._identity(other, [], {})]
    monkeypatch.setattr(quantized, "CODE_VERSION", "another")
    found.append(quantized._identity(job, [], {}))
    assert len({str(identity) for identity in found}) == 3


def test_gptq_loses_less_than_rounding_in_the_runtime(tmp_path: Path) -> None:
    """On the built-in model, at three bits, both judged by llama.cpp on the same text."""
    losses = {}
    for algorithm in ("rtn", "gptq"):
        wish = Recipe(grid="q3_k", algorithm=algorithm)
        report = api.make("demo", out=tmp_path / algorithm, target="llama.cpp", recipe=wish, threads=2)
        assert report.loss is not None
        losses[algorithm] = report.loss.mean_kl[0]
    assert losses["gptq"] < 0.8 * losses["rtn"]
