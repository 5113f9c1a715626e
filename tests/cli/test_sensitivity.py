"""The verb on a small model, and what is wrong in one line before anything is calibrated."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Call

Model = Callable[[str], Path]


def test_the_map_is_printed_drawn_and_kept(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    saved, page = tmp_path / "saved.json", tmp_path / "page.html"
    arguments = ("sensitivity", model("llama"), "--for", "llama.cpp", "--text", text, "--candidates", "q4_k,q8_0")
    common = (*arguments, "--tokens", 2000, "--context", 64, "--save", saved, "-q")
    shown = call(*common, "--html", page)
    assert shown.code == 0, shown.err
    assert "most sensitive on q4_k" in shown.out and "attn_output" in shown.out and "█" in shown.out
    drawn = page.read_text()
    assert "<svg" in drawn and "http" not in drawn.replace("http-equiv", "")
    again = call(*common, "--json")
    assert json.loads(again.out)["portions"] == json.loads(saved.read_text())["portions"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--candidates", "q4_x"), 2, "q4_x"),
        (("--candidates", ","), 2, "--candidates"),
        (("--candidates", "int4-g128"), 6, "int4-g128"),
        (("--candidates", "q4_k", "--show", "q6_k"), 2, "--show q6_k"),
        (("--show", "q4_x"), 2, "--show q4_x is none of the candidates: "),
        (("--show", "int4-g128"), 2, "--show int4-g128 is none of the candidates: "),
        (("--method", "backward"), 2, "backward"),
        (("--save", "nowhere/saved.json"), 7, "nowhere"),
        (("--html", "nowhere/page.html"), 7, "nowhere"),
        (("--save", "damaged.json"), 5, "damaged.json"),
        (("--text", "missing.txt"), 5, "missing.txt"),
        (("--for", "nobody"), 2, "nobody"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    call: Call,
    model: Model,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anyquant.api.gather", None)  # before anything is calibrated
    Path("damaged.json").write_text('{"version": 1}')
    given = ("--for", "llama.cpp", "--text", text, *arguments)
    outcome = call("sensitivity", model("llama"), "-q", *given)
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("anyquant: ") and outcome.err.count("\n") == 1 and said in outcome.err
    assert len(outcome.err) < 400
    assert {path.name for path in tmp_path.iterdir()} == {"damaged.json"}
