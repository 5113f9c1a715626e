"""Tokenizers written to GGUF: the same ids from llama.cpp as from `tokenizers`, or a refusal that names the reason."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.formats.gguf.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    GGUFTokenizer,
    Pretokenizer,
    pretokenizers,
    read_tokenizer,
)
from anyquant.models.detect import detect
from anyquant.runtimes.llamacpp import LlamaCpp
from anyquant.store.open import open_checkpoint
from support.checkpoints import PROBE_TEXTS, STYLES, make_checkpoint
from support.tokenizers import train
from support.write import write

ROWS = 704


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-block llama whose embedding has a few more rows than the tokenizers here have tokens."""
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    config = {"vocab_size": ROWS, "intermediate_size": 64, "num_attention_heads": 2}
    return make_checkpoint(folder, "llama", blocks=1, hidden=64, config=config)


def with_tokenizer(model: Path, folder: Path, tokenizer: Tokenizer, settings: dict[str, Any] | None = None) -> Path:
    """A copy of `model` with another tokenizer."""
    shutil.copytree(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings or {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def with_stored(model: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of `model` with a changed tokenizer.json."""
    shutil.copytree(model, folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    change(stored)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


def read(folder: Path) -> GGUFTokenizer:
    return read_tokenizer(open_checkpoint(folder), ROWS)


def open_in_llama_cpp(folder: Path, out: Path) -> LlamaCpp:
    checkpoint = open_checkpoint(folder)
    write(checkpoint, detect(checkpoint), out, "f32")
    return LlamaCpp.open(out / "model.gguf", context=8, threads=1)


def splitter(row: Pretokenizer) -> Any:
    """The pre-tokenizer that a row of the table describes, built with `tokenizers`."""
    steps: list[Any] = []
    for step in row.steps:
        if step in ("gpt2", "bytes"):
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "gpt2"))
        elif step == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(step.removeprefix("split ")), behavior="isolated"))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


@pytest.mark.parametrize("row", pretokenizers(), ids=lambda row: f"{row.pre}-{len(row.steps)}")
def test_llama_cpp_splits_as_the_table_says(row: Pretokenizer, model: Path, tmp_path: Path) -> None:
    tokenizer = train(replace(STYLES["gpt2"], ignore_merges=row.ignore_merges))
    tokenizer.pre_tokenizer = splitter(row)
    folder = with_tokenizer(model, tmp_path / "in", tokenizer)
    assert read(folder).pre == row.pre
    with open_in_llama_cpp(folder, tmp_path / "out") as opened:
        for text in PROBE_TEXTS:
            assert opened.tokenize(text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_and_template(style: str, model: Path, tmp_path: Path) -> None:
    known = STYLES[style]
    tokenizer = train(known)
    settings = {"bos_token": known.bos, "eos_token": {"content": known.eos}, "chat_template": known.chat_template}
    folder = with_tokenizer(model, tmp_path / "in", tokenizer, settings)
    found = read(folder)
    assert found.adds_bos == known.adds_bos and not found.adds_eos
    assert found.special["eos"] == tokenizer.token_to_id(known.eos)
    if known.bos is not None:
        assert found.special["bos"] == tokenizer.token_to_id(known.bos)
    assert found.chat_template == known.chat_template
    size = tokenizer.get_vocab_size()
    assert [found.tokens[index] for index in range(size)] == [tokenizer.id_to_token(index) for index in range(size)]
    assert {found.types[tokenizer.token_to_id(token)] for token in known.special} == {CONTROL}
    assert set(found.types[size:]) == {UNUSED} and found.types.count(NORMAL) == size - len(known.special)
    text = f"some{known.eos}text {known.special[0]}x"
    with open_in_llama_cpp(folder, tmp_path / "out") as opened:
        assert opened.tokenize(text, parse_special=True) == tokenizer.encode(text).ids
    written = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert written.fields["tokenizer.ggml.tokens"].contents()[5] == found.tokens[5]
    assert ("tokenizer.chat_template" in written.fields) == (known.chat_template is not None)


def test_tokens_added_for_the_user_are_found_in_plain_text(model: Path, tmp_path: Path) -> None:
    tokenizer = train(STYLES["gpt2"], vocabulary=690)
    tokenizer.add_tokens(["<think>", "</think>"])
    folder = with_tokenizer(model, tmp_path / "in", tokenizer)
    assert read(folder).types[tokenizer.token_to_id("<think>")] == USER_DEFINED
    text = "a <think>river</think>\n"
    with open_in_llama_cpp(folder, tmp_path / "out") as opened:
        assert opened.tokenize(text) == tokenizer.encode(text).ids


def test_added_tokens_that_swallow_white_space_are_no_obstacle(model: Path, tmp_path: Path) -> None:
    """Phi-4-mini's <|tool|>: not special, with rstrip."""
    tokenizer = train(STYLES["gpt2"], vocabulary=690)
    tokenizer.add_tokens([AddedToken("<|tool|>", rstrip=True)])
    folder = with_tokenizer(model, tmp_path / "in", tokenizer)
    text = "a <|tool|>river</think>\n"
    with open_in_llama_cpp(folder, tmp_path / "out") as opened:
        assert opened.tokenize(text) == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("template", "eot"), [("{{ m }}<end>", "<end>"), ("{{ m }}<stop>", "<stop>"), (None, "<stop>")]
)
def test_every_stop_ends_a_generation_and_eot_ends_a_turn(
    template: str | None, eot: str, model: Path, tmp_path: Path
) -> None:
    tokenizer = train(STYLES["gpt2"], vocabulary=690)
    tokenizer.add_special_tokens(["<end>", "<stop>"])
    ids = [tokenizer.token_to_id(token) for token in ("<end>", "<stop>")]
    folder = with_tokenizer(model, tmp_path / "in", tokenizer, {"eos_token": "<end>", "chat_template": template})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    found = read(folder).special
    assert (found["eos"], found.get("eot")) == (ids[0], tokenizer.token_to_id(eot))
    with open_in_llama_cpp(folder, tmp_path / "out") as opened:
        assert all(opened.ends(token) for token in ids) and not opened.ends(5)


def test_both_spellings_of_merges_and_of_ids(model: Path, tmp_path: Path) -> None:
    def as_text(stored: dict[str, Any]) -> None:
        stored["model"]["merges"] = [" ".join(pair) for pair in stored["model"]["merges"]]

    folder = with_stored(model, tmp_path / "text", as_text)
    assert read(folder).merges == read(model).merges
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7], "pad_token_id": -1}))
    found = read(folder)
    assert (found.special["eos"], found.special["eot"]) == (9, 7)
    assert "pad" not in found.special


