"""What a record (a line of a .jsonl file, a row of a data set) holds: a text, a conversation, or token ids.

The named field wins. Without it: "messages" or "conversations", rendered by the model's chat template, or "input_ids".
Conversations and ids are taken as they are: the model's prefix (BOS) stands in front where the template or whoever made
the ids put it, and in front of the later windows of such a record.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from anyquant.calibrate.text import Tokenizer
from anyquant.core.errors import BadInputError, UnsupportedError

SHORTEST_REST = 32  # tokens; a shorter rest of what was cut says little and is left out
OTHER_FIELDS = ("messages", "conversations", "input_ids")
# "from" of the ShareGPT layout -> role of a message
SPEAKERS = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant", "tool")}


def windows(pieces: Iterable[Sequence[int]], prefix: tuple[int, ...], context: int) -> Iterator[list[int]]:
    """Consecutive windows of `context` tokens, each with the prefix in front, once; a short last one is left out."""
    waiting: list[int] = []
    alone = True

    def front(start: int) -> tuple[int, ...]:
        return () if tuple(waiting[start : start + len(prefix)]) == prefix else prefix

    for piece in pieces:
        waiting += piece
        start = 0
        while (stop := start + context - len(front(start))) <= len(waiting):
            yield [*front(start), *waiting[start:stop]]
            start, alone = stop, False
        del waiting[:start]
    if len(waiting) >= SHORTEST_REST or (alone and waiting):
        yield [*front(0), *waiting]


def text_windows(pieces: Iterable[str], tokenizer: Tokenizer, context: int) -> Iterator[list[int]]:
    return windows(map(tokenizer.encode, pieces), tokenizer.prefix, context)


def id_windows(ids: Sequence[int], prefix: tuple[int, ...], context: int) -> Iterator[list[int]]:
    """Windows of complete ids: nothing is put in front unless they begin with the prefix themselves."""
    return windows([ids], prefix if tuple(ids[: len(prefix)]) == prefix else (), context)


def parsed(line: str, place: str) -> Any:
    """The JSON value of a line. Raises BadInputError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{place} is not JSON: {error}") from None


def record_windows(record: Any, place: str, tokenizer: Tokenizer, context: int, field: str) -> Iterator[list[int]]:
    """Windows of one record; none of an empty one. `place` names it in messages.

    Raises BadInputError for a record without any of it, UnsupportedError for a conversation without a template.
    """
    key, value = _held(record, field, place)
    if isinstance(value, str):
        return text_windows([_whole_characters(value, place)], tokenizer, context)
    if not value:
        return iter(())
    if isinstance(value[0], Mapping):
        if tokenizer.chat is None:
            raise UnsupportedError(f"{place} is a conversation, and this model has no chat template; give plain text")
        tools = record.get("tools")
        text = tokenizer.chat(_messages(value, place), tools if isinstance(tools, list) and tools else None, place)
        return id_windows(tokenizer.encode(_whole_characters(text, place)), tokenizer.prefix, context)
    mask = record.get("attention_mask") if key == "input_ids" else None
    return id_windows(_ids(value, mask, tokenizer.vocabulary, place), tokenizer.prefix, context)


def _held(record: Any, field: str, place: str) -> tuple[str, str | list[Any]]:
    """The first field that holds something, and what it holds."""
    if not isinstance(record, Mapping):
        raise BadInputError(f"{place} is a JSON {type(record).__name__}, expected an object with a field {field!r}")
    for key in (field, *OTHER_FIELDS):
        value = record.get(key)
        if isinstance(value, str | list):
            return key, value
        if value is not None:
            raise BadInputError(f"{place}: field {key!r} is {type(value).__name__}, expected a text or a list")
    known = ", ".join(sorted(map(str, record))) or "nothing"
    raise BadInputError(f"{place} has no text in field {field!r} (it has: {known}); name the field that holds it")


def _whole_characters(text: str, place: str) -> str:
    """`text`, unless an escape like \\ud800 put half a character into it: no tokenizer takes that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{place}: half a character (a lone surrogate) at position {error.start}") from None
    return text


def _messages(value: list[Any], place: str) -> list[dict[str, Any]]:
    """Messages with a role and a content that is one text; other keys stay, but for those without a value.

    Data sets write null into keys that another message has, and templates ask only whether a key is there.
    """
    messages = []
    for number, message in enumerate(value):
        where = f"{place}, message {number}"
        if not isinstance(message, Mapping):
            raise BadInputError(f"{where} is a {type(message).__name__}, expected an object with role and content")
        if "role" not in message and "from" in message:
            message = {"role": _speaker(message["from"], where), "content": message.get("value")}
        if not isinstance(message.get("role"), str):
            raise BadInputError(f"{where} has no role (it has: {', '.join(sorted(map(str, message))) or 'nothing'})")
        given = {str(key): item for key, item in message.items() if item is not None}
        if "content" not in given and "tool_calls" not in given:
            raise BadInputError(f"{where} ({given['role']}) has no content")
        messages.append({**given, "content": _content(given["content"], where) if "content" in given else None})
    return messages


def _speaker(name: Any, place: str) -> str:
    role = SPEAKERS.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadInputError(f"{place} is from {name!r}; known speakers: {', '.join(SPEAKERS)}")
    return role


def _content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadInputError(f"{place}: content is {type(content).__name__}, expected a text or a list of text parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadInputError(f"{place}: a part of its content is of type {kind!r}; only text is taken")
    return "".join(part["text"] for part in content)


def _ids(value: list[Any], mask: Any, vocabulary: int | None, place: str) -> list[int]:
    """The ids whose mask is not 0. Raises BadInputError naming the first that is none."""
    if mask is not None and (not isinstance(mask, list) or len(mask) != len(value)):
        found = f"{len(mask)} values" if isinstance(mask, list) else type(mask).__name__
        raise BadInputError(f"{place}: attention_mask has {found} for {len(value)} input_ids")
    kept = []
    for number, token in enumerate(value):
        if mask is not None and mask[number] == 0:
            continue
        if type(token) is not int or token < 0 or (vocabulary is not None and token >= vocabulary):
            known = "" if vocabulary is None else f"; the model has the ids 0 to {vocabulary - 1}"
            raise BadInputError(f"{place}, token {number}: {token!r} is no token id{known}")
        kept.append(token)
    return kept
