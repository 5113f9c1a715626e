"""Made, sealed, measured again: the certificate holds for what was made, and for nothing else."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import transformers

import anyquant as aq
from anyquant.core.errors import BadInputError, InconclusiveError, UsageError
from anyquant.evaluation.limits import Contract, DropLimit
from anyquant.formats.certificate import Certificate
from anyquant.pipeline.artifacts import uncompared
from anyquant.pipeline.certificate import stored, tensor_digest
from anyquant.store.manifest import MANIFEST, read_manifest, verify_manifest

Model = Callable[[str], Path]
SHORT = aq.Recipe(calibration=aq.Calibration(tokens=512, context=64))
TARGETS = {"gguf": ("llama.cpp", "q5_k"), "compressed-tensors": ("transformers", "int8-g128")}
METRIC = """
import numpy as np
first = {}  # what the model that is asked first, the original, would say
def agreement(session, split):
    found = []
    for number in range(40):
        ids = [(7 * number + 3 * k + (split == "select")) % (session.vocabulary - 8) + 4 for k in range(12)]
        said = session.logits(ids).argmax(axis=1)
        found.append((said == first.setdefault((split, number), said)).mean())
    return found
def spoken(session, split):
    assert session.detokenize(session.tokenize("the model", add_special=False))
    return float(len("".join(session.generate("the model", 4))) > 0)
def random(session, split):
    return np.random.default_rng().random(40)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(0).choice("the model reads a block of rows and writes it".split(), 6000)  # noqa: SIM905
    path.write_text("\n".join(" ".join(words[start : start + 12]) for start in range(0, len(words), 12)))
    return path


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text: Path
) -> Callable[[str], tuple[Path, aq.Report]]:
    """An artifact per format, made once; tests that change it copy it."""
    base, made = tmp_path_factory.mktemp("made"), {}

    def get(form: str) -> tuple[Path, aq.Report]:
        if form not in made:
            target, grid = TARGETS[form]
            limits = Contract(max_kl=1.0, max_size=10**9)
            made[form] = aq.make(
                model_folder, out=base / form, target=target, grid=grid, contract=limits, recipe=SHORT, text=text,
                threads=1,
            )  # fmt: skip
        return base / form, made[form]

    return get


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama")


def certificate(out: Path) -> Certificate:
    found = aq.inspect(out).certificate
    assert found is not None
    return found


@pytest.mark.parametrize("form", TARGETS)
def test_sealed_and_reproduced(form: str, make: Any, model_folder: Path) -> None:
    out, report = make(form)
    sealed = certificate(out)
    assert (sealed.status, sealed.limit) == ("pass", "max_kl=1 max_size=1000000000")
    assert sealed.mean_kl == report.mean_kl
    assert sealed.text_sha256 == report.data["certify"]["sha256"]
    # hashes and sizes are those of the bytes as they are in the end
    verify_manifest(out)
    for name, wanted in report.hashes.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == wanted
    manifest = read_manifest(out)
    assert manifest is not None
    assert sum(file.nbytes for file in manifest.files if file.path in report.hashes) == report.nbytes
    found = aq.reproduce(out, against=model_folder, threads=2)
    assert found.reproduced, found.differences
    assert found.measures is not None and found.measures.mean_kl.value == pytest.approx(sealed.mean_kl, rel=1e-6)


def test_transformers_opens_the_sealed_folder(make: Any) -> None:
    out, _ = make("compressed-tensors")
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.anyquant["status"] == "pass"
    assert config.hidden_size == 256


def test_the_hash_of_the_tensors_knows_name_type_shape_and_bytes(tmp_path: Path) -> None:
    """Against hashlib on what the safetensors library wrote; large enough to be read in pieces."""
    random = np.random.default_rng(0)
    tensors = {"b": random.standard_normal((600, 4096)).astype(np.float32), "a": np.arange(3, dtype=np.float16)}
    (tmp_path / "config.json").write_text("{}")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    raw = b"a\0F16\x003\0" + tensors["a"].tobytes() + b"b\0F32\x00600,4096\0" + tensors["b"].tobytes()
    assert tensor_digest(stored(tmp_path)) == hashlib.sha256(raw).hexdigest()


