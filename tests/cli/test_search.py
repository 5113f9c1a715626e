"""A contract decides what is made: the search, measured in llama.cpp itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyquant.store.gguf import GGUFFile
from cli.conftest import Call

Model = Callable[[str], Path]
SHORT = ("--for", "llama.cpp", "--context", "64", "--tokens", "512", "--threads", "1", "-q")
FAMILY = "qwen2"


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def size_of(call: Call, model: Path, preset: str) -> int:
    """Bytes of the artifact that a preset plans."""
    planned = call("plan", model, "--for", "llama.cpp", "--preset", preset, "--json")
    nbytes: int = json.loads(planned.out)["bytes"]
    return nbytes


def test_the_smallest_within_a_limit(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", model(FAMILY)
    # enough of *select* that its standard errors can be relied on: of 8 documents they were a third of what they are
    limits = ("--max-kl", "0.3", "--tokens", "4096")
    made = call("make", source, *SHORT, *limits, "--algorithm", "rtn", "--text", text, "-o", out)
    report = report_of(out)
    assert (made.code, report["status"]) == (0, "pass"), made.err
    tries, (last,) = [p for p in report["points"] if not p["chosen"]], [p for p in report["points"] if p["chosen"]]
    assert 1 < len(tries) <= 12
    assert last["nbytes"] == report["nbytes"] == (out / "model.gguf").stat().st_size
    # some smaller one was tried and was worse, so this is not just any that passes
    assert any(one["nbytes"] < last["nbytes"] for one in tries)
    assert last["nbytes"] < size_of(call, source, "Q8_0")
    assert len({line["applied"] for line in report["ledger"]["lines"] if line["role"] != "embedding"}) > 1
    again = call("evaluate", out, "--against", source, "--text", text, "--threads", "1", "-q")
    assert again.code == 0, again.err


def test_the_best_within_bytes_is_never_larger(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    source, losses = model(FAMILY), []
    for preset in ("Q3_K_M", "Q5_K_M"):
        out, limit = tmp_path / preset, size_of(call, model(FAMILY), preset)
        made = call("make", source, *SHORT, "--max-size", f"{limit}B", "--algorithm", "rtn", "--text", text, "-o", out)
        report = report_of(out)
        assert (made.code, report["status"]) == (0, "pass"), made.err
        assert report["nbytes"] <= limit
        losses.append(report["loss"]["mean_kl"][0])
    assert losses[1] < losses[0]


def test_error_feedback_is_measured_before_it_is_used(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    """Its first two measurements are one plan, rounded and with error feedback; the better one goes on."""
    out = tmp_path / "out"
    limit = size_of(call, model(FAMILY), "Q4_K_M")
    made = call("make", model(FAMILY), *SHORT, "--max-size", f"{limit}B", "--text", text, "-o", out)
    assert made.code == 0, made.err
    report = report_of(out)
    rounded, fed_back, *_ = report["points"]
    assert rounded["detail"].removeprefix("rtn") == fed_back["detail"].removeprefix("gptq; rtn")
    assert 0.98 * limit < rounded["nbytes"] <= limit  # a search that ends here has used its bytes
    used = "gptq" in {line["algorithm"] for line in report["ledger"]["lines"]}
    assert used == (fed_back["kl"] < 0.95 * rounded["kl"])
    # what was found is a recipe: made again from it, the tensors are the same
    recipe = {key: value for key, value in report["recipe"].items() if value not in (None, {}, [])}
    path = tmp_path / "recipe.toml"
    path.write_text(toml(recipe))
    again = tmp_path / "again"
    assert (
        call("make", model(FAMILY), "--for", "llama.cpp", "--recipe", path, "--threads", "1", "-q", "-o", again).code
        == 0
    )
    first, second = GGUFFile(out / "model.gguf"), GGUFFile(again / "model.gguf")
    assert first.metadata["anyquant.contract.tensor_sha256"] == second.metadata["anyquant.contract.tensor_sha256"]


def toml(recipe: dict[str, Any]) -> str:
    """A recipe of a report as a file."""
    lines = [f"version = {recipe['version']}"]
    for rule in recipe["rules"]:
        lines.append("[[rule]]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in rule.items() if value not in (None, {}, "")]
    lines.append("[calibration]")
    lines += [f"{key} = {json.dumps(value)}" for key, value in recipe["calibration"].items() if value is not None]
    return "\n".join(lines)


def test_what_is_pinned_stays(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pins = ("--pin", "attn_v=q8_0", "--pin", "blocks.0.ffn_*=q5_k", "--embedding", "q6_k")
    made = call(
        "make", model(FAMILY), *SHORT, "--max-size", "6bpw", *pins, "--algorithm", "rtn", "--text", text, "-o", out
    )
    assert made.code == 0, made.err
    grids = {line["name"]: line["applied"] for line in report_of(out)["ledger"]["lines"]}
    assert {grid for name, grid in grids.items() if name.endswith("attn_v")} == {"q8_0"}
    assert {grid for name, grid in grids.items() if name.startswith("blocks.0.ffn_") and "norm" not in name} == {"q5_k"}
    assert grids["embedding"] == "q6_k"


def test_a_pin_holds_for_the_whole_tensor(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    """Phi-3 stores queries, keys and values as one."""
    out, flags = tmp_path / "out", ("--max-size", "6bpw", "--pin", "attn_q=q8_0", "--algorithm", "rtn")
    made = call("make", model("phi3"), *SHORT, *flags, "--text", text, "-o", out)
    assert made.code == 0, made.err
    grids = {line["name"]: line["applied"] for line in report_of(out)["ledger"]["lines"]}
    assert {grid for name, grid in grids.items() if name.endswith(("attn_q", "attn_k", "attn_v"))} == {"q8_0"}


def test_saved_sensitivities_are_used(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "saved.json", tmp_path / "out"
    assert call("sensitivity", model(FAMILY), *SHORT, "--text", text, "--save", saved).code == 0
    before = saved.read_bytes()
    flags = ("--max-size", "6bpw", "--algorithm", "rtn", "--budget", "0.0001")
    made = call("make", model(FAMILY), *SHORT[:-1], *flags, "--sensitivity", saved, "--text", text, "-o", out)
    assert made.code == 0, made.err
    assert saved.read_bytes() == before
    # what is announced is what is done
    assert f"sensitivities from {saved}" in "".join(made.err.split("\n")) and "sensitivity pass" not in made.err
    fresh = call("make", model(FAMILY), *SHORT[:-1], *flags, "--text", text, "-o", tmp_path / "fresh")
    assert fresh.code == 0 and "one sensitivity pass" in fresh.err, fresh.err


def test_a_budget_that_is_over_at_once_still_gives_an_artifact(
    call: Call, model: Model, text: Path, tmp_path: Path
) -> None:
    """Measured once for a limit, not at all for a size, and certified both times."""
    source, size = model(FAMILY), size_of(call, model(FAMILY), "Q4_K_M")
    for name, limit, tries in (("loss", ("--max-kl", "0.3"), 1), ("size", ("--max-size", f"{size}B"), 0)):
        out = tmp_path / name
        made = call("make", source, *SHORT, *limit, "--budget", "0.0001", "--text", text, "-o", out)
        report = report_of(out)
        assert made.code == {"pass": 0, "fail": 3, "inconclusive": 4}[report["status"]], made.err
        assert [point["chosen"] for point in report["points"]] == [False] * tries + [True]
        assert report["nbytes"] == (out / "model.gguf").stat().st_size
        assert "gptq" not in {line["algorithm"] for line in report["ledger"]["lines"]}
    assert (report["status"], report["nbytes"] <= size) == ("pass", True)


def test_a_contract_that_nothing_keeps(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    """The format may hold the weights as they are, so only a limit on the size as well is out of reach."""
    out = tmp_path / "out"
    limits = ("--max-kl", "0.0001", "--max-size", "4bpw")
    made = call("make", model(FAMILY), *SHORT, *limits, "--algorithm", "rtn", "--text", text, "-o", out)
    assert made.code == 3, made.err
    report = report_of(out)
    assert report["status"] == "fail"
    assert "Nearest" in " ".join(report["sentences"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-size", "1000B"), "the smallest possible plan takes"),
        (("--max-size", "1000B", "--algorithm", "awq -> rtn"), "the smallest possible plan takes"),
        (("--max-size", 400 * "9" + "B"), "--max-size"),
        (("--max-size", "6bpw", "--pin", "attn_w=q8_0"), "--pin attn_w: matches no matrix"),
        (("--max-size", "6bpw", "--pin", "attn_v=q9"), "unknown grid 'q9'; gguf has, among others, iq2_s, "),
        (("--pin", "attn_v=q4k"), "unknown grid 'q4k'; did you mean"),
        (("--max-size", "6bpw", "--pin", "attn_v=q4k"), "unknown grid 'q4k'; did you mean q4_k"),
        (("--max-size", "6bpw", "--pin", "attn_v"), "NAME=GRID"),
        (("--max-kl", "0.1", "--budget", "0"), "--budget"),
        (("--preset", "Q4_K_M", "--pin", "attn_v=q8_0"), "--pin is for a search"),
        (("--preset", "Q4_K_M", "--budget", "5"), "--budget is for a search"),
    ],
)
def test_wrong_input(
    call: Call,
    model: Model,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr("anyquant.pipeline.make.load_splits", None)  # before any text is read
    made = call("make", model(FAMILY), *SHORT, *flags, "--text", text, "-o", tmp_path / "out")
    assert made.code == 2
    assert said in made.err
    assert made.err.count("\n") == 1 and len(made.err) < 600
    assert not list(tmp_path.iterdir())


def test_a_pin_that_the_target_cannot_hold(
    call: Call, model: Model, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyquant.pipeline.make.load_splits", None)
    flags = ("--max-kl", "0.1", "--pin", "attn_v=int4-g128")
    made = call("make", model(FAMILY), *SHORT, *flags, "--text", text, "-o", tmp_path / "out")
    assert made.code == 6 and "GGUF has no tensor type for grid 'int4-g128'" in made.err
    assert not list(tmp_path.iterdir())