def test_the_template_file_wins(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }} ä")
    assert read(folder).chat_template == "{{ messages }} ä"


def pattern(stored: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["model"].update(type="Unigram"), "SentencePiece tokenizers are not written yet"),
        (lambda s: s["model"].update(byte_fallback=True), "SentencePiece tokenizers are not written yet"),
        (lambda s: s["model"].update(type="WordPiece"), "'WordPiece'"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda s: pattern(s).update(Regex=r"\w+|\W+"), r"\w+|\W+"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "add_prefix_space"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda s: s.update(post_processor={"type": "BertProcessing"}), "BertProcessing"),
        (lambda s: s.update(pre_tokenizer=None), "pre-tokenizer"),
        (lambda s: s["added_tokens"].append({"id": 5, "content": "x", "single_word": True}), "single_word"),
        (lambda s: s["added_tokens"].append({"id": ROWS - 1, "content": "a"}), "'a' has the ids"),
    ],
)
def test_other_tokenizers_are_refused_by_name(
    change: Callable[[dict[str, Any]], object], words: str, model: Path, tmp_path: Path
) -> None:
    folder = with_stored(model, tmp_path / "in", change)
    with pytest.raises(UnsupportedError) as caught:
        read(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_bad_input(model: Path) -> None:
    with pytest.raises(BadInputError, match="the embedding has 600 rows"):
        read_tokenizer(open_checkpoint(model), 600)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(normalizer=[]),
        lambda s: s.update(added_tokens=5),
        lambda s: s["model"].update(merges=True),
        lambda s: s["model"].update(vocab=[1]),
        lambda s: s.update(post_processor={"type": "Sequence", "processors": [1]}),
        lambda s: s.update(post_processor={"type": "TemplateProcessing", "single": "x"}),
        lambda s: s["pre_tokenizer"]["pretokenizers"].append("x"),
    ],
)
def test_a_damaged_tokenizer_is_bad_input(
    change: Callable[[dict[str, Any]], object], model: Path, tmp_path: Path
) -> None:
    folder = with_stored(model, tmp_path / "in", change)
    with pytest.raises(BadInputError, match=str(folder)):
        read(folder)


def test_sentencepiece_without_json_is_named(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        read(folder)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(UnsupportedError, match="SentencePiece"):
        read(folder)