def changed(out: Path, copy: Path, **values: Any) -> Path:
    """A copy whose report.json says something else, without a manifest that would tell."""
    shutil.copytree(out, copy)
    (copy / MANIFEST).unlink()
    report = json.loads((copy / "report.json").read_text())
    for path, value in values.items():
        place, _, key = path.rpartition("__")
        (report[place] if place else report)[key] = value
    (copy / "report.json").write_text(json.dumps(report))
    return copy


def test_what_differs_is_named(make: Any, model_folder: Path, tmp_path: Path, text: Path) -> None:
    out, _ = make("gguf")
    found = aq.reproduce(changed(out, tmp_path / "a", contract={"max_kl": 2.0}), against=model_folder, threads=1)
    assert [said.split()[0] for said in found.differences] == ["limit"]
    found = aq.reproduce(changed(out, tmp_path / "b", recipe__grid="q8_0"), against=model_folder, threads=1)
    assert [said.split()[0] for said in found.differences] == ["recipe_sha256"]
    # another text: nothing is measured, for there is nothing to compare with
    (tmp_path / "other.txt").write_text(text.read_text()[::-1])
    found = aq.reproduce(out, against=model_folder, text=tmp_path / "other.txt", threads=1)
    assert [said.split()[0] for said in found.differences] == ["text_sha256"] and found.measures is None
    # the same text elsewhere
    shutil.copy(text, tmp_path / "moved.txt")
    assert aq.reproduce(out, against=model_folder, text=tmp_path / "moved.txt", threads=1).reproduced


def test_changed_weights_are_noticed(make: Any, model_folder: Path, tmp_path: Path) -> None:
    out, _ = make("gguf")
    copy = changed(out, tmp_path / "copy")
    with (copy / "model.gguf").open("r+b") as file:
        file.seek(-100_000, 2)
        raw = file.read(50_000)
        file.seek(-100_000, 2)
        file.write(bytes(50_000))
    assert any(raw)
    found = aq.reproduce(copy, against=model_folder, threads=1)
    assert [said.split()[0] for said in found.differences][:3] == ["tensor_sha256", "mean_kl", "mean_kl_upper"]
    shutil.copytree(out, tmp_path / "listed")
    shutil.copy(copy / "model.gguf", tmp_path / "listed" / "model.gguf")
    with pytest.raises(BadInputError, match="sha256"):
        aq.reproduce(tmp_path / "listed", against=model_folder)


