"""Folders that no engine here reads: run and measured by their decoded weights, where that is what the engine does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Call

Model = Callable[[str], Path]
FAMILY = "llama"
SHORT = ("--context", "64", "--tokens", "2048", "--threads", "1", "-q")


@pytest.mark.parametrize("target", ["gptq", "awq", "auto-round", "hqq"])
def test_what_no_engine_here_reads_is_run_by_its_decoded_weights(
    call: Call, model: Model, text: Path, tmp_path: Path, target: str
) -> None:
    out, source = tmp_path / "out", model(FAMILY)
    made = call("make", source, "--for", target, "--grid", "int4-g32-f16", "--text", text, *SHORT, "-o", out)
    assert made.code == 0, made.err
    again = call("evaluate", out, "--against", source)
    assert again.code == 0, again.err
    assert "reproduced: " in again.out and f"no engine here reads {target} folders" in again.err
    counts = [json.loads(call("inspect", path, "--json").out)["weights"] for path in (source, out)]
    assert counts[0] == counts[1]
    spoken = call("run", out, "the model", "--tokens", "4")
    assert spoken.code == 0 and spoken.out.startswith("the model")
    assert "decoded weights" in spoken.err


def test_engines_that_round_inputs_have_no_stand_in(call: Call, model: Model, tmp_path: Path) -> None:
    made = call("make", model(FAMILY), "--for", "quark", "--preset", "FP8", "--data-free", "-q", "-o", tmp_path / "out")
    assert made.code == 0, made.err
    spoken = call("run", tmp_path / "out", "the model")
    assert (spoken.code, spoken.out) == (6, "") and "quark round what enters matrices" in spoken.err
