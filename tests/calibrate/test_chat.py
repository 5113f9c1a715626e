"""Conversations: the ids are those of `transformers`, template by template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
import transformers

from anyquant.calibrate.chat import chat_of
from anyquant.calibrate.sources import read_documents
from anyquant.calibrate.text import Tokenizer, load_tokenizer
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError

CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
    {{- 'tools ' + tools | tojson(indent=1) }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.tool_calls %}
        {{- '<tool>' + message.tool_calls | tojson + '</tool>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- generation %}{{ message.content }}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'never' }}{% endif %}"""
LLAMA = """{{ bos_token }}{% for message in messages %}
    {% if message.role not in ['user', 'assistant'] %}
        {{ raise_exception('only user & assistant, not ' + message.role) }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ message['content'] | trim }} [/INST]
    {% else %}
 {{ message['content'] }}{{ eos_token }}
    {% endif %}
{% endfor %}"""
TURNS = [
    {"role": "user", "content": "  What is <b>read</b>? "},
    {"role": "assistant", "content": "some text\n\nto merge: äöü"},
    {"role": "user", "content": "a second <|im_end|> question"},
    {"role": "assistant", "content": "the model reads it"},
]
SYSTEM = {"role": "system", "content": "You merge."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f<é>", "arguments": {"a": 1}}}]}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "ü", "parameters": {}}}]


@dataclass(frozen=True)
class Folder:
    """What a checkpoint is to its tokenizer."""

    path: Path

    @property
    def location(self) -> str:
        return self.path.name

    def text_file(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.exists() else None


@pytest.fixture(scope="module")
def content() -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text to merge, some text to read, user assistant system"] * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return cast(str, tokenizer.to_str())


def write(folder: Path, content: str, template: object, **settings: object) -> Folder:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    config["bos_token"] = {
        "content": "<s>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "__type": "AddedToken",
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return Folder(folder)


def loaded(folder: Folder, content: str) -> Tokenizer:
    return replace(load_tokenizer(content.encode()), chat=chat_of(cast(Checkpoint, folder)))


def ids(folder: Folder, content: str, messages: Sequence[Mapping[str, Any]], **record: object) -> list[int]:
    path = folder.path / "t.jsonl"
    path.write_text(json.dumps({"messages": messages, **record}))
    (document,) = read_documents(path, loaded(folder, content), context=4096)
    return list(document.tokens)


@pytest.mark.parametrize("form", ["config", "file", "list"])
@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (CHATML, TURNS, None),
        (CHATML, [SYSTEM, *TURNS, CALL], TOOLS),
        (LLAMA, TURNS, None),
    ],
)
def test_ids_are_those_of_transformers(
    tmp_path: Path, content: str, form: str, template: str, messages: list[dict[str, Any]], tools: list[Any] | None
) -> None:
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": template + "!"}]
    folder = write(tmp_path / "m", content, {"config": template, "list": named}.get(form, "not this one"))
    if form == "file":
        (folder.path / "chat_template.jinja").write_text(template)
    oracle = transformers.AutoTokenizer.from_pretrained(folder.path)
    expected = oracle.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    found = ids(folder, content, messages, **({} if tools is None else {"tools": tools}))
    assert found == expected
    assert found.count(0) == (template is LLAMA)  # BOS where the template has it, never twice
    assert found.count(1) == (2 if template is LLAMA else 0)
    assert found.count(3) >= 1


def test_templates_of_a_processor_and_older_maps(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "m", content, None, bos_token=None)
    (folder.path / "chat_template.json").write_text(json.dumps({"chat_template": LLAMA}))
    (folder.path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert ids(folder, content, TURNS)[0] == 0


def test_the_day_is_always_the_same(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "m", content, "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert ids(folder, content, TURNS[:1]) == load_tokenizer(content.encode()).encode(
        "26 Jul 2024 " + TURNS[0]["content"]
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LLAMA, r"t.jsonl, line 1: the chat template of m refuses it: only user & assistant, not system"),
        ("{% for %}", "chat template of m is broken"),
        ("{{ messages[0].content.missing.more }}", "refuses it: 'str object' has no attribute 'missing'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses it: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses it"),
        ("{{ 1 // 0 }}", "chat template of m"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path: Path, content: str, template: str, message: str) -> None:
    folder = write(tmp_path / "m", content, template)
    with pytest.raises(BadInputError, match=message) as caught:
        ids(folder, content, [SYSTEM, *TURNS])
    assert "\n" not in str(caught.value)


def test_a_model_without_a_template(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "m", content, None)
    with pytest.raises(UnsupportedError, match="line 1 is a conversation, and m has no chat template; give plain text"):
        ids(folder, content, TURNS)
    other = write(tmp_path / "n", content, [{"name": "rag", "template": "x"}])
    with pytest.raises(UnsupportedError, match="only templates named rag"):
        ids(other, content, TURNS)
