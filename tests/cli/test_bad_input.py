"""What goes wrong ends in one clear line, its own exit code, and nothing under the final name."""

import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from cli.conftest import Call, Outcome

Model = Callable[[str], Path]
Damage = Callable[[Path], None]
WEIGHTS = "model.safetensors"


def refused(outcome: Outcome, code: int, *named: str) -> None:
    """One line that names what it is about."""
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("anyquant: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for name in named:
        assert name in outcome.err


def nothing_published(folder: Path) -> None:
    """Neither the output nor a hidden stage or lock beside it."""
    assert [path.name for path in folder.iterdir() if path.name not in ("model", "input")] == []


@pytest.fixture
def copy(model: Model, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a model that a test may damage."""
    return lambda family: Path(shutil.copytree(model(family), tmp_path / "model"))


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(change: Callable[[dict[str, Any]], None]) -> Damage:
    """A header that lies, in front of the same data."""

    def damage(folder: Path) -> None:
        table, data = header(folder / WEIGHTS)
        change(table)
        text = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def revalue(tensor: str, value: float) -> Damage:
    def damage(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        tensors[tensor].reshape(-1)[-1] = value
        safetensors.numpy.save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def configure(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def write(name: str, content: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text(content)

    return damage


def drop(tensor: str) -> Damage:
    def damage(folder: Path) -> None:
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        del tensors[tensor]
        safetensors.numpy.save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Damage, int, tuple[str, ...]]] = {
    "truncated": (truncate, 5, (WEIGHTS,)),
    "empty file": (write(WEIGHTS, ""), 5, (WEIGHTS,)),
    "offsets beyond the file": (rewrite(lambda t: t[NORM].update(data_offsets=[0, 1 << 40])), 5, (NORM,)),
    "shape that lies": (rewrite(lambda t: t[NORM].update(shape=[255])), 5, (NORM,)),
    "unknown dtype": (rewrite(lambda t: t[NORM].update(dtype="F12")), 5, (NORM, "F12")),
    "integers for weights": (rewrite(lambda t: t[NORM].update(dtype="I32")), 6, (NORM, "I32")),
    "NaN in a matrix": (
        revalue("model.layers.1.mlp.up_proj.weight", np.nan),
        5,
        ("model.layers.1.mlp.up_proj.weight", "nan"),
    ),
    "infinity in a norm": (revalue(NORM, np.inf), 5, (NORM, "inf")),
    "tensor missing": (drop(NORM), 5, (NORM,)),
    "tensor of another name": (
        rewrite(lambda t: t.update({"model.nrm.weight": t.pop(NORM)})),
        6,
        ("model.nrm.weight",),
    ),
    "unknown family": (configure(model_type="mystery", architectures=["MysteryForCausalLM"]), 6, ("mystery",)),
    "config is not JSON": (write("config.json", "{"), 5, ("config.json",)),
    "no config": (lambda folder: (folder / "config.json").unlink(), 5, ("config.json",)),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), 6, ("tokenizer.json",)),
    "tokenizer is not JSON": (
        write("tokenizer.json", "{"),
        5,
        ("tokenizer.json",),
    ),
    "pickles only": (only_pickles, 6, ("pytorch_model.bin", "save_file")),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), 5, ("no weights",)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models(call: Call, copy: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    damage, code, named = DAMAGES[name]
    folder = copy("llama")
    damage(folder)
    outcome = call(
        "make", folder, "--for", "llama.cpp", "--preset", "Q8_0", "--data-free", "-q", "-o", tmp_path / "out"
    )
    refused(outcome, code, *named)
    nothing_published(tmp_path)


def test_a_missing_shard(call: Call, copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("mistral")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    for verb in (("inspect", folder), ("plan", folder, "--for", "llama.cpp")):
        refused(call(*verb), 5, shard.name)
    refused(call("make", folder, "--for", "llama.cpp", "-q", "-o", tmp_path / "out"), 5, shard.name)
    nothing_published(tmp_path)


def test_no_such_model(call: Call, tmp_path: Path) -> None:
    refused(call("make", tmp_path / "nothing", "--for", "llama.cpp", "-o", tmp_path / "out"), 5, "nothing")
    refused(call("inspect", tmp_path / "nothing"), 5, "nothing")
    refused(call("run", tmp_path / "nothing", "hello"), 5, "nothing")
    nothing_published(tmp_path)


def test_names_that_no_file_can_have(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    long = "x" * 300
    for arguments in (
        ("inspect", long),
        ("run", long, "hello"),
        ("make", long, "--for", "llama.cpp", "-o", tmp_path / "out"),
    ):
        refused(call(*arguments), 5, long)
    refused(call("make", model("llama"), "--for", "llama.cpp", "-q", "-o", tmp_path / long), 7, "shorter")
    nothing_published(tmp_path)


def test_hostile_names_are_shown_as_text(call: Call, copy: Callable[[str], Path]) -> None:
    """A tensor name may hold line ends, terminal commands and the console's own markup."""
    folder = copy("llama")
    name = "evil\x1b[31m\n[/red]\u2028\x07"
    rewrite(lambda table: table.update({name: table.pop(NORM)}))(folder)
    outcome = call("plan", folder, "--for", "llama.cpp")
    refused(outcome, 6, r"evil\x1b[31m\n[/red]\u2028\x07")
    assert "\x1b" not in outcome.err
    seen = call("inspect", folder, "--tensors")
    assert seen.code == 0, seen.err
    assert "\x1b" not in seen.out
    assert "\x07" not in seen.out


USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown preset": (("--for", "llama.cpp", "--preset", "Q4_K_N"), ("Q4_K_N", "Q4_K_M")),
    "unknown grid": (("--for", "llama.cpp", "--grid", "q4_l"), ("q4_l", "q4_k")),
    "unknown target": (("--for", "llama_cpp"), ("llama_cpp", "llama.cpp")),
    "unknown algorithm": (("--for", "llama.cpp", "--grid", "q8_0", "--algorithm", "rnt"), ("rnt", "rtn")),
    "unknown quality": (("--for", "llama.cpp", "--quality", "loosless"), ("loosless", "lossless")),
    "unknown flag": (("--for", "llama.cpp", "--prest", "Q8_0"), ("--prest", "--preset")),
    "preset without a target": (("--preset", "Q8_0"), ("Q8_0", "--for")),
    "preset of another target": (("--for", "vllm", "--preset", "Q8_0"), ("Q8_0", "W8A16")),
    "nothing to do": ((), ("--grid", "--for")),
    "quality without a target": (("--quality", "strict"), ("--for",)),
    "preset and grid": (("--for", "llama.cpp", "--preset", "Q8_0", "--grid", "q8_0"), ("--preset", "--grid")),
    "quality and limit": (("--for", "llama.cpp", "--quality", "strict", "--max-kl", "1"), ("quality",)),
    "negative limit": (("--for", "llama.cpp", "--max-kl", "-1"), ("--max-kl", "-1")),
    "limit that is no number": (("--for", "llama.cpp", "--max-kl", "nan"), ("--max-kl", "nan")),
    "preset as a grid": (("--for", "llama.cpp", "--grid", "Q4_K_M"), ("--preset Q4_K_M",)),
    "beginning of a grid": (("--grid", "int4"), ("int4-g16",)),
    "empty step": (("--grid", "int4-g32", "--algorithm", "gptq -> "), ("a step is empty",)),
    "option twice": (
        ("--grid", "int4-g32", "--algorithm", "gptq", "--option", "block=32", "--option", "block=64"),
        ("block", "twice"),
    ),
    "option of another type": (
        ("--grid", "int4-g32", "--algorithm", "gptq", "--option", "block=1.5"),
        ("block", "1.5", "an integer"),
    ),
    "field of a text": (("--grid", "int4-g32", "--text", __file__, "--text-field", "x"), (__file__, "--text-field")),
    "dtype of no calibration": (
        ("--grid", "int4-g32", "--data-free", "--calibration-dtype", "bfloat16"),
        ("--calibration-dtype",),
    ),
    "no threads": (("--for", "llama.cpp", "--threads", "0"), ("--threads",)),
    "importance without data": (
        ("--for", "llama.cpp", "--data-free", "--imatrix", "x.gguf"),
        ("--data-free", "--imatrix"),
    ),
}


@pytest.mark.parametrize("name", USAGE)
def test_what_cannot_be_meant(call: Call, model: Model, tmp_path: Path, name: str) -> None:
    flags, named = USAGE[name]
    refused(call("make", model("llama"), "-q", *flags, "-o", tmp_path / "out"), 2, *named)
    nothing_published(tmp_path)


def test_recipes_that_cannot_be_read(call: Call, model: Model, tmp_path: Path) -> None:
    recipe = tmp_path / "input"
    job = ("make", model("llama"), "--for", "llama.cpp", "--recipe", recipe, "-q", "-o", tmp_path / "out")
    refused(call(*job), 5, str(recipe))
    recipe.write_text("version = ")
    refused(call(*job), 5, "not TOML")
    recipe.write_text('version = 1\n[[rule]]\npattern = "blocks.99.*"\ngrid = "f16"')
    refused(call(*job), 2, "blocks.99.*", "matches no Linear")
    nothing_published(tmp_path)


def test_too_little_text(call: Call, model: Model, tmp_path: Path) -> None:
    text = tmp_path / "input"
    text.write_text("only a few words")
    flags = ("--for", "llama.cpp", "--preset", "F16", "--text", text, "-q")
    refused(call("make", model("llama"), *flags, "-o", tmp_path / "out"), 4, "too little text")
    text.write_bytes(b"\xff\xfe\x00")
    refused(call("make", model("llama"), *flags, "-o", tmp_path / "out"), 5, "UTF-8")
    nothing_published(tmp_path)


def test_importance_of_another_model(call: Call, model: Model, tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    job = (
        "make",
        model("llama"),
        "--for",
        "llama.cpp",
        "--preset",
        "Q8_0",
        "--imatrix",
        file,
        "-q",
        "-o",
        tmp_path / "out",
    )
    refused(call(*job), 5, str(file))
    nothing_published(tmp_path)


def make(model: Path, out: Path | str) -> tuple[Any, ...]:
    return ("make", model, "--for", "llama.cpp", "--preset", "Q8_0", "--data-free", "--threads", "1", "-q", "-o", out)


def test_outputs_that_are_there(call: Call, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    refused(call(*make(model("llama"), out)), 7, str(out))
    refused(call(*make(model("llama"), out), "--force"), 7, "not written by AnyQuant")
    assert (out / "mine").read_text() == "precious"
    refused(call(*make(model("llama"), tmp_path / "no" / "parent")), 7, "mkdir -p")
    file = tmp_path / "file"
    file.write_text("precious")
    refused(call(*make(model("llama"), file), "--force"), 7, str(file))
    assert file.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_model_is_not_its_own_output(call: Call, copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(call(*make(folder, folder), "--force"), 7, str(folder))
    refused(call(*make(folder, folder)), 7, str(folder))
    refused(call(*make(folder / "model.safetensors", folder / "out")), 7, str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_that_cannot_be_written(call: Call, model: Model) -> None:
    """A file system that takes no folders, whoever asks."""
    refused(call(*make(model("llama"), "/proc/anyquant-out")), 7, "/proc")


SMALL_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
from anyquant.cli.main import main; main()
"""


def process(*arguments: Any, code: str = "from anyquant.cli.main import main; main()") -> Outcome:
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    return Outcome(run.returncode, run.stdout, run.stderr)


def test_a_file_that_may_not_grow(model: Model, tmp_path: Path) -> None:
    refused(process(*make(model("llama"), tmp_path / "out"), code=SMALL_FILES), 7, str(tmp_path))
    nothing_published(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)  # noqa: S607
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)  # noqa: S607


def test_a_full_disk(call: Call, model: Model, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the work when the space is known to be too little, and stopped when it runs out on the way."""
    refused(call(*make(model("llama"), small_disk / "out")), 7, "bytes are needed")
    assert list(small_disk.iterdir()) == []
    from anyquant.store.publish import Stage

    monkeypatch.setattr(Stage, "_check_space", lambda stage: None)
    refused(call(*make(model("llama"), small_disk / "out")), 7, "disk is full")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(("library", "extra"), [("xllamacpp", "llamacpp"), ("torch", "torch"), ("accelerate", "torch")])
def test_a_missing_library(model: Model, text: Path, tmp_path: Path, library: str, extra: str) -> None:
    code = f"import sys; sys.modules['{library}'] = None\nfrom anyquant.cli.main import main; main()"
    flags = ("--for", "llama.cpp", "--preset", "F16", "--text", text, "--context", "64", "--tokens", "512", "-q")
    outcome = process("make", model("llama"), *flags, "--threads", "1", "-o", tmp_path / "out", code=code)
    refused(outcome, 8, library, f"anyquant[{extra}]")
    nothing_published(tmp_path)


def test_running_what_cannot_run(call: Call, model: Model, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(*make(model("llama"), out)).code == 0
    refused(call("run", out, "word " * 2000, "--threads", "1"), 2, "the model takes 512")
    short = ("--tokens", "64", "--context", "64", "--threads", "1", "-q")
    refused(call("evaluate", out, "--against", model("qwen2"), "--text", text, *short), 5, "vocabulary")
    refused(call("make", out, "--for", "llama.cpp", "-q", "-o", tmp_path / "again"), 6, "no source yet")
    (out / "model.gguf").write_bytes((out / "model.gguf").read_bytes()[:-1])
    for verb in (("run", out, "hello"), ("inspect", out), ("evaluate", out, "--against", model("llama"), "-q")):
        refused(call(*verb), 5, "model.gguf")


SLOW = """
import sys, time
from anyquant.pipeline.rows import Direct
quantize = Direct.rows
def slow(*arguments):
    print("working", flush=True)
    time.sleep(0.3)
    return quantize(*arguments)
Direct.rows = slow
from anyquant.cli.main import main; main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(model: Model, tmp_path: Path, number: int, code: int) -> None:
    arguments = [sys.executable, "-c", SLOW, *map(str, make(model("llama"), tmp_path / "out"))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "working\n"
        assert any(path.name.startswith(".out.partial") for path in tmp_path.iterdir())
        run.send_signal(number)
        began = time.monotonic()
        _, errors = run.communicate(timeout=30)
    assert run.returncode == code, errors
    assert time.monotonic() - began < 20  # the blocks in flight end, the others do not begin
    assert errors == "anyquant: interrupted; no unfinished output was left behind\n"
    nothing_published(tmp_path)


def test_a_killed_run_is_cleaned_up_by_the_next(call: Call, model: Model, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SLOW, *map(str, make(model("llama"), tmp_path / "out"))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.kill()
    assert not (tmp_path / "out").exists()
    assert call(*make(model("llama"), tmp_path / "out")).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_text_or_importance_that_is_not_there(call: Call, model: Model, tmp_path: Path) -> None:
    for flag in ("--text", "--imatrix"):
        arguments = ("--for", "llama.cpp", "--preset", "F16", flag, "/nothing/here", "-o", tmp_path / "out")
        refused(call("make", model("llama"), *arguments), 5, "/nothing/here")
        refused(call("plan", model("llama"), *arguments[:-2]), 5, "/nothing/here")


def test_nothing_is_written_into_the_model(call: Call, model: Model) -> None:
    folder = model("llama")
    before = sorted(folder.iterdir())
    refused(call("make", folder, "--for", "llama.cpp", "--preset", "F16", "-o", folder / "out"), 7, "inside")
    assert sorted(folder.iterdir()) == before


def test_force_keeps_what_others_put_into_an_output(call: Call, model: Model, tmp_path: Path) -> None:
    arguments = (
        "make",
        model("llama"),
        "--for",
        "llama.cpp",
        "--preset",
        "F16",
        "--data-free",
        "-q",
        "-o",
        tmp_path / "o",
    )
    assert call(*arguments).code == 0
    assert call(*arguments, "--force").code == 0
    (tmp_path / "o" / "notes.txt").write_text("mine")
    refused(call(*arguments, "--force"), 7, "notes.txt")
    assert (tmp_path / "o" / "notes.txt").read_text() == "mine"


def test_an_artifact_that_was_changed_is_not_measured(call: Call, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "o"
    assert (
        call("make", model("llama"), "--for", "llama.cpp", "--preset", "F16", "--data-free", "-q", "-o", out).code == 0
    )
    raw = bytearray((out / "model.gguf").read_bytes())
    raw[-4000:] = b"\xff" * 4000
    (out / "model.gguf").write_bytes(raw)
    for named in (out, out / "model.gguf"):
        refused(call("evaluate", named, "--against", model("llama"), "-q"), 5, "sha256")


def test_a_model_whose_logits_are_not_finite(call: Call, copy: Callable[[str], Path], tmp_path: Path) -> None:
    """Its weights are finite; what they give is not. That is no evidence, and no fault of the conversion."""
    folder = copy("llama")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".layers.1.mlp." in name]:
        tensors[name] = tensors[name] * np.float32(1e19)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = tmp_path / "input"
    text.write_text("".join(f"line {number} of the text, which is long enough\n" for number in range(500)))
    limits = ("--preset", "F32", "--max-kl", "0.1", "--text", text, "--context", "32", "--data-free")
    made = call("make", folder, "--for", "llama.cpp", *limits, "--threads", "1", "-q", "-o", tmp_path / "out")
    refused(made, 4, "not finite")
    nothing_published(tmp_path)
