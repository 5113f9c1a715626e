"""JSON as the specification has it: no duplicate keys, no NaN, no lone surrogates, bounded size and depth."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

from anyquant.core.errors import BadInputError
from anyquant.store import limits


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = sorted(key for key, _ in pairs)
        twice = next(one for one, next_one in itertools.pairwise(names) if one == next_one)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return result


def _constant(text: str) -> Any:
    raise ValueError(f"the constant {text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def natural(text: str) -> int:
    """`parse_int` for headers in which every number is a count."""
    if text.startswith("-"):
        raise ValueError(f"the number {text} is negative")
    return int(text)


def _depth(value: Any) -> int:
    level, deepest = [value], 0
    while level:
        containers = [item for item in level if isinstance(item, dict | list)]
        deepest += bool(containers)
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return deepest


def parse_json(data: bytes, where: str, parse_int: Callable[[str], int] = int) -> dict[str, Any]:
    """The object written in `data` (UTF-8). `where` names the file in messages. Raises BadInputError."""
    if len(data) > limits.SMALL_FILE_BYTES and len(data) > limits.SAFETENSORS_HEADER_BYTES:
        raise BadInputError(f"{where}: {len(data)} bytes of JSON is more than a sound file has")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite, parse_int=parse_int
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise BadInputError(f"{where}: JSON nested deeper than {limits.JSON_DEPTH} levels") from None
    except ValueError as error:  # covers json.JSONDecodeError and UnicodeError
        raise BadInputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInputError(f"{where}: holds a JSON {type(value).__name__}, expected an object")
    if _depth(value) > limits.JSON_DEPTH:
        raise BadInputError(f"{where}: JSON nested deeper than {limits.JSON_DEPTH} levels")
    return value
