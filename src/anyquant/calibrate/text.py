"""Documents of token ids, and three disjoint splits of them: calibrate (statistics), select (search), certify (proof).

A Document is the unit of the later statistics: one window of at most `context` tokens. Windows of one `source` (a file
of a folder, a record, a row of an array) stay in one split. Of a single text file every window is its own source.
`calibrate.sources` reads them.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from anyquant.core.errors import BadInputError, InconclusiveError
from anyquant.core.extras import require
from anyquant.demo.text import split_documents

ENOUGH_TO_SELECT = 20  # documents
Chat = Callable[[list[dict[str, Any]], list[Any] | None, str], str]


@dataclass(frozen=True)
class Document:
    """`tokens` are the ids as the model gets them, special tokens included. `source`: see the module's text."""

    name: str
    tokens: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Tokenizer:
    """`encode` gives ids without special tokens; `prefix` is what the model expects in front (BOS), often empty.

    `suffix` is what the tokenizer puts after a complete text, nearly always empty. `chat` renders a conversation
    (messages, tools or None, the place to name in messages) as the model was trained to see it, special tokens
    included. `vocabulary` is the count of ids that the model knows; None: ids are not checked.
    """

    encode: Callable[[str], list[int]]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    chat: Chat | None = None
    vocabulary: int | None = None

    def whole(self, text: str) -> list[int]:
        """The ids of a complete text, special tokens included."""
        return [*self.prefix, *self.encode(text), *self.suffix]


@dataclass(frozen=True)
class Amounts:
    """Per split, in the order calibrate, select, certify: tokens at most, and documents at least.

    The tokens also give the shares in which a text is divided. 30 documents are the fewest that allow a verdict.
    """

    tokens: tuple[int, int, int] = (98304, 32768, 65536)
    documents: tuple[int, int, int] = (8, 8, 30)


class Splits(NamedTuple):
    """Three disjoint parts of the text."""

    calibrate: tuple[Document, ...]
    select: tuple[Document, ...]
    certify: tuple[Document, ...]


def load_tokenizer(content: bytes, location: str = "tokenizer.json") -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, through the `tokenizers` library; truncation and padding are switched off.

    Raises BadInputError when the content is not a tokenizer, MissingExtraError without the library.
    """
    library = require("tokenizers")
    try:
        loaded = library.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise BadInputError(f"{location} is not a tokenizer that the tokenizers library reads: {error}") from None
    loaded.no_truncation()
    loaded.no_padding()
    probe = "a"
    bare = loaded.encode(probe, add_special_tokens=False).ids
    full = loaded.encode(probe, add_special_tokens=True).ids
    if len(full) == len(bare):
        before = 0
    else:
        found = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        if not found:
            raise BadInputError(f"{location}: its post-processor changes the tokens of a text, not only adds to them")
        before = found[0]

    def encode(text: str) -> list[int]:
        ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
        return ids

    return Tokenizer(encode, tuple(full[:before]), tuple(full[before + len(bare) :]))


def within(tokenizer: Tokenizer, vocabulary: int) -> Tokenizer:
    """The tokenizer, bound to a model of that many ids: one beyond them is a BadInputError, not a crash later on."""

    def encode(text: str) -> list[int]:
        ids = tokenizer.encode(text)
        if ids and max(ids) >= vocabulary:
            raise BadInputError(
                f"the tokenizer gives the id {max(ids)}, the model's vocabulary has {vocabulary}: "
                "the tokenizer belongs to another model"
            )
        return ids

    return replace(tokenizer, encode=encode, vocabulary=vocabulary)


def demo_splits(tokenizer: Tokenizer, context: int, tokens: int | None = None) -> Splits:
    """The demo's held-out topics, each one document: its first `context` tokens. `tokens` to calibrate with, about."""

    def part(split: str) -> tuple[Document, ...]:
        texts = split_documents(split)
        return tuple(Document(text.name, tuple(tokenizer.whole(text.text)[:context]), text.name) for text in texts)

    calibrate = part("calibrate")
    if tokens is not None:
        calibrate = _bounded(calibrate, tokens, Amounts().documents[0])
    return Splits(calibrate, part("select"), part("certify"))


def split(documents: Sequence[Document], amounts: Amounts | None = None) -> Splits:
    """Divide in order: calibrate first, then select, then certify; no source is in two of them.

    Raises InconclusiveError when there are too few documents.
    """
    amounts = amounts or Amounts()
    first, second = _boundaries(documents, amounts)
    parts = (documents[:first], documents[first:second], documents[second:])
    if any(len(part) < least for part, least in zip(parts, amounts.documents, strict=True)):
        counts = ", ".join(f"{name} {len(part)}" for name, part in zip(Splits._fields, parts, strict=True))
        needed = ", ".join(f"{name} {least}" for name, least in zip(Splits._fields, amounts.documents, strict=True))
        raise InconclusiveError(
            f"too little text for three disjoint splits: {len(documents)} documents ({counts}), needed are at least "
            f"{sum(amounts.documents)} ({needed}); give a longer text, more files, or a shorter context"
        )
    bounded = [
        _bounded(part, tokens, least)
        for part, tokens, least in zip(parts, amounts.tokens, amounts.documents, strict=True)
    ]
    return Splits(*bounded)


def digest(documents: Iterable[Document]) -> str:
    """sha256 (hex) of the token ids and the borders between documents; names and places do not matter."""
    state = hashlib.sha256()
    for document in documents:
        state.update(len(document.tokens).to_bytes(8, "little"))
        state.update(np.asarray(document.tokens, dtype="<u4").tobytes())
    return state.hexdigest()


def token_count(documents: Iterable[Document]) -> int:
    return sum(len(document.tokens) for document in documents)


def _boundaries(documents: Sequence[Document], amounts: Amounts) -> tuple[int, int]:
    """Where select and certify begin: by the shares, at least the fewest documents, and where a source begins."""
    count = len(documents)
    total = sum(amounts.tokens)
    certify = max(amounts.documents[2], round(count * amounts.tokens[2] / total))
    select = max(amounts.documents[1], round(count * amounts.tokens[1] / total))
    # few documents make a search less sure of what it promises than fewer to calibrate on would
    select = max(select, min(ENOUGH_TO_SELECT, count - certify - amounts.documents[0]))
    second = _source_start(documents, max(0, count - certify))
    first = _source_start(documents, max(0, second - select))
    return first, second


def _source_start(documents: Sequence[Document], index: int) -> int:
    """`index`, moved back to the first window of its source."""
    while 0 < index < len(documents) and documents[index].source == documents[index - 1].source:
        index -= 1
    return index


def _bounded(documents: Sequence[Document], tokens: int, least: int) -> tuple[Document, ...]:
    """The first documents, `tokens` in all (the last may go over) and `least` of them at least."""
    taken: list[Document] = []
    total = 0
    for document in documents:
        if total >= tokens and len(taken) >= least:
            break
        taken.append(document)
        total += len(document.tokens)
    return tuple(taken)


def up_to(documents: Iterable[Document], tokens: int | None) -> list[Document]:
    """The first documents, as far as the one that reaches `tokens` in all; None takes them all."""
    taken: list[Document] = []
    total = 0
    for document in documents:
        taken.append(document)
        total += len(document.tokens)
        if tokens is not None and total >= tokens:
            break
    return taken
