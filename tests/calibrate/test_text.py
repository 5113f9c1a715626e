"""Sources, windows, splits."""

import json
from pathlib import Path

import pytest
import tokenizers

from anyquant.calibrate.sources import read_documents
from anyquant.calibrate.text import (
    Amounts,
    Document,
    Tokenizer,
    demo_splits,
    digest,
    load_tokenizer,
    split,
    token_count,
)
from anyquant.core.errors import BadInputError, InconclusiveError, UsageError

BYTES = Tokenizer(lambda text: list(text.encode()))
BOS = Tokenizer(lambda text: list(text.encode()), prefix=(256,))


def many(count: int, source: str | None = None, length: int = 100) -> list[Document]:
    return [Document(f"d{i}", tuple(range(i, i + length)), source or f"d{i}") for i in range(count)]


def test_a_file_is_cut_into_consecutive_windows(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    documents = read_documents(tmp_path / "a.txt", BOS, context=65)
    assert all(document.tokens[0] == 256 and len(document.tokens) <= 65 for document in documents)
    joined = b"".join(bytes(document.tokens[1:]) for document in documents)
    assert text.encode().startswith(joined) and len(text) - len(joined) < 32
    assert len({document.source for document in documents}) == len(documents)
    few = read_documents(tmp_path / "a.txt", BOS, context=65, tokens=130)
    assert few == documents[:2]


def test_a_folder_keeps_a_file_together(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    letters = "".join(chr(33 + place % 90) for place in range(200))
    (tmp_path / "b.txt").write_text(letters)
    (tmp_path / "deep" / "a.md").write_text("a" * 100)
    (tmp_path / "c.bin").write_text("c" * 100)
    documents = read_documents(tmp_path, BYTES, context=64)
    assert [document.source for document in documents] == ["b.txt"] * 3 + ["deep/a.md"] * 2
    with pytest.raises(UsageError, match=r"no .txt or .md file"):
        (tmp_path / "empty").mkdir()
        read_documents(tmp_path / "empty", BYTES, context=64)


def test_text_that_repeats_counts_once(tmp_path: Path) -> None:
    """The same words in two splits would be no proof, nor thirty times the same document thirty documents."""
    first, second = ({"text": f"{word} " * 20} for word in ("one", "two"))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(record) for record in [first, second] * 30))
    assert [d.name for d in read_documents(tmp_path / "t.jsonl", BOS, 512)] == [
        "t.jsonl line 1 window 0",
        "t.jsonl line 2 window 0",
    ]
    (tmp_path / "a.txt").write_text("0123456789abcdef" * 600)
    assert len(read_documents(tmp_path / "a.txt", BYTES, 64)) == 1
    (tmp_path / "b.txt").write_text("0123456789abcdef" * 400)
    (tmp_path / "a.txt").unlink()
    assert len(read_documents(tmp_path, BYTES, 64)) == 1


def test_jsonl_records(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        json.dumps({"body": "x" * 40}) + "\n\n" + json.dumps({"body": "y\u2028z" * 12}, ensure_ascii=False) + "\n"
    )
    documents = read_documents(path, BYTES, context=64, field="body")
    assert [(d.source, len(d.tokens)) for d in documents] == [("t.jsonl line 1", 40), ("t.jsonl line 3", 60)]
    with pytest.raises(BadInputError, match=r"line 1 has no text in field 'text' \(it has: body\)"):
        read_documents(path, BYTES, context=64)
    path.write_text("{broken\n")
    with pytest.raises(BadInputError, match="line 1 is not JSON"):
        read_documents(path, BYTES, context=64)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(BadInputError, match="not UTF-8"):
        read_documents(tmp_path / "a.txt", BYTES, context=64)
    with pytest.raises(BadInputError, match="no text at"):
        read_documents(tmp_path / "missing.txt", BYTES, context=64)
    with pytest.raises(UsageError, match="too short"):
        read_documents(tmp_path / "a.txt", BYTES, context=8)


def test_splits_are_disjoint_in_order_and_bounded() -> None:
    documents = many(300)
    splits = split(documents, Amounts(tokens=(8000, 1000, 4000), documents=(8, 8, 30)))
    assert token_count(splits.calibrate) == 8000 and token_count(splits.select) == 1000
    assert token_count(splits.certify) == 4000
    order = [documents.index(document) for part in splits for document in part]
    assert order == sorted(set(order))
    assert splits == split(documents, Amounts(tokens=(8000, 1000, 4000), documents=(8, 8, 30)))


def test_the_fewest_documents_that_do() -> None:
    splits = split(many(46))
    assert tuple(map(len, splits)) == (8, 8, 30)
    with pytest.raises(InconclusiveError, match=r"45 documents .*calibrate 7.*at least 46 .*certify 30"):
        split(many(45))


def test_windows_of_one_source_stay_in_one_split() -> None:
    documents = [d for i in range(12) for d in many(10, source=f"file {i}")]
    splits = split(documents)
    sources = [{document.source for document in part} for part in splits]
    assert not (sources[0] & sources[1] or sources[1] & sources[2] or sources[0] & sources[2])
    with pytest.raises(InconclusiveError, match="120 documents"):
        split(many(120, source="one file"))


def test_digest_depends_on_tokens_and_borders_only() -> None:
    one, two = Document("a", (1, 2), "a"), Document("b", (3,), "b")
    assert digest([one, two]) == digest([Document("x", (1, 2), "y"), two])
    assert digest([one, two]) != digest([Document("a", (1,), "a"), Document("b", (2, 3), "b")])
    assert digest([one, two]) != digest([two, one])


def trained(with_specials: bool) -> bytes:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["some text to merge, some text to read"] * 3, trainer)
    if with_specials:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    content: str = tokenizer.to_str()
    return content.encode()


@pytest.mark.parametrize("with_specials", [True, False])
def test_tokenizer_adds_what_its_post_processor_adds(with_specials: bool) -> None:
    tokenizer = load_tokenizer(trained(with_specials))
    oracle = tokenizers.Tokenizer.from_str(trained(with_specials).decode())
    oracle.no_truncation()
    oracle.no_padding()
    text = "some text to read: äöü and more than four tokens"
    assert tokenizer.whole(text) == oracle.encode(text).ids
    assert (tokenizer.prefix, tokenizer.suffix) == (((0,), (1,)) if with_specials else ((), ()))


def test_a_broken_tokenizer_is_one_line() -> None:
    with pytest.raises(BadInputError, match=r"x/tokenizer.json is not a tokenizer"):
        load_tokenizer(b"{}", "x/tokenizer.json")
    with pytest.raises(BadInputError, match="not a tokenizer"):
        load_tokenizer(b"\xff\x00")


def test_demo_splits_are_cut_at_the_context() -> None:
    splits = demo_splits(BOS, context=512)
    assert demo_splits(BOS, 512, tokens=1).calibrate == splits.calibrate[:8]
    assert len(splits.certify) >= 30
    lengths = [len(document.tokens) for part in splits for document in part]
    assert max(lengths) == 512 and min(lengths) > 100
    assert all(document.tokens[0] == 256 for part in splits for document in part)
