"""The reader against the gguf library."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import BadInputError
from anyquant.store.ggml_types import GGML_TYPES
from anyquant.store.gguf import GGUFFile

METADATA: dict[str, Any] = {
    "a.u8": (gguf.GGUFValueType.UINT8, 255),
    "a.i8": (gguf.GGUFValueType.INT8, -128),
    "a.u16": (gguf.GGUFValueType.UINT16, 65535),
    "a.i16": (gguf.GGUFValueType.INT16, -32768),
    "a.u32": (gguf.GGUFValueType.UINT32, 4294967295),
    "a.i32": (gguf.GGUFValueType.INT32, -1),
    "a.f32": (gguf.GGUFValueType.FLOAT32, 0.5),
    "a.u64": (gguf.GGUFValueType.UINT64, (1 << 64) - 1),
    "a.i64": (gguf.GGUFValueType.INT64, -(1 << 63)),
    "a.f64": (gguf.GGUFValueType.FLOAT64, 0.1),
    "a.yes": (gguf.GGUFValueType.BOOL, True),
    "a.no": (gguf.GGUFValueType.BOOL, False),
    "a.text": (gguf.GGUFValueType.STRING, "ein Wörtchen ☃"),
    "l.ints": (gguf.GGUFValueType.ARRAY, [1, -2, 3]),
    "l.floats": (gguf.GGUFValueType.ARRAY, [0.5, -1.5]),
    "l.text": (gguf.GGUFValueType.ARRAY, ["", "a", "☃"]),
    "l.flags": (gguf.GGUFValueType.ARRAY, [True, False, True]),
}


def write(path: Path, alignment: int | None = None) -> dict[str, np.ndarray]:
    """One tensor of every type that gguf knows; returns their raw rows."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in METADATA.items():
        writer.add_key_value(key, value, kind)
    random = np.random.default_rng(0)
    raws = {}
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        raws[kind.name] = random.integers(0, 256, (3, 2 * (1 if block > 1 else 5) * size), dtype=np.uint8)
        writer.add_tensor(kind.name, raws[kind.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raws


def test_type_table_is_that_of_the_library() -> None:
    theirs = {(int(kind), kind.name, block, size) for kind, (block, size) in gguf.GGML_QUANT_SIZES.items()}
    assert {(kind.id, kind.name, kind.block, kind.nbytes) for kind in GGML_TYPES} == theirs


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_equals_the_library(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "model.gguf"
    raws = write(path, alignment)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert ours.alignment == theirs.alignment
    assert ours.data_start == theirs.data_offset
    assert ours.config == {}
    for field in theirs.fields.values():
        if not field.name.startswith("GGUF."):
            assert ours.metadata[field.name] == field.contents(), field.name
    for key, (_, value) in METADATA.items():
        assert ours.metadata[key] == value
    assert list(ours.names()) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine, spec = ours.tensors[tensor.name], ours.spec(tensor.name)
        assert (mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert spec.dtype == tensor.tensor_type.name
        assert spec.shape == tuple(reversed(tensor.shape.tolist()))
        rows = np.empty(raws[tensor.name][1:].nbytes, np.uint8)
        ours.read_into(tensor.name, 1, 3, rows)
        assert rows.tobytes() == raws[tensor.name][1:].tobytes()


def test_floats_of_three_dimensions_and_scalars(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    experts = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("experts", experts)
    writer.add_tensor("one", np.array([1.5], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert np.array_equal(read_tensor(file, "experts"), experts)
    assert read_tensor(file, "one").tolist() == [1.5]
    with pytest.raises(BadInputError, match="no tensor 'two'"):
        file.spec("two")
    assert file.text_file("model.gguf") is None


def test_arrays_behave_as_lists(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    metadata = GGUFFile(tmp_path / "model.gguf").metadata
    text = metadata["l.text"]
    assert (len(text), text[0], text[-1], text[1:], list(text)) == (3, "", "☃", ["a", "☃"], ["", "a", "☃"])
    assert type(metadata["l.ints"][0]) is int and metadata["l.ints"][1:] == [-2, 3]
    assert 3 in metadata["l.ints"] and metadata["l.ints"].index(3) == 2
    assert text != ["", "a"] and text != "a"
    with pytest.raises(IndexError):
        text[3]


def test_metadata_larger_than_the_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.gguf")
    whole = GGUFFile(tmp_path / "model.gguf")
    for size in (1, 24, 100, 300):
        monkeypatch.setattr("anyquant.store.gguf._FIRST_READ", size)
        pieces = GGUFFile(tmp_path / "model.gguf")
        assert pieces.tensors == whole.tensors
        assert pieces.metadata["l.text"] == METADATA["l.text"][1]
