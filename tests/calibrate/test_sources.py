"""Arrays of ids, records of ids and of conversations, data sets; each wrong value named with its place."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.calibrate import hub
from anyquant.calibrate.hub import HubName, parse_name
from anyquant.calibrate.sources import Kind, kind_of, read_documents
from anyquant.calibrate.text import Tokenizer, within
from anyquant.core.errors import AnyQuantError, BadInputError, MissingExtraError, UnsupportedError, UsageError


def render(messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, place: str) -> str:
    return "".join(f"[{m['role']}]{m['content']}" for m in messages) + ("" if tools is None else str(tools))


BOS = Tokenizer(lambda text: list(text.encode()), prefix=(256,), chat=render, vocabulary=300)


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path, context: int = 64, **options: Any) -> list[list[int]]:
    return [list(document.tokens) for document in read_documents(path, BOS, context, **options)]


def test_rows_of_an_array_are_documents_as_they_are(tmp_path: Path) -> None:
    rows = np.arange(3 * 100).reshape(3, 100) % 251
    rows[1, 0] = 256
    np.save(tmp_path / "a.npy", rows.astype(np.uint16))
    documents = read_documents(tmp_path / "a.npy", BOS, context=64)
    expected = [rows[0, :64], rows[0, 64:], rows[1, :64], [256, *rows[1, 64:]], rows[2, :64], rows[2, 64:]]
    assert [list(document.tokens) for document in documents] == [list(map(int, row)) for row in expected]
    assert [document.source for document in documents] == [f"a.npy row {row}" for row in (0, 0, 1, 1, 2, 2)]


def test_a_flat_array_is_cut_into_windows_with_one_prefix_each(tmp_path: Path) -> None:
    ids = np.arange(200) % 251
    np.save(tmp_path / "a.npy", np.concatenate([[256], ids]))
    found = read(tmp_path / "a.npy")
    assert all(window[0] == 256 and window.count(256) == 1 for window in found)
    assert [token for window in found for token in window[1:]] == ids[: 3 * 63].tolist()  # 11 left: too short


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, 2], [3, -100]]), r"row 1, column 1: -100 is no token id; the model has the ids 0 to 299"),
        (np.array([1, 2, 300]), r"element 2: 300 is no token id"),
        (np.array([1, 2**63 + 5], np.uint64), r"element 1: 9223372036854775813 is no token id"),
        (np.array([[1.0]]), "2-D of float64"),
        (np.zeros((1, 1, 1), int), "3-D of int64"),
        (np.array([True]), "1-D of bool"),
        (np.array([{}], dtype=object), "without pickle"),
    ],
)
def test_an_array_that_is_none_of_ids(tmp_path: Path, array: np.ndarray[Any, Any], message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(BadInputError, match=message):
        read(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00\x04\x00{", b"PK\x03\x04", b"text"])
def test_a_damaged_array(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(BadInputError, match="is not an array"):
        read(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (1,), (4, 1)])
def test_nothing_to_predict_is_no_document(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, int))
    assert [len(window) for window in read(tmp_path / "a.npy")] == ([2] if shape == (1,) else [])  # the prefix, and it


def test_records_of_ids_lose_what_the_mask_hides(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "t.jsonl",
        {"input_ids": [0, 0, 7, 8, 9], "attention_mask": [0, 0, 1, 1, 1]},
        {"input_ids": []},
        {"input_ids": [5]},
        {"text": None, "input_ids": [1, 2]},
    )
    assert read(path) == [[7, 8, 9], [1, 2]]


CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_conversations_in_every_layout_are_the_same_document(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    speakers = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    expected = [list(b"[user]hi[assistant]hello")]
    for number, record in enumerate(
        [
            {"messages": CONVERSATION},
            {"messages": [*parts, CONVERSATION[1]]},
            {"conversations": speakers},
            {"conversations": CONVERSATION, "messages": None},
            {"turns": speakers},
            {"messages": [{**message, "tool_calls": None} for message in CONVERSATION]},
        ]
    ):
        field = "turns" if "turns" in record else "text"
        assert read(jsonl(tmp_path / f"{number}.jsonl", record), field=field) == expected
    both = jsonl(tmp_path / "both.jsonl", {"text": "the field wins", "messages": CONVERSATION})
    assert read(both) == [[256, *b"the field wins"]]
    tools = jsonl(tmp_path / "tools.jsonl", {"messages": CONVERSATION, "tools": [{"name": "f"}]})
    assert read(tools) == [[*expected[0], *str([{"name": "f"}]).encode()]]


def test_a_long_conversation_stays_one_source(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": "".join(map(chr, range(33, 126)))}]})
    documents = read_documents(path, BOS, 64)
    assert len(documents) == 2 and {document.source for document in documents} == {"t.jsonl line 1"}
    assert documents[1].tokens[0] != 256  # the template puts no BOS, so the rest has none


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"line 2 has no text in field 'text' \(it has: nothing\)"),
        ([1], "line 2 is a JSON list"),
        ({"text": 5}, "line 2: field 'text' is int"),
        ({"text": "\ud800"}, "half a character"),
        ({"messages": [{"role": "user"}]}, r"line 2, message 0 \(user\) has no content"),
        ({"messages": [{"content": "x"}]}, r"message 0 has no role \(it has: content\)"),
        ({"messages": [CONVERSATION[0], "x"]}, "message 1 is a str"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type 'image'; only text"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator'; known speakers: human, gpt"),
        ({"input_ids": [1, 300]}, "line 2, token 1: 300 is no token id; the model has the ids 0 to 299"),
        ({"input_ids": [1, True]}, "token 1: True is no token id"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has 1 values for 2 input_ids"),
    ],
)
def test_a_wrong_record_is_named_with_its_line(tmp_path: Path, record: object, message: str) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"text": "good"}, record)
    with pytest.raises(BadInputError, match=message):
        read(path)


def test_json_nested_beyond_reason(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("[" * 200_000)
    with pytest.raises(BadInputError, match="line 1 is not JSON"):
        read(tmp_path / "t.jsonl")


def test_conversations_need_a_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", {"messages": CONVERSATION})
    with pytest.raises(UnsupportedError, match="line 1 is a conversation, and this model has no chat template"):
        read_documents(path, replace(BOS, chat=None), 64)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("äöü")
    with pytest.raises(BadInputError, match="gives the id 195, the model's vocabulary has 128"):
        read_documents(tmp_path / "a.txt", within(BOS, 128), 64)


def test_names_of_data_sets() -> None:
    assert parse_name("dataset:imdb") == HubName("imdb", None, None, "train")
    full = parse_name("dataset:Salesforce/wikitext:wikitext-2-v1@refs/convert/parquet#test")
    assert full == HubName("Salesforce/wikitext", "wikitext-2-v1", "refs/convert/parquet", "test")
    assert kind_of("dataset:a/b#test") is Kind.HUB and kind_of("a/dataset:b") is Kind.FILE
    for wrong in ("dataset:", "dataset:a/b/c", "dataset:a b", "dataset:a#", "dataset:/etc/passwd", "dataset:a::b"):
        with pytest.raises(UsageError, match="NAME"):
            kind_of(wrong)
    with pytest.raises(UsageError, match="--tokens"):
        read_documents("dataset:a/b", BOS, 64)


def test_a_name_never_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imdb").mkdir()
    with pytest.raises(UsageError, match="there is a imdb here"):
        read_documents("dataset:imdb", BOS, 64, tokens=100)


class Library:
    """What `hub` uses of the library, with the rows given and every call kept."""

    __version__ = "4.1.0"

    def __init__(self, rows: Sequence[object]) -> None:
        self.rows = rows
        self.calls: list[tuple[object, ...]] = []

    def load_dataset(self, name: str, config: str | None, **options: object) -> Any:
        self.calls.append((name, config, *sorted(options.items())))
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


def test_a_data_set_is_streamed_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library([{"text": "first row"}, {"text": ""}, {"text": "third row"}, ConnectionError("gone\nlong")])
    monkeypatch.setattr(hub, "require", lambda name: library)
    documents = read_documents("dataset:a/b:c@d#e", BOS, 64, tokens=20)
    assert [document.source for document in documents] == [f"dataset:a/b:c@d#e row {row}" for row in (0, 2)]
    assert library.calls == [("a/b", "c", ("revision", "d"), ("split", "e"), ("streaming", True))]
    with pytest.raises(BadInputError, match=r"^dataset:a/b, row 3: ConnectionError: gone$"):
        read_documents("dataset:a/b", BOS, 64, tokens=1000)
    monkeypatch.setattr(library, "__version__", "3.6.0", raising=False)
    with pytest.raises(UnsupportedError, match="may run code"):
        read_documents("dataset:a/b", BOS, 64, tokens=1000)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("anyquant.core.extras.importlib.import_module", absent)
    with pytest.raises(MissingExtraError, match=r"pip install 'anyquant\[datasets\]'"):
        read_documents("dataset:a/b", BOS, 64, tokens=1000)


def test_a_saved_data_set_is_read_without_the_hub(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    rows = {"text": ["first row", "", "second row"], "number": [1, 2, 3]}
    library.DatasetDict({"train": library.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "set")
    library.Dataset.from_dict({"messages": [CONVERSATION], "input_ids": [[1, 2]]}).save_to_disk(tmp_path / "chat")
    assert kind_of(tmp_path / "set" / "train") is Kind.SAVED
    assert read(tmp_path / "set" / "train") == [[256, *b"first row"], [256, *b"second row"]]
    assert read(tmp_path / "chat") == [list(b"[user]hi[assistant]hello")]
    with pytest.raises(UsageError, match="several splits; give one of them: train"):
        read(tmp_path / "set")
    for part in (tmp_path / "set" / "train").glob("*.arrow"):
        part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(AnyQuantError, match="train"):
        read(tmp_path / "set" / "train")
