"""Every flag that says how good, several at once, and the certificate that comes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from anyquant.contract import metrics
from anyquant.core.registry import Registry
from anyquant.store.manifest import MANIFEST
from cli.conftest import Call
from support.plugin import install

Model = Callable[[str], Path]
SHORT = ("--context", "64", "--tokens", "512", "--threads", "1", "-q")
METRIC = "def items(session, split):\n    return [len(session.tokenize('the model' * n)) for n in range(1, 41)]\n"


def test_all_limits_at_once(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METRIC)
    out, source = tmp_path / "out", model("qwen2")
    metric = f"{tmp_path}/mine.py:items:higher"
    limits = ("--quality", "balanced", "--max-ppl-increase", "0.5", "--min-same-top", "0.8", "--max-size", "40bpw")
    job = ("make", source, "--for", "llama.cpp", "--preset", "F16", *limits, "--max-drop", f"{metric}=20%")
    made = call(*job, "--text", text, *SHORT, "-o", out)
    assert made.code == 0, made.err
    report = json.loads((out / "report.json").read_text())
    assert report["contract"].keys() == {"max_kl", "max_ppl_increase", "min_same_top", "max_size", "max_drop"}
    assert report["contract"]["max_size"] == 40 * report["weights"] // 8
    assert report["contract"]["max_drop"] == {metric: "20%"}

    shown = call("inspect", out)
    assert "certificate" in shown.out and "pass; max_kl=0.011" in " ".join(shown.out.split())
    sealed = json.loads(call("inspect", out, "--json").out)["certificate"]
    assert sealed["mean_kl"] == report["loss"]["mean_kl"][0]

    again = call("evaluate", out, "--against", source, "-q")
    assert again.code == 0, again.err + again.out
    assert "reproduced: " in again.out
    elsewhere = call("evaluate", out, "--against", source, "--tokens", "600", "--context", "64", "-q")
    assert elsewhere.code == 0 and "certificate" not in elsewhere.out
    refused = call("evaluate", out, "--against", source, "--certificate", "--context", "64", "-q")
    assert refused.code == 2 and "leave out --context" in refused.err

    # another contract beside the same artifact
    report["contract"]["max_kl"] = 5.0
    (out / "report.json").write_text(json.dumps(report))
    (out / MANIFEST).unlink()
    told = call("evaluate", out, "--against", source, "--json", "-q")
    assert told.code == 3
    assert not json.loads(told.out)["reproduced"] and json.loads(told.out)["differences"][0].startswith("limit is")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--quality", "strict", "--max-kl", "0.1"), "--quality strict means --max-kl 0.0055"),
        (("--max-kl", "0"), "nearest limit that can be judged is 1e-06"),
        (("--max-kl-99-9", "nan"), "--max-kl-99-9 is nan"),
        (("--max-size", "4.6"), "which unit is meant"),
        (("--max-size", "small"), "--max-size small"),
        (("--max-drop", "mine.py:f=0.1"), "saying which direction is better"),
        (("--max-drop", "nowhere.py:f:higher=0.1"), "there is no file nowhere.py"),
        (("--max-drop", "json:dumps:higher=0.1", "--max-drop", "json:dumps:higher=0.2"), "given twice"),
    ],
)
def test_limits_that_make_no_sense(call: Call, model: Model, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    made = call("make", model("qwen2"), "--for", "llama.cpp", "--preset", "F16", *flags, *SHORT, "-o", tmp_path / "out")
    assert made.code == 2 and said in made.err, made.err
    assert made.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_evaluator_that_a_package_registers(
    call: Call, model: Model, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "counting_items", metrics.EVALUATORS.group, {"third-party.items": "items"}, METRIC)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(metrics, "EVALUATORS", Registry("evaluator", {}, metrics.EVALUATORS.group))
    job = ("make", model("qwen2"), "--for", "llama.cpp", "--preset", "F16", "--text", text, *SHORT)
    made = call(*job, "--max-drop", "third-party.items:higher=20%", "-o", tmp_path / "out")
    assert made.code == 0, made.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["contract"] == {
        "max_drop": {"third-party.items:higher": "20%"}
    }
    refused = call(*job, "--max-drop", "other:higher=20%", "-o", tmp_path / "none")
    assert refused.code == 2 and "known: third-party.items" in refused.err and refused.err.count("\n") == 1


def test_a_metric_needs_something_that_runs_the_artifact(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METRIC)
    drop = f"{tmp_path}/mine.py:items:higher=1%"
    job = ("make", model("qwen2"), "--grid", "int8-g128", "--max-drop", drop, "--text", text)
    made = call(*job, *SHORT, "-o", tmp_path / "out")
    assert made.code == 2 and "name a target with --for" in made.err, made.err
