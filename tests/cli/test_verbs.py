"""Every verb on a real model: made, planned, looked into, measured and run, with the real runtimes."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

import anyquant
from anyquant.cli.main import VERBS
from anyquant.store.manifest import read_manifest
from cli.conftest import Call

Model = Callable[[str], Path]
SHORT = ("--context", "64", "--tokens", "512", "--threads", "1", "-q")


def test_help_lists_the_verbs(call: Call) -> None:
    top = call("--help")
    assert top.code == 0
    for verb in VERBS:
        assert verb in top.out
        page = call(verb, "--help")
        assert page.code == 0
        assert "Usage" in page.out
    assert call("--version").out.startswith("anyquant")
    assert call().code == 2


def test_the_main_job(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    """Measured in llama.cpp, within a limit; then every other verb on what was made."""
    out = tmp_path / "out"
    source = model("llama")
    made = call(
        "make", source, "--for", "llama.cpp", "--preset", "F16", "--max-kl", "0.01", "--text", text, *SHORT, "-o", out
    )
    assert made.code == 0, made.err
    assert "pass" in made.out
    assert made.err == ""
    assert sorted(path.name for path in out.iterdir()) == [
        "anyquant-manifest.json",
        "model.gguf",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert read_manifest(out) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((out / "report.json").read_text())
    size = (out / "model.gguf").stat().st_size
    assert report["status"] == "pass"
    assert report["nbytes"] == size
    assert 0 <= report["loss"]["mean_kl"][0] < 0.01
    assert report["conversion"]["tokens_equal"]
    assert report["loss"]["documents"] >= 30

    planned = call("plan", source, "--for", "llama.cpp", "--preset", "F16", "--json")
    assert planned.code == 0, planned.err
    assert json.loads(planned.out)["bytes"] == size

    seen = call("inspect", out, "--json")
    assert seen.code == 0, seen.err
    contents = json.loads(seen.out)
    assert (contents["kind"], contents["family"]) == ("gguf", "llama")
    assert call("inspect", out, "--tensors").out.count("blk.1.") == 9
    assert "llama" in call("inspect", source).out

    measured = call(
        "evaluate",
        out,
        "--against",
        source,
        "--text",
        text,
        "--tokens",
        "2200",
        "--threads",
        "1",
        "--context",
        "64",
        "--json",
        "-q",
    )
    assert measured.code == 0, measured.err
    assert json.loads(measured.out)["mean_kl"]["value"] < 0.01

    spoken = call("run", out, "the model reads", "--threads", "1", "--tokens", "8")
    assert spoken.code == 0, spoken.err
    assert spoken.out.strip()

    few = call("evaluate", out, "--against", source, "--tokens", "600", "--context", "64", "--json", "-q")
    assert few.code == 0, few.err
    assert json.loads(few.out)["documents"] == 10  # of the default text, cut at 64 tokens


def test_a_contract_that_is_not_met_is_published_with_its_verdict(
    call: Call, model: Model, text: Path, tmp_path: Path
) -> None:
    limits = ("--max-kl", "1e-6", "--min-same-top", "1")
    made = call(
        "make",
        model("llama"),
        "--for",
        "llama.cpp",
        "--grid",
        "q4_0",
        *limits,
        "--text",
        text,
        *SHORT,
        "-o",
        tmp_path / "out",
        "--json",
    )
    assert made.code == 3, made.err
    assert json.loads(made.out)["status"] == "fail"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(made.out)


def test_paths_that_are_not_unicode(call: Call, model: Model, tmp_path: Path) -> None:
    odd = tmp_path / b"mod\xffel".decode(errors="surrogateescape")
    shutil.copytree(model("llama"), odd)
    job = ("make", odd, "--for", "llama.cpp", "--preset", "Q8_0", "--data-free", "-q", "-o")
    made = call(*job, tmp_path / b"ou\xfet".decode(errors="surrogateescape"))
    assert made.code == 0, made.err
    assert call(*job, odd).code == 7


@pytest.mark.parametrize("target", ["vllm", "transformers"])
def test_a_folder_for_transformers(call: Call, model: Model, text: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    made = call("make", model("llama"), "--for", target, "--text", text, *SHORT, "-o", out)
    assert made.code == 0, made.err
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "measured"
    assert report["conversion"]["mean_kl"] < 1e-4
    assert made.err == ""
    assert call("inspect", out).code == 0
    spoken = call("run", out, "the model reads", "--tokens", "4", "--threads", "1")
    assert (spoken.code, spoken.err) == (0, "")
    assert spoken.out.startswith("the model reads")


def test_the_neutral_state(call: Call, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = call("make", model("qwen3_moe"), "--grid", "q4_0", "--data-free", "-q", "-o", out)
    assert made.code == 0, made.err
    assert (out / "plan.json").exists()
    assert read_manifest(out) is not None
    planned = call("plan", model("qwen3_moe"), "--grid", "q4_0", "--data-free", "--json")
    kept = {"report.json", "report.md", "report.html", "anyquant-manifest.json", "plan.json"}
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name not in kept)
    assert json.loads(planned.out)["bytes"] == size


def test_experts_are_planned_then_refused(call: Call, model: Model) -> None:
    planned = call("plan", model("mixtral"), "--for", "llama.cpp", "--preset", "Q4_K_M", "--json")
    assert planned.code == 6
    assert planned.err.count("\n") == 1
    ledger = json.loads(planned.out)
    assert "mixture-of-experts" in ledger["refusal"]
    names = {line["name"] for line in ledger["lines"]}
    assert {f"blocks.{block}.experts.{expert}.ffn_down" for block in (0, 1) for expert in range(4)} < names
    assert ledger["bytes"] == sum(line["target_bytes"] for line in ledger["lines"])
    assert "experts.3.ffn_up" in call("plan", model("mixtral"), "--for", "llama.cpp").out


def test_a_recipe_file(call: Call, model: Model, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'version = 1\npreset = "Q8_0"\n[[rule]]\nrole = "attn_v"\ngrid = "f16"\n[calibration]\ndata_free = true\n'
    )
    made = call(
        "make", model("llama"), "--for", "llama.cpp", "--recipe", recipe, "--head", "f32", "-q", "-o", tmp_path / "out"
    )
    assert made.code == 0, made.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    applied = {line["name"]: line["applied"] for line in report["ledger"]["lines"]}
    assert (applied["blocks.0.attn_v"], applied["head"], applied["blocks.0.attn_q"]) == ("f16", "f32", "q8_0")
    assert report["recipe"]["calibration"]["data_free"]


def test_force_replaces_only_what_anyquant_made(call: Call, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = ("make", model("llama"), "--for", "llama.cpp", "--data-free", "-q", "-o", out, "--preset")
    assert call(*job, "F16").code == 0
    before = (out / "model.gguf").read_bytes()
    refused = call(*job, "Q8_0")
    assert refused.code == 7
    assert "--force" in refused.err
    assert (out / "model.gguf").read_bytes() == before
    assert call(*job, "Q8_0", "--force").code == 0
    assert (out / "model.gguf").stat().st_size < len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


def test_the_same_bytes_whatever_the_hash_seed_and_without_torch(model: Model, tmp_path: Path) -> None:
    """A data-free run in a process that cannot import torch, twice, with different seeds and threads."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from anyquant.cli.main import main; main()"
    )
    found = []
    for seed, threads in (("1", "1"), ("2", "2")):
        out = tmp_path / seed
        flags = ["--for", "llama.cpp", "--preset", "Q4_K_M", "--data-free", "--threads", threads, "-o", str(out)]
        run = subprocess.run(
            [sys.executable, "-c", code, "make", str(model("llama")), *flags],
            env=environment(PYTHONHASHSEED=seed),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        report = json.loads((out / "report.json").read_text())
        for varying in ("seconds", "peak_memory"):
            del report[varying]
        found.append(((out / "model.gguf").read_bytes(), report))
    assert found[0][0] == found[1][0]
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["make", "--help"],
        ["plan", "MODEL", "--for", "llama.cpp", "--preset", "Q4_K_M"],
        ["inspect", "MODEL"],
    ],
    ids=["help", "help of a verb", "plan", "inspect"],
)
def test_light_verbs_load_nothing_heavy(model: Model, arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'numba', 'llvmlite', 'transformers', 'tokenizers', 'xllamacpp', 'compressed_tensors'}\n"
        "heavy |= {'bitsandbytes', 'mlx'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "import anyquant\n"
        "from anyquant.cli.main import main; main()"
    )
    real = [str(model("llama")) if argument == "MODEL" else argument for argument in arguments]
    run = subprocess.run([sys.executable, "-c", code, *real], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == "HEAVY []\n"


def test_what_is_printed_as_json_is_strict(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("llama.odd", math.nan)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = call("inspect", path, "--json")
    assert shown.code == 0, shown.err
    assert "NaN" not in shown.out
    assert json.loads(shown.out)["metadata"]["llama.odd"] is None


@pytest.mark.parametrize(("limit", "status"), [(1, "fail"), (1 << 30, "pass")])
def test_a_size_is_judged_without_measuring(model: Model, tmp_path: Path, limit: int, status: str) -> None:
    report = anyquant.make(
        model("llama"),
        target="llama.cpp",
        preset="Q8_0",
        contract=anyquant.Contract(max_size=limit),
        data_free=True,
        out=tmp_path / "out",
        threads=1,
    )
    assert report.status == status
    assert report.sentences[0] == "Nothing was measured."
    assert f"size {report.nbytes:,} bytes" in report.sentences[1]


def test_convert(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    """A folder becomes a GGUF file that llama.cpp runs, and a folder again."""
    source, folder, file = model("llama"), tmp_path / "folder", tmp_path / "file"
    assert call("make", source, "--for", "vllm", "--preset", "W4A16", "--data-free", "-q", "-o", folder).code == 0
    made = call("convert", folder, "--for", "gguf", "--text", text, *SHORT, "--json", "-o", file)
    assert made.code == 0, made.err
    report = json.loads(made.out)
    assert report["status"] == "measured" and report["loss"]["mean_kl"][0] < 1e-2
    assert any("quantized matrices" in sentence and "exact" in sentence for sentence in report["sentences"])
    lines = {line["name"]: line for line in report["ledger"]["lines"]}
    assert lines["blocks.0.attn_q"]["reason"].endswith(": exact") and lines["blocks.0.attn_q"]["error"] == 0
    # compared with what it was made from, bytes and logits, and so says how to do it again
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / "model.safetensors").values())
    assert report["source_bytes"] == tensors and report["reference"] == "source as decoded"
    assert any(f"--against {folder} measures the same" in sentence for sentence in report["sentences"])
    measured = call("evaluate", file, "--against", folder, "-q")
    assert measured.code == 0 and "reproduced: " in measured.out, measured.err + measured.out
    back = ("--like", source, "--to", "vllm", "--text", text, *SHORT, "-o", tmp_path / "back")
    again = call("convert", file / "model.gguf", *back)
    assert again.code == 0, again.err
    unread = call("convert", folder, "--for", "mlx", "--data-free", "-o", tmp_path / "unread")
    assert unread.code == 0 and "Nothing was measured." in unread.out and "warning" not in unread.err, unread.err
    for arguments, code, said in (
        ((file / "model.gguf", "--to", "vllm"), 2, "--like"),
        ((folder, "--to", "gguf", "--like", source), 2, "--like is for GGUF files"),
        ((source, "--to", "gguf"), 6, "nothing in it is quantized"),
        ((folder, "--for", "gguf", "--tokens", "3000"), 2, "the default text is judged on whole"),
        ((folder, "--for", "gguf", "--data-free", "--text", text), 2, "--text has no effect"),
        ((text, "--for", "gguf"), 5, "neither a model folder"),
        ((folder, "--to", "gguff"), 2, "did you mean gguf?"),
        ((tmp_path / "nothing", "--to", "gguf"), 5, "no such file or folder"),
    ):
        refused = call("convert", *arguments, "-q", "-o", tmp_path / "refused")
        assert refused.code == code and said in refused.err, refused.err
        assert not (tmp_path / "refused").exists()