def test_a_file_on_its_own(make: Any, tmp_path: Path) -> None:
    """Without the report nothing says on which text it was measured; its tensors can be told all the same."""
    out, _ = make("gguf")
    alone = Path(shutil.copy(out / "model.gguf", tmp_path / "alone.gguf"))
    assert uncompared(out) == []
    assert "report.json" in "".join(uncompared(alone))
    with alone.open("r+b") as file:
        file.seek(-100_000, 2)
        byte = file.read(1)
        file.seek(-100_000, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(BadInputError, match="not those"):
        uncompared(alone)


def test_a_text_that_is_gone_is_asked_for(make: Any, model_folder: Path, tmp_path: Path) -> None:
    out, _ = make("gguf")
    copy = changed(out, tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    report["recipe"]["calibration"]["text"] = str(tmp_path / "gone.txt")
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(BadInputError, match="name its place with --text"):
        aq.reproduce(copy, against=model_folder)


def test_a_report_names_no_code_to_run(make: Any, model_folder: Path, tmp_path: Path) -> None:
    out, _ = make("gguf")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    drop = {f"{tmp_path}/evil.py:f:higher": "0.1"}
    aq.reproduce(changed(out, tmp_path / "a", contract={"max_kl": 1.0, "max_drop": drop}), against=model_folder)
    assert not (tmp_path / "ran").exists()


def test_nothing_to_reproduce(model_folder: Path, tmp_path: Path) -> None:
    aq.make(model_folder, out=tmp_path / "out", target="llama.cpp", preset="Q8_0", data_free=True, threads=1)
    sealed = certificate(tmp_path / "out")
    assert (sealed.status, sealed.measured, len(sealed.tensor_sha256)) == ("unmeasured", False, 64)
    with pytest.raises(InconclusiveError, match="nothing to reproduce"):
        aq.reproduce(tmp_path / "out", against=model_folder)
    with pytest.raises(BadInputError, match="no certificate"):
        aq.reproduce(model_folder, against=model_folder)


def test_metrics_of_ones_own(model_folder: Path, tmp_path: Path, text: Path) -> None:
    """On the original by transformers and on the artifact by llama.cpp; a float artifact loses nothing."""
    path = tmp_path / "mine.py"
    path.write_text(METRIC)
    drops = (DropLimit(f"{path}:agreement:higher", 0.1, relative=True), DropLimit(f"{path}:spoken:higher", 0.5))
    report = aq.make(
        model_folder, out=tmp_path / "out", target="llama.cpp", grid="f16", recipe=SHORT, text=text, threads=1,
        contract=Contract(max_drop=drops),
    )  # fmt: skip
    assert report.status == "inconclusive"  # one number has no bound
    said = " ".join(report.sentences)
    assert "agreement:higher" in said and "within the limit of 10%" in said and "one number, which has no bound" in said
    assert report.contract == {"max_drop": {drop.metric: drop.text for drop in drops}}
    only = Contract(max_drop=drops[:1])
    report = aq.make(
        model_folder, out=tmp_path / "two", target="llama.cpp", grid="q2_k", recipe=SHORT, text=text, threads=1,
        contract=only,
    )  # fmt: skip
    assert report.status == "fail", report.sentences
    bad = Contract(max_drop=(DropLimit(f"{path}:random:higher", 0.1),))
    with pytest.raises(UsageError, match="not deterministic"):
        aq.make(
            model_folder, out=tmp_path / "no", target="llama.cpp", grid="f16", recipe=SHORT, text=text, contract=bad
        )
    assert not (tmp_path / "no").exists()


def test_what_is_cut_off_a_long_contract_is_compared_all_the_same(
    model_folder: Path, tmp_path: Path, text: Path
) -> None:
    path = tmp_path / f"{'metrics' * 12}.py"
    path.write_text(METRIC)
    drops = tuple(DropLimit(f"{path}:{name}:higher", 0.5) for name in ("agreement", "spoken"))
    contract = Contract(max_drop=drops)
    out = tmp_path / "out"
    aq.make(
        model_folder, out=out, target="llama.cpp", grid="f16", recipe=SHORT, text=text, threads=1, contract=contract
    )
    assert len(contract.text()) > len(certificate(out).limit)
    assert aq.reproduce(out, against=model_folder, threads=1).differences == ()
    later = {**contract.as_dict()["max_drop"], drops[1].metric: "0.6"}  # behind what the certificate has room for
    copy = changed(out, tmp_path / "copy", contract={"max_drop": later})
    found = aq.reproduce(copy, against=model_folder, threads=1)
    assert [said.split()[0] for said in found.differences] == ["limit"]


def test_the_tail_needs_its_tokens_before_the_work(model_folder: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(
        InconclusiveError, match=r"certified on 50000 tokens or more: the text has \d+ tokens in all, give it 50682"
    ):
        aq.make(
            model_folder, out=tmp_path / "out", target="llama.cpp", grid="f16", recipe=SHORT, text=text,
            contract=Contract(max_kl_99_9=1.0),
        )  # fmt: skip
