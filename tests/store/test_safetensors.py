"""The reader against the safetensors library, and what it must notice."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from anyquant.core.checkpoint import read_rows, read_tensor
from anyquant.core.errors import AnyQuantError, BadInputError, UnsupportedError
from anyquant.store.safetensors import INDEX, SafetensorsCheckpoint
from anyquant.store.safetensors_layout import BITS, write_safetensors_header
from anyquant.store.system import System

TENSORS = {
    "weight": torch.randn(7, 5),
    "half": torch.randn(3, 4).half(),
    "brain": torch.randn(2, 3, 4).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    "long": torch.tensor([-1, 1 << 40]),
}


def save(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, name: str = "model.safetensors") -> Path:
    safetensors.torch.save_file(tensors, folder / name, {"format": "pt"})
    return folder


def raw(checkpoint: SafetensorsCheckpoint, name: str) -> bytes:
    spec = checkpoint.spec(name)
    buffer = np.empty(spec.nbytes, np.uint8)
    checkpoint.read_into(name, 0, spec.rows, buffer)
    return buffer.tobytes()


def test_equals_the_library(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(save(tmp_path))
    assert sorted(checkpoint.names()) == sorted(TENSORS)
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.config == {}
    for name, tensor in TENSORS.items():
        spec = checkpoint.spec(name)
        assert spec.shape == tuple(tensor.shape)
        assert raw(checkpoint, name) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        if tensor.is_floating_point():
            assert np.array_equal(read_tensor(checkpoint, name), tensor.float().numpy())
    assert np.array_equal(read_rows(checkpoint, "brain", 2, 5), TENSORS["brain"].float().reshape(6, 4)[2:5].numpy())


def shards(folder: Path, **changes: Any) -> Path:
    save(folder, {"a": torch.ones(2), "b": torch.ones(3)}, "model-1.safetensors")
    save(folder, {"c": torch.zeros(4)}, "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"} | changes
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(shards(tmp_path))
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    assert read_tensor(checkpoint, "c").tolist() == [0, 0, 0, 0]
    assert [file.name for file in checkpoint.files] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d": "model-3.safetensors"}, "model-3.safetensors' is missing"),
        ({"d": "model-2.safetensors"}, "no shard has it"),
        ({"a": "model-2.safetensors"}, "it is in model-1"),
        ({"a": "../model-1.safetensors"}, "plain name"),
        ({"a": "/model-1.safetensors"}, "plain name"),
        ({"a": "x\\model-1.safetensors"}, "backslash"),
        ({"a": 3}, "plain name"),
        ({"a": "model-1.bin"}, "plain name"),
    ],
)
def test_index_that_lies(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        SafetensorsCheckpoint(shards(tmp_path, **changes))


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    save(tmp_path, {"c": torch.zeros(4), "a": torch.ones(2)}, "model-2.safetensors")
    with pytest.raises(BadInputError, match=r"'a' is stored in model-1.safetensors and in model-2"):
        SafetensorsCheckpoint(tmp_path)


def test_file_that_changes_after_opening(tmp_path: Path) -> None:
    file = save(tmp_path) / "model.safetensors"
    checkpoint = SafetensorsCheckpoint(tmp_path)
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(BadInputError, match="modification time"):
        raw(checkpoint, "weight")
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    copy.rename(file)
    with pytest.raises(BadInputError, match="inode"):
        raw(checkpoint, "weight")
    with file.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(BadInputError, match="size"):
        raw(checkpoint, "weight")


def test_short_reads_are_continued_and_early_ends_are_named(tmp_path: Path) -> None:
    class OneByte(System):
        def pread(self, descriptor: int, buffer: memoryview, offset: int) -> int:
            return super().pread(descriptor, buffer[:1], offset)

    class Early(System):
        def pread(self, descriptor: int, buffer: memoryview, offset: int) -> int:
            return super().pread(descriptor, buffer, offset) if offset < end else 0

    end = 1 << 60
    save(tmp_path)
    assert raw(SafetensorsCheckpoint(tmp_path, system=OneByte()), "half") == TENSORS["half"].numpy().tobytes()
    checkpoint = SafetensorsCheckpoint(tmp_path, system=Early())
    end = 0
    with pytest.raises(BadInputError, match=r"model\.safetensors: tensor 'half': the file ends after 0 of 24 bytes"):
        raw(checkpoint, "half")


def test_calls_that_are_wrong(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(save(tmp_path))
    with pytest.raises(BadInputError, match="no tensor 'absent'"):
        checkpoint.spec("absent")
    for start, stop, size in ((0, 8, 160), (3, 2, 0), (0, 1, 19), (-1, 1, 40)):
        with pytest.raises(AnyQuantError):
            checkpoint.read_into("weight", start, stop, np.empty(size, np.uint8))
    with pytest.raises(AnyQuantError, match="contiguous"):
        checkpoint.read_into("weight", 0, 1, np.empty((20, 2), np.uint8)[:, 0])


def test_elements_smaller_than_a_byte(tmp_path: Path) -> None:
    """Four-bit elements are carried whole; a row that starts inside a byte cannot be read alone."""
    header, _ = write_safetensors_header([("even", "F4", (2, 4)), ("odd", "F4", (2, 3))])
    (tmp_path / "model.safetensors").write_bytes(header + bytes(range(7)))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    row = np.empty(2, np.uint8)
    checkpoint.read_into("even", 1, 2, row)
    assert row.tolist() == [2, 3]
    with pytest.raises(UnsupportedError, match="whole bytes"):
        checkpoint.read_into("odd", 1, 2, row)


def test_index_that_is_no_index(tmp_path: Path) -> None:
    shards(tmp_path)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(BadInputError):
            SafetensorsCheckpoint(tmp_path)


def test_companion_files(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "nested": {"a": [1, 2.5, null]}}')
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.config == {"model_type": "llama", "nested": {"a": [1, 2.5, None]}}
    assert checkpoint.text_file("chat_template.jinja") is None
    with pytest.raises(BadInputError):
        checkpoint.text_file("../outside")


def test_written_header_is_what_the_library_reads(tmp_path: Path) -> None:
    arrays = {
        "odd": np.arange(5, dtype=np.uint8),
        "wide": np.arange(6, dtype=np.float64).reshape(2, 3),
        "übrig": np.arange(3, dtype=np.float16),
        "none": np.zeros((0, 2), np.float32),
    }
    dtypes = ["U8", "F64", "F16", "F32"]
    facts = [(n, d, a.shape) for (n, a), d in zip(arrays.items(), dtypes, strict=True)]
    header, offsets = write_safetensors_header(facts, {"who": "test"})
    assert len(header) % 8 == 0
    file = bytearray(header) + bytearray(sum(array.nbytes for array in arrays.values()))
    for array, offset in zip(arrays.values(), offsets, strict=True):
        assert offset % array.itemsize == 0
        file[offset : offset + array.nbytes] = array.tobytes()
    (tmp_path / "model.safetensors").write_bytes(file)
    loaded = safetensors.numpy.load(bytes(file))
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], array) for name, array in arrays.items())
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert {name: checkpoint.spec(name).shape for name in arrays} == {name: a.shape for name, a in arrays.items()}
    assert checkpoint.metadata == {"who": "test"}
    torch_loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")  # needs aligned tensors
    assert torch_loaded["wide"].tolist() == arrays["wide"].tolist()


def test_header_refuses_what_no_reader_would_take() -> None:
    for tensors in (
        [("a", "U8", (1,)), ("a", "U8", (1,))],
        [("__metadata__", "U8", (1,))],
        [("a", "Q4_K", (256,))],
        [("a", "F4", (3,))],
    ):
        with pytest.raises(AnyQuantError):
            write_safetensors_header(tensors)


def test_header_too_long_for_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyquant.store.limits.SAFETENSORS_HEADER_BYTES", 100)
    with pytest.raises(AnyQuantError, match="more shards"):
        write_safetensors_header([("x" * 100, "U8", (1,))])


def test_element_types_are_those_of_the_library() -> None:
    """Each type that we accept, the library accepts too."""
    for name, bits in BITS.items():
        header, _ = write_safetensors_header([("a", name, (8,))])
        assert safetensors.deserialize(header + bytes(bits))[0][1]["dtype"] == name
