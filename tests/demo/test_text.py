"""The demo's text: held-out topics are there, are apart, and are not in the training text."""

import re
import sys
from types import ModuleType

import pytest

from anyquant.core.errors import BadInputError, UsageError
from anyquant.demo.text import HELD_OUT, split_documents, training_documents


def shingles(text: str) -> set[str]:
    """Runs of twelve words."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 12]) for i in range(len(words) - 11)}


def test_every_split_has_its_documents() -> None:
    counts = {split: len(split_documents(split)) for split in HELD_OUT}
    assert counts["certify"] >= 30 and counts["select"] >= 12 and counts["calibrate"] >= 12
    names = [name for split in HELD_OUT.values() for name in split]
    assert len(set(names)) == len(names)
    with pytest.raises(UsageError, match="calibrate, select, certify"):
        split_documents("train")


def test_splits_share_no_text() -> None:
    found = {split: set().union(*(shingles(d.text) for d in split_documents(split))) for split in HELD_OUT}
    for one in HELD_OUT:
        for other in HELD_OUT:
            if one < other:
                shared = found[one] & found[other]
                assert len(shared) <= 0.01 * min(len(found[one]), len(found[other])), (one, other, len(shared))


def test_training_text_is_large_and_holds_no_held_out_paragraph() -> None:
    training = training_documents()
    assert sum(map(len, training)) > 1_000_000
    seen = set().union(*map(shingles, training))
    for split in HELD_OUT:
        for document in split_documents(split):
            own = shingles(document.text)
            assert len(own & seen) <= 0.1 * len(own) + 5, document.name


def test_a_python_without_the_topics_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = ModuleType("pydoc_data.topics")
    empty.topics = {"assert": "text"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", empty)
    with pytest.raises(BadInputError, match=r"lacks string-methods.*--text FILE"):
        split_documents("certify")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(BadInputError, match=r"without pydoc_data.*--text FILE"):
        split_documents("certify")
