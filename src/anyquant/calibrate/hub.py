"""Data sets of the `datasets` library: a folder that `save_to_disk` wrote, or one of the Hugging Face Hub by its name.

A name is written `dataset:NAME[:CONFIG][@REVISION][#SPLIT]`, e.g. `dataset:Salesforce/wikitext:wikitext-2-v1#test`.
The prefix keeps it apart from every path. It is the only source of text that uses the network, and no code that a data
set brings is run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.extras import require

PREFIX = "dataset:"
SPLIT = "train"
FIRST_WITHOUT_SCRIPTS = 4  # earlier versions of the library may run code that a data set brings
_NAME = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:@#]+))?(?:@(?P<revision>[^@#]+))?(?:#(?P<split>[^#]+))?"
)


@dataclass(frozen=True)
class HubName:
    """`revision` None is the newest: it may change from one day to the next."""

    name: str
    config: str | None
    revision: str | None
    split: str


def is_name(where: str | Path) -> bool:
    """Whether a data set of the Hub is named, and not a path."""
    return str(where).startswith(PREFIX)


def parse_name(text: str) -> HubName:
    """Raises UsageError for what does not follow the form."""
    match = _NAME.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        raise UsageError(f"{text!r} is no name of a data set; write {PREFIX}NAME[:CONFIG][@REVISION][#SPLIT]")
    return HubName(match["name"], match["config"], match["revision"], match["split"] or SPLIT)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the library wrote this folder: one split, or several in folders of their own."""
    single = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def rows(where: str | Path) -> Iterator[tuple[str, str, Any]]:
    """(name, place, row) one by one, of a folder for which `is_saved` holds or of a name of the Hub.

    Raises BadInputError for what the library cannot read, MissingExtraError without it.
    """
    where = str(where)
    found = _streamed(where) if is_name(where) else _saved(Path(where))
    title = where if is_name(where) else Path(where).name
    number = 0
    try:
        for row in found:
            yield f"{title} row {number}", f"{where}, row {number}", row
            number += 1
    except Exception as error:  # whatever the network, the decompression or the reader of the files raises
        raise BadInputError(f"{where}, row {number}: {_reason(error)}") from None


def _library() -> Any:
    library = require("datasets")
    if int(library.__version__.split(".")[0]) < FIRST_WITHOUT_SCRIPTS:
        raise UnsupportedError(
            f"datasets {library.__version__} may run code that a data set brings; "
            f"run: pip install 'datasets>={FIRST_WITHOUT_SCRIPTS}'"
        )
    return library


def _saved(folder: Path) -> Any:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_saved(path))
        raise UsageError(f"{folder} holds several splits; give one of them: {', '.join(splits) or 'none is complete'}")
    library = _library()
    try:
        return library.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # as above
        raise BadInputError(f"{folder} is no data set that the datasets library reads: {_reason(error)}") from None


def _streamed(where: str) -> Any:
    wanted = parse_name(where)
    if Path(wanted.name).exists():
        # the library would read that instead of asking the Hub
        raise UsageError(f"{where}: there is a {wanted.name} here; give its path, or run from another folder")
    library = _library()
    try:
        return library.load_dataset(
            wanted.name, wanted.config, split=wanted.split, revision=wanted.revision, streaming=True
        )
    except Exception as error:  # as above
        raise BadInputError(
            f"cannot load {where}: {_reason(error)}; check the name, the split, and that the Hub can be reached"
        ) from None


def _reason(error: Exception) -> str:
    """The first line of an error, and its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
