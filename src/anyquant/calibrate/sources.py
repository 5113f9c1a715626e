"""Where documents come from: text files, folders, JSONL records, arrays of token ids, data sets.

A window whose tokens repeat an earlier one's is left out: it would carry text from one split into another, and count as
evidence of its own. A window of one token is left out too: nothing in it is predicted.
"""

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.calibrate import hub
from anyquant.calibrate.records import id_windows, parsed, record_windows, text_windows, windows
from anyquant.calibrate.text import Document, Tokenizer, digest, up_to
from anyquant.core.errors import BadInputError, UsageError

LEAST_CONTEXT = 32
FIELD = "text"  # of a record, unless another is named
_PIECE = 1 << 18  # characters tokenized at once, so that a huge file costs only what the budget takes from it


class Kind(StrEnum):
    """What a source is; the words stand in the report."""

    FILE = "text file"
    FOLDER = "folder of text files"
    RECORDS = "JSONL records"
    ARRAY = "array of token ids"
    SAVED = "data set on disk"
    HUB = "data set of the Hugging Face Hub"


def kind_of(where: str | Path) -> Kind:
    """By prefix, kind of folder, and suffix; reads no content. Raises UsageError for a malformed data set name."""
    if hub.is_name(where):
        hub.parse_name(str(where))
        return Kind.HUB
    path = Path(where)
    if path.is_dir():
        return Kind.SAVED if hub.is_saved(path) else Kind.FOLDER
    return {".jsonl": Kind.RECORDS, ".npy": Kind.ARRAY}.get(path.suffix.lower(), Kind.FILE)


def require_source(where: str) -> None:
    """Raise UsageError for a malformed data set name, BadInputError for a path that is not there. No network."""
    if kind_of(where) is not Kind.HUB and not Path(where).exists():
        raise BadInputError(f"the text {where} does not exist")


def read_documents(
    where: str | Path, tokenizer: Tokenizer, context: int, tokens: int | None = None, field: str = FIELD
) -> list[Document]:
    """The documents of a source: see `Kind`; of records and data sets `field`, or what `records` finds without it.

    No two have the same tokens. `context`: tokens of a window at most, prefix included. `tokens`: stop reading when
    there are this many. Only a name with `hub.PREFIX` in front uses the network.
    Raises BadInputError (naming file and line, row or place) for what cannot be read, UsageError for a missing path,
    an empty folder or a wrong name, UnsupportedError for conversations without a template.
    """
    if context < LEAST_CONTEXT:
        raise UsageError(f"a context of {context} tokens is too short to measure on; use at least {LEAST_CONTEXT}")
    kind = kind_of(where)
    path = Path(where)
    if kind is not Kind.HUB and not path.exists():
        raise BadInputError(
            f"no text at {path}; give a text file, a folder of .txt or .md files, a .jsonl or .npy file, "
            f"or {hub.PREFIX}NAME"
        )
    if field != FIELD and kind in (Kind.FILE, Kind.FOLDER, Kind.ARRAY):
        raise UsageError(f"{path} is a {kind}, which has no fields; leave out --text-field {field}")
    if kind is Kind.FOLDER:
        documents = _folder(path, tokenizer, context)
    elif kind is Kind.ARRAY:
        documents = _array(path, tokenizer, context)
    elif kind is Kind.FILE:
        cut = text_windows(_pieces(path), tokenizer, context)
        documents = (_document(path.name, number, ids, f"{path.name}#{number}") for number, ids in enumerate(cut))
    else:
        if kind is Kind.HUB and tokens is None:
            raise UsageError(f"{where}: say how much of the data set to read with --tokens N")
        rows = _lines(path) if kind is Kind.RECORDS else hub.rows(where)
        documents = _records(rows, tokenizer, context, field)
    return up_to(_distinct(documents), tokens)


def _distinct(documents: Iterator[Document]) -> Iterator[Document]:
    seen = set()
    for document in documents:
        key = digest([document])
        if key not in seen and len(document.tokens) > 1:
            seen.add(key)
            yield document


def _document(name: str, number: int, ids: list[int], source: str) -> Document:
    return Document(f"{name} window {number}", tuple(ids), source)


def _pieces(path: Path) -> Iterator[str]:
    """The file's text in pieces that end with a line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while lines := file.readlines(_PIECE):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    except OSError as error:
        raise BadInputError(f"cannot read the text {path}: {error.strerror}") from None


def _folder(path: Path, tokenizer: Tokenizer, context: int) -> Iterator[Document]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in {".txt", ".md"} and file.is_file())
    if not files:
        raise UsageError(f"no .txt or .md file in the folder {path}; give one that holds text")
    for file in files:
        name = file.relative_to(path).as_posix()
        for number, ids in enumerate(text_windows(_pieces(file), tokenizer, context)):
            yield _document(name, number, ids, name)


def _lines(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(name, place, record) of every line that is not empty."""
    number = 0
    for piece in _pieces(path):
        for line in piece.removesuffix("\n").split("\n"):  # splitlines would also cut inside a string, at U+2028
            number += 1
            if line.strip():
                place = f"{path}, line {number}"
                yield f"{path.name} line {number}", place, parsed(line, place)


def _records(
    rows: Iterator[tuple[str, str, Any]], tokenizer: Tokenizer, context: int, field: str
) -> Iterator[Document]:
    for name, place, record in rows:
        for window, ids in enumerate(record_windows(record, place, tokenizer, context, field)):
            yield _document(name, window, ids, name)


def _array(path: Path, tokenizer: Tokenizer, context: int) -> Iterator[Document]:
    """Of a 1-D array consecutive windows, the prefix in front of each; of a 2-D array every row as it is."""
    array = _open_array(path)
    if array.ndim == 1:
        size = max(1, min(len(array), _PIECE))
        pieces = (
            _checked(array[start : start + size], tokenizer.vocabulary, f"{path}, element", start)
            for start in range(0, len(array), size)
        )
        for number, ids in enumerate(windows(pieces, tokenizer.prefix, context)):
            yield _document(path.name, number, ids, f"{path.name}#{number}")
        return
    for row in range(len(array)):
        name = f"{path.name} row {row}"
        row_ids = _checked(array[row], tokenizer.vocabulary, f"{path}, row {row}, column", 0)
        for number, ids in enumerate(id_windows(row_ids, tokenizer.prefix, context)):
            yield _document(name, number, ids, name)


def _open_array(path: Path) -> np.ndarray[Any, Any]:
    """Mapped, not loaded: only what is taken is read."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise BadInputError(f"{path} is not an array that NumPy reads without pickle: {error}") from None
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise BadInputError(f"{path} is {array.ndim}-D of {array.dtype}; token ids are a 1-D or 2-D array of integers")
    return array


def _checked(ids: np.ndarray[Any, Any], vocabulary: int | None, place: str, start: int) -> list[int]:
    wrong = ids < 0 if vocabulary is None else (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        at = int(wrong.argmax())
        known = "" if vocabulary is None else f"; the model has the ids 0 to {vocabulary - 1}"
        raise BadInputError(f"{place} {start + at}: {int(ids[at])} is no token id{known}")
    found: list[int] = ids.tolist()
    return found
