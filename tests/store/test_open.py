"""One clear line for whatever path a user gives."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.store.gguf import GGUFFile
from anyquant.store.manifest import INCOMPLETE, MANIFEST
from anyquant.store.open import open_checkpoint
from anyquant.store.safetensors import SafetensorsCheckpoint


def model(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file({"a": np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def gguf_file(path: Path, **extra: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in extra.items():
        writer.add_uint16(key.replace("_", "."), value)
    writer.add_tensor("a", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_opens(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    assert isinstance(open_checkpoint(folder), SafetensorsCheckpoint)
    assert isinstance(open_checkpoint(folder / "model.safetensors"), SafetensorsCheckpoint)
    assert isinstance(open_checkpoint(gguf_file(tmp_path / "a.gguf")), GGUFFile)
    link = tmp_path / "link.gguf"  # a link that the user names is the user's own decision
    link.symlink_to(tmp_path / "a.gguf")
    assert isinstance(open_checkpoint(link), GGUFFile)
    only = tmp_path / "only"
    only.mkdir()
    gguf_file(only / "model.gguf")
    assert isinstance(open_checkpoint(only), GGUFFile)


def test_what_does_not(tmp_path: Path) -> None:
    def refused(path: Path, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words) as caught:
            open_checkpoint(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused(tmp_path / "absent", BadInputError, "no such file or folder")
    refused(tmp_path, BadInputError, "holds no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tmp_path, UnsupportedError, "save_file")
    refused(tmp_path / "pytorch_model.bin", UnsupportedError, "save_file")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", BadInputError, "neither")
    folder = model(tmp_path / "m")
    (folder / "config.json").unlink()
    refused(folder, BadInputError, "no config.json")
    (folder / "config.json").write_text('{"a": 1, "a": 2}')
    refused(folder, BadInputError, "'a' occurs twice")
    refused(gguf_file(tmp_path / "s.gguf", split_count=3), UnsupportedError, "--merge")
    (folder / "model.safetensors").rename(folder / "x-1.safetensors")
    (folder / "x-2.safetensors").write_bytes(b"")
    refused(folder, BadInputError, "2 safetensors files and no")
    gguf_file(tmp_path / "b.gguf")
    refused(tmp_path, BadInputError, "name one of them")


def test_folder_of_an_unfinished_run(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    for content, words in (
        (INCOMPLETE, "did not finish"),
        (b"", "not valid JSON"),
        (b"{}", "did not finish"),
        (json.dumps({"schema": 1, "complete": True}).encode(), "files must be a list"),
        (json.dumps({"schema": 1, "complete": True, "files": [entry("x", 1)] * 2}).encode(), "listed twice"),
        (json.dumps({"schema": 1, "complete": True, "files": [{}]}).encode(), "path, bytes and sha256"),
        (json.dumps({"schema": 1, "complete": True, "files": [entry("absent", 1)]}).encode(), "absent is missing"),
        (json.dumps({"schema": 1, "complete": True, "files": [entry("config.json", 1)]}).encode(), "has 2 bytes"),
        (json.dumps({"schema": 1, "complete": True, "files": [entry("../m/config.json", 2)]}).encode(), r"'\.\.'"),
    ):
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(BadInputError, match=words):
            open_checkpoint(folder)
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "complete": True, "files": [entry("config.json", 2)]}))
    open_checkpoint(folder)


def entry(path: str, nbytes: int) -> dict[str, object]:
    return {"path": path, "bytes": nbytes, "sha256": "0" * 64}
