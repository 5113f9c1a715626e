"""Text that every CPython carries, read when it is needed: docstrings of the standard library, topics of `pydoc`.

The topics named here are held out from the training of the demo model; they are its calibrate, select and certify text.
A topic that repeats parts of another ("compound" holds "while" word for word) is never in a different split, and the
training text loses every paragraph that a held-out topic contains. "debugger" is not held out: pdb repeats it.
"""

import ast
import importlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anyquant.core.errors import BadInputError, UsageError

HELD_OUT: dict[str, tuple[str, ...]] = {
    "calibrate": (
        "customization", "formatstrings", "execmodel", "operator-summary", "bltin-code-objects", "lists",
        "imaginary", "break", "continue", "typesfunctions", "numbers", "pass", "await",
    ),
    "select": (
        "typesseq", "assignment", "try", "sequence-types", "for", "typesmethods", "booleans", "power", "typesmodules",
        "bitwise", "atom-literals", "if", "shifting", "lambda",
    ),
    "certify": (
        "string-methods", "attribute-access", "typesmapping", "comparisons", "strings", "import", "calls", "function",
        "identifiers", "numeric-types", "objects", "async", "raise", "binary", "with", "class", "subscriptions",
        "dict", "slicings", "global", "specialattrs", "integers", "atom-identifiers", "exprlists", "assert", "return",
        "del", "nonlocal", "truth", "attribute-references", "unary", "yield", "while", "conversions",
    ),
}  # fmt: skip

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"})
_PARAGRAPH = 60  # shorter repeated paragraphs are headings and stock phrases, not leaked text


@dataclass(frozen=True)
class Text:
    """One document: where it comes from, and its whole text."""

    name: str
    text: str


def split_documents(split: str) -> list[Text]:
    """The held-out topics of "calibrate", "select" or "certify", in the order of `HELD_OUT`.

    Raises UsageError for another split, BadInputError when this Python does not carry the topics.
    """
    if split not in HELD_OUT:
        raise UsageError(f"unknown split {split!r} of the demo's text; known: {', '.join(HELD_OUT)}")
    topics = _topics()
    missing = [name for name in HELD_OUT[split] if not topics.get(name, "").strip()]
    if missing:
        raise BadInputError(
            f"this Python's pydoc_data.topics lacks {', '.join(missing)}, the demo's {split} text; "
            "give a text of your own with --text FILE"
        )
    return [Text(f"pydoc topic {name}", topics[name].strip() + "\n") for name in HELD_OUT[split]]


def training_documents() -> list[str]:
    """Docstrings of the standard library, one document per module, then the topics that are not held out.

    Every paragraph that also stands in a held-out topic is left out. Raises BadInputError as `split_documents` does.
    """
    held_out = [document for split in HELD_OUT for document in split_documents(split)]
    forbidden = {key for document in held_out for key in _paragraph_keys(document.text)}
    names = {name for split in HELD_OUT.values() for name in split}
    topics = [text for name, text in sorted(_topics().items()) if name not in names]
    texts = [_without(text, forbidden) for text in (*_module_texts(), *topics)]
    return [text for text in texts if len(text) >= _PARAGRAPH]


def _topics() -> dict[str, str]:
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ModuleNotFoundError:
        raise BadInputError(
            "this Python comes without pydoc_data.topics, the demo's text; give a text of your own with --text FILE"
        ) from None
    return dict(module.topics)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _key(paragraph: str) -> str:
    return re.sub(r"\s+", " ", paragraph).strip()


def _paragraph_keys(text: str) -> set[str]:
    return {key for key in map(_key, _paragraphs(text)) if len(key) >= _PARAGRAPH}


def _without(text: str, forbidden: set[str]) -> str:
    kept = [paragraph.rstrip() for paragraph in _paragraphs(text) if _key(paragraph) not in forbidden]
    return "\n\n".join(kept).strip() + "\n"


def _module_texts() -> Iterator[str]:
    """The public docstrings of each module's source file, never imported, in the order of the file names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED_FOLDERS.intersection(parts) or path.name == "topics.py":
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue  # a broken file in somebody's Python is no reason to stop
        yield "\n\n".join(_docstrings(tree, ".".join(parts).removesuffix(".py").removesuffix(".__init__")))


def _docstrings(node: ast.Module | ast.ClassDef, owner: str) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield f"{owner}\n\n{text}"
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_") and not child.name.startswith("__"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{owner}.{child.name}")
            continue
        text = ast.get_docstring(child)
        if text:
            yield f"{child.name}({ast.unparse(child.args)})\n\n{text}"
