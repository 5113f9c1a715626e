"""Conversations to text through the template that came with the model, exactly as `transformers` renders it.

Source: transformers, utils/chat_template_utils.py (version 5): a sandbox in which templates change nothing, blocks
trimmed, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop controls, {% generation %} as nothing.
One thing differs: `strftime_now` gives a fixed day, so that the same text has the same tokens tomorrow.
"""

import datetime
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from anyquant.calibrate.text import Chat
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.core.extras import require
from anyquant.store.strict_json import parse_json

TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)  # what Llama 3's template takes where no clock is
SPECIALS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def chat_of(checkpoint: Checkpoint) -> Chat:
    """The renderer of the checkpoint's template; nothing is read before the first conversation.

    It raises UnsupportedError when there is no template, BadInputError when the template is broken or refuses a
    conversation.
    """

    @cache
    def named() -> tuple[dict[str, str], dict[str, str]]:
        return _templates(checkpoint), _specials(checkpoint)

    @cache
    def compiled(name: str) -> Any:
        return _compile(named()[0][name], checkpoint.location)

    def render(messages: list[dict[str, Any]], tools: list[Any] | None, place: str) -> str:
        templates, specials = named()
        name = "tool_use" if tools and "tool_use" in templates else "default"
        if name not in templates:
            others = f", only templates named {', '.join(sorted(templates))}" if templates else ""
            raise UnsupportedError(
                f"{place} is a conversation, and {checkpoint.location} has no chat template{others}; "
                "give plain text, or name the field that holds it"
            )
        try:
            text = compiled(name).render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=False, **specials
            )
        except BadInputError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadInputError(f"{place}: the chat template of {checkpoint.location} refuses it: {reason}") from None
        return str(text)

    return render


def _json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    data = checkpoint.text_file(name)
    return {} if data is None else parse_json(data, f"{checkpoint.location}/{name}")


def _templates(checkpoint: Checkpoint) -> dict[str, str]:
    """By name. A file of its own wins over tokenizer_config.json, and that over the older chat_template.json."""
    data = checkpoint.text_file("chat_template.jinja")
    if data is not None:
        try:
            return {"default": data.decode("utf-8")}
        except UnicodeDecodeError:
            raise BadInputError(f"{checkpoint.location}/chat_template.jinja is not UTF-8 text") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _json(checkpoint, name).get("chat_template")
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):
            named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
            return {str(key): text for key, text in named.items() if isinstance(text, str)}
    return {}


def _specials(checkpoint: Checkpoint) -> dict[str, str]:
    """bos_token, eos_token ... as texts; the older special_tokens_map.json where tokenizer_config.json is silent."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = _json(checkpoint, name)
        for key in SPECIALS:
            value = settings.get(key)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _compile(template: str, location: str) -> Any:
    jinja2, sandbox, extension = require("jinja2"), require("jinja2.sandbox"), require("jinja2.ext")

    class Generation(extension.Extension):  # type: ignore[misc,name-defined]
        """{% generation %} marks what the assistant said; the text itself is the same."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extension.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    try:
        return environment.from_string(template)
    except Exception as error:  # not only TemplateSyntaxError: depth, and what the optimizer computes
        raise BadInputError(f"the chat template of {location} is broken: {' '.join(str(error).split())}") from None
