"""Importance matrices as llama.cpp's tool lays them out, made and checked with the gguf library."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from anyquant.calibrate.imatrix import Source, read_imatrix, write_imatrix
from anyquant.calibrate.stats import Moments, Statistics
from anyquant.core.errors import BadInputError, OutputError, UsageError
from anyquant.core.linear import Linear, Role, View

SOURCE = Source(("wiki.train.raw", "code.txt"), 7, 512)


def linear(name: str, role: Role, columns: int, group: str, expert: int | None = None) -> Linear:
    return Linear(name, role, View(name, 0, 5, columns), 0, group, name, expert)


Q, K = (linear(f"blocks.0.{role}", role, 6, "blocks.0.attn_input") for role in (Role.ATTN_Q, Role.ATTN_K))
DOWN = linear("blocks.0.ffn_down", Role.FFN_DOWN, 3, "blocks.0.ffn_down_input")
HEAD = linear("head", Role.HEAD, 6, "output_input")
EXPERTS = [
    linear(f"blocks.0.experts.{i}.ffn_up", Role.FFN_UP, 4, f"blocks.0.experts.{i}.input", expert=i) for i in range(3)
]
TENSORS = {
    Q.name: "blk.0.attn_q.weight",
    K.name: "blk.0.attn_k.weight",
    DOWN.name: "blk.0.ffn_down.weight",
    HEAD.name: "output.weight",
    **{expert.name: "blk.0.ffn_up_exps.weight" for expert in EXPERTS},
}


def foreign(path: Path, tensors: dict[str, Any], kind: str = "imatrix") -> Path:
    """A file as llama.cpp writes it; arrays are in numpy order."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", list(SOURCE.datasets))
    writer.add_uint32("imatrix.chunk_count", SOURCE.chunk_count)
    writer.add_uint32("imatrix.chunk_size", SOURCE.chunk_size)
    for name in sorted(tensors):
        writer.add_tensor(name, np.asarray(tensors[name], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entry(tensor: str, sums: Any, counts: Any) -> dict[str, Any]:
    return {f"{tensor}.in_sum2": sums, f"{tensor}.counts": counts}


def test_a_foreign_file_is_understood(tmp_path: Path) -> None:
    experts = [[4, 8, 12, 16], [0, 0, 0, 0], [1, 2, 3, 4]]
    tensors = {
        **entry("blk.0.attn_q.weight", [[10, 20, 30, 40, 50, 60]], [[10]]),
        **entry("blk.0.ffn_up_exps.weight", experts, [[4], [0], [1]]),
        **entry("blk.0.attn_gate.weight", [[1, 2]], [[1]]),
        "blk.0.attn_q.weight.in_sum": [[-1, 2, -3, 4, -5, 6]],
    }
    found = read_imatrix(foreign(tmp_path / "i.gguf", tensors), [Q, K, *EXPERTS], TENSORS)
    assert found.source == SOURCE
    assert found.statistics.missing == (K.name,)
    assert found.unknown == ("blk.0.attn_gate.weight",)
    importance = [found.statistics.importance(item) for item in (Q, *EXPERTS)]
    assert [list(values) for values in importance if values is not None] == [
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4],
        [1, 1, 1, 1],  # an expert that no token reached
        [1, 2, 3, 4],
    ]
    assert found.statistics.importance(K) is None


def test_one_count_for_all_experts(tmp_path: Path) -> None:
    tensors = entry("blk.0.ffn_up_exps.weight", np.arange(12.0).reshape(3, 4), [[2]])
    found = read_imatrix(foreign(tmp_path / "i.gguf", tensors), EXPERTS, TENSORS)
    values = found.statistics.importance(EXPERTS[2])
    assert values is not None and list(values) == [4, 4.5, 5, 5.5]


def test_what_is_written_has_the_layout_of_llama_cpp_and_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    groups = {item.input_group: item for item in (Q, DOWN, HEAD, *EXPERTS)}
    moments = {
        group: Moments(rng.lognormal(size=item.shape[1]).astype(np.float32), 3584) for group, item in groups.items()
    }
    statistics = Statistics(moments)
    linears = [Q, K, DOWN, HEAD, *EXPERTS]
    names = {key: value for key, value in TENSORS.items() if key != HEAD.name}
    path = tmp_path / "imatrix.gguf"
    assert write_imatrix(path, statistics, linears, names, SOURCE) == (HEAD.name,)

    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.train.raw", "code.txt"],
        "imatrix.chunk_count": 7,
        "imatrix.chunk_size": 512,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {f"{name}{end}" for name in names.values() for end in (".in_sum2", ".counts")}
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert list(tensors["blk.0.attn_k.weight.in_sum2"].shape) == [6, 1]  # ggml order: channels, matrices
    assert list(tensors["blk.0.ffn_up_exps.weight.in_sum2"].shape) == [4, 3]
    assert list(tensors["blk.0.ffn_up_exps.weight.counts"].shape) == [1, 3]
    expected = moments[DOWN.input_group].second_moment * 3584
    np.testing.assert_allclose(tensors["blk.0.ffn_down.weight.in_sum2"].data.reshape(-1), expected, rtol=1e-6)

    back = read_imatrix(path, linears, names).statistics
    for item in linears[:3] + EXPERTS:
        original, again = statistics.importance(item), back.importance(item)
        assert original is not None and again is not None
        np.testing.assert_allclose(again, original, rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (entry("blk.0.attn_q.weight", [[1, 2, 3]], [[1]]), "3 sums and 1 counts do not fit blocks.0.attn_q"),
        (entry("blk.0.attn_q.weight", [[1] * 6, [2] * 6], [[1], [1]]), "12 sums and 2 counts do not fit"),
        (entry("blk.0.attn_q.weight", [[1] * 6], [[1], [1]]), "6 sums and 2 counts do not fit"),
        (entry("blk.0.attn_q.weight", [[1, 2, 3, 4, 5, np.nan]], [[1]]), "negative or not finite"),
        (entry("blk.0.attn_q.weight", [[1] * 6], [[-1]]), "negative or not finite"),
        ({"blk.0.attn_q.weight.in_sum2": [[1] * 6]}, r"has no tensor blk\.0\.attn_q\.weight\.counts"),
        (entry("blk.0.ffn_up_exps.weight", [[1] * 4], [[1]]), "holds 1 experts"),
    ],
)
def test_files_that_do_not_fit_are_bad_input(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    path = foreign(tmp_path / "i.gguf", tensors)
    with pytest.raises(BadInputError, match=message):
        read_imatrix(path, [Q, *EXPERTS], TENSORS)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="expected 'imatrix'"):
        read_imatrix(foreign(tmp_path / "model.gguf", {"a": [1.0]}, kind="model"), [Q], TENSORS)
    (tmp_path / "old.dat").write_bytes(b"\x01\x00\x00\x00" * 8)
    with pytest.raises(BadInputError, match=r"llama-imatrix --in-file old\.dat"):
        read_imatrix(tmp_path / "old.dat", [Q], TENSORS)
    with pytest.raises(BadInputError, match="cannot be read"):
        read_imatrix(tmp_path / "absent.gguf", [Q], TENSORS)


def test_writing_refuses_what_llama_cpp_would_refuse_or_what_would_be_lost(tmp_path: Path) -> None:
    statistics = Statistics({expert.input_group: Moments(np.ones(4, np.float32), 1) for expert in EXPERTS})
    with pytest.raises(UsageError, match="must name the text"):
        write_imatrix(tmp_path / "a.gguf", statistics, EXPERTS, TENSORS, Source((), 1, 1))
    with pytest.raises(UsageError, match=r"experts \[1, 2\] only"):
        write_imatrix(tmp_path / "a.gguf", statistics, EXPERTS[1:], TENSORS, SOURCE)
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_imatrix(tmp_path / "there.gguf", statistics, EXPERTS, TENSORS, SOURCE)
    assert (tmp_path / "there.gguf").read_text() == "mine"
    with pytest.raises(OutputError, match="cannot be written"):
        write_imatrix(tmp_path / "no" / "a.gguf", statistics, EXPERTS, TENSORS, SOURCE)
