"""tokenizer.json to the tokenizer keys of GGUF: byte-level BPE, recognised by its structure.

Where llama.cpp would split or add tokens differently from the `tokenizers` library, the tokenizer is refused by name.
The one exception: white space beside an added token that swallows it (`lstrip`, `rstrip`: Phi-4) stays in llama.cpp;
chat templates put none there.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.store.strict_json import parse_json

# gguf.TokenType
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
SPECIAL = ("bos", "eos", "unk", "pad")
SENTENCEPIECE = "SentencePiece tokenizers are not written yet"


@dataclass(frozen=True)
class Pretokenizer:
    """One row of pretokenizers.toml."""

    pre: str
    steps: tuple[str, ...]
    ignore_merges: bool
    nfc: bool


@dataclass(frozen=True)
class GGUFTokenizer:
    """`tokens` and `types` have one entry per row of the embedding; `special` maps bos, eos ... to token ids."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def add_tokenizer(writer: Any, tokenizer: GGUFTokenizer) -> None:
    """Add the tokenizer to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(list(tokenizer.tokens))
    writer.add_token_types(list(tokenizer.types))
    writer.add_token_merges(list(tokenizer.merges))
    for kind, token in tokenizer.special.items():
        getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(tokenizer.adds_eos)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


@lru_cache(maxsize=1)
def read_tokenizer(checkpoint: Checkpoint, vocabulary: int) -> GGUFTokenizer:
    """The tokenizer of a checkpoint whose embedding has `vocabulary` rows; the last one is remembered.

    Raises UnsupportedError for what llama.cpp or this writer cannot do, BadInputError for files that contradict
    themselves.
    """
    where = f"{checkpoint.location}/tokenizer.json"
    stored = _read_stored(checkpoint, where)
    try:
        return _understand(checkpoint, stored, vocabulary, where)
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # foreign data, nested deep: wrong kinds of value
        raise BadInputError(f"{where}, or a file beside it, is not built as tokenizers are: {error}") from None


def _understand(checkpoint: Checkpoint, stored: Mapping[str, Any], vocabulary: int, where: str) -> GGUFTokenizer:
    model = _object(stored, "model", where)
    _refuse_model(model, where)
    pretokenizer = _recognise(stored, bool(model.get("ignore_merges")), where)
    added = _added(stored, where)
    tokens, types = _vocabulary(model, added, vocabulary, where)
    settings = _companion_json(checkpoint, "tokenizer_config.json")
    prefix, suffix = _affixes(stored.get("post_processor"), where)
    ids = {token: index for index, token in enumerate(tokens)}
    template = _chat_template(checkpoint, settings)
    special = _special(checkpoint, settings, ids, vocabulary)
    special |= _further_stops(checkpoint, special.get("eos"), tokens, template or "")
    _settle(special, "bos", prefix, where)
    _settle(special, "eos", suffix, where)
    return GGUFTokenizer(
        pre=pretokenizer.pre,
        tokens=tokens,
        types=types,
        merges=_merges(model, where),
        special=special,
        adds_bos=bool(prefix),
        adds_eos=bool(suffix),
        chat_template=template,
    )


@cache
def pretokenizers() -> tuple[Pretokenizer, ...]:
    """The known ones, from pretokenizers.toml."""
    text = (files("anyquant.formats.gguf") / "pretokenizers.toml").read_text(encoding="utf-8")
    return tuple(
        Pretokenizer(row["pre"], tuple(row["steps"]), row.get("ignore_merges", False), row.get("nfc", False))
        for row in tomllib.loads(text)["pretokenizer"]
    )


def _read_stored(checkpoint: Checkpoint, where: str) -> dict[str, Any]:
    data = checkpoint.text_file("tokenizer.json")
    if data is not None:
        return parse_json(data, where)
    if checkpoint.text_file("tokenizer.model") is not None:
        raise UnsupportedError(f"{checkpoint.location}: {SENTENCEPIECE} (tokenizer.model without tokenizer.json)")
    raise UnsupportedError(
        f"{checkpoint.location}: there is no tokenizer.json; save one with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _companion_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    data = checkpoint.text_file(name)
    return {} if data is None else parse_json(data, f"{checkpoint.location}/{name}")


def _object(parent: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise BadInputError(f"{where}: {key} is not an object")
    return value


def _refuse_model(model: Mapping[str, Any], where: str) -> None:
    """Only plain byte-level BPE passes."""
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "Unigram" or model.get("byte_fallback"):
        raise UnsupportedError(f"{where}: {SENTENCEPIECE} (model type {kind})")
    if kind != "BPE":
        raise UnsupportedError(f"{where}: tokenizer model {kind!r} is not written to GGUF; only byte-level BPE is")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(f"{where}: the BPE option {key} = {model[key]!r} is not known to llama.cpp")


def _recognise(stored: Mapping[str, Any], ignore_merges: bool, where: str) -> Pretokenizer:
    steps = tuple(_steps(stored.get("pre_tokenizer"), where))
    normalizers = _normalizers(stored.get("normalizer"))
    for known in pretokenizers():
        if known.steps == steps and known.ignore_merges == ignore_merges:
            if normalizers not in ((), ("NFC",)) or (normalizers and not known.nfc):
                raise UnsupportedError(f"{where}: normalizer {' + '.join(normalizers)} is not done by llama.cpp")
            return known
    if "Prepend" in normalizers or "Replace" in normalizers or "Metaspace" in str(steps):
        raise UnsupportedError(f"{where}: {SENTENCEPIECE} (BPE on text with spaces replaced)")
    raise UnsupportedError(
        f"{where}: llama.cpp has no name known to us for this pre-tokenizer (ignore_merges {ignore_merges}): "
        f"{'; '.join(steps) or 'none'}"
    )


def _normalizers(normalizer: Any) -> tuple[str, ...]:
    if normalizer is None:
        return ()
    if normalizer.get("type") == "Sequence":
        return tuple(name for inner in normalizer.get("normalizers", []) for name in _normalizers(inner))
    return (str(normalizer.get("type")),)


def _steps(pre_tokenizer: Any, where: str) -> list[str]:
    """The canonical form that pretokenizers.toml is written in."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [step for inner in pre_tokenizer.get("pretokenizers", []) for step in _steps(inner, where)]
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            raise UnsupportedError(f"{where}: add_prefix_space in a byte-level tokenizer is not done by llama.cpp")
        return ["gpt2" if pre_tokenizer.get("use_regex", True) else "bytes"]
    if kind == "Digits":
        return ["digits" if pre_tokenizer.get("individual_digits") else "digit runs"]
    if kind == "Split":
        return [_split(pre_tokenizer)]
    return [str(kind)]


def _split(step: Mapping[str, Any]) -> str:
    pattern, behavior = step.get("pattern", {}), step.get("behavior")
    if "Regex" not in pattern:
        return f"split string {pattern!r} {behavior}"
    written = str(pattern["Regex"]).replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")
    # removing what does not match, as files converted from tiktoken do, keeps the matches: the expressions of the
    # table match every character, so both are one
    if (behavior, bool(step.get("invert"))) in (("Isolated", False), ("Removed", True), ("Isolated", True)):
        return f"split {written}"
    return f"split ({behavior}, invert {bool(step.get('invert'))}) {written}"


def _added(stored: Mapping[str, Any], where: str) -> dict[int, tuple[str, bool]]:
    """Added tokens by id: (text, special)."""
    found = {}
    for token in stored.get("added_tokens") or []:
        if not isinstance(token, dict) or not isinstance(token.get("id"), int):
            raise BadInputError(f"{where}: added_tokens holds {str(token)[:80]}, expected an object with an id")
        text, special = str(token.get("content")), bool(token.get("special"))
        if token.get("single_word") and not special:
            raise UnsupportedError(f"{where}: added token {text!r} has single_word, which llama.cpp does not do")
        found[token["id"]] = (text, special)
    return found


def _vocabulary(
    model: Mapping[str, Any], added: Mapping[int, tuple[str, bool]], size: int, where: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their types by id; rows of the embedding without a token become unused ones."""
    tokens = {index: (f"[PAD{index}]", UNUSED) for index in range(size)}
    entries = [(index, token, NORMAL) for token, index in _object(model, "vocab", where).items()]
    entries += [(index, text, CONTROL if special else USER_DEFINED) for index, (text, special) in added.items()]
    for index, text, kind in entries:
        if not isinstance(index, int) or index not in tokens:
            raise BadInputError(f"{where}: token {text!r} has the id {index}, the embedding has {size} rows")
        tokens[index] = (text, kind)
    first: dict[str, int] = {}
    for index, (text, _) in tokens.items():
        if first.setdefault(text, index) != index:
            raise UnsupportedError(
                f"{where}: token {text!r} has the ids {first[text]} and {index}; llama.cpp takes one"
            )
    return tuple(text for text, _ in tokens.values()), tuple(kind for _, kind in tokens.values())


def _merges(model: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """As "a b", from either spelling."""
    merges = []
    for merge in model.get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise BadInputError(f"{where}: {str(merge)[:80]!r} is not a merge of two tokens")
        if any(" " in part for part in pair):
            raise UnsupportedError(f"{where}: a merge with spaces, {pair!r}, cannot be written to GGUF")
        merges.append(" ".join(pair))
    if not merges:
        raise UnsupportedError(f"{where}: BPE without merges cannot be written to GGUF")
    return tuple(merges)


def _affixes(processor: Any, where: str) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and behind one text."""
    kind = None if processor is None else processor.get("type")
    if kind in (None, "ByteLevel"):
        return [], []
    if kind == "Sequence":
        before: list[int] = []
        behind: list[int] = []
        for inner in processor.get("processors", []):
            outer_before, outer_behind = _affixes(inner, where)
            before, behind = outer_before + before, behind + outer_behind
        return before, behind
    if kind != "TemplateProcessing":
        raise UnsupportedError(f"{where}: post-processor {kind!r} is not written to GGUF")
    before, behind, seen = [], [], False
    for piece in processor.get("single") or []:
        if "Sequence" in piece:
            seen = True
            continue
        name = piece.get("SpecialToken", {}).get("id")
        ids = processor.get("special_tokens", {}).get(name, {}).get("ids")
        if not isinstance(ids, list):
            raise BadInputError(f"{where}: the post-processor names {name!r} but does not define it")
        (behind if seen else before).extend(ids)
    return before, behind


def _settle(special: dict[str, int], kind: str, affix: Sequence[int], where: str) -> None:
    """llama.cpp adds the bos (eos) token itself, so what the post-processor adds must be that one token."""
    if not affix:
        return
    if len(affix) > 1 or (kind == "eos" and special.get(kind, affix[0]) != affix[0]):
        raise UnsupportedError(f"{where}: the post-processor adds the tokens {list(affix)}; llama.cpp adds one {kind}")
    special[kind] = affix[0]


def _special(checkpoint: Checkpoint, settings: Mapping[str, Any], ids: Mapping[str, int], size: int) -> dict[str, int]:
    """Ids of the special tokens: by their text in tokenizer_config, else from generation_config, else from config."""
    generation = _companion_json(checkpoint, "generation_config.json")
    found: dict[str, int] = {}
    for kind in SPECIAL:
        declared = settings.get(f"{kind}_token")
        text = declared.get("content") if isinstance(declared, dict) else declared
        named: list[Any] = [ids[text]] if isinstance(text, str) and text in ids else []
        for source in (generation, checkpoint.config):
            value = source.get(f"{kind}_token_id")
            named += value if isinstance(value, list) else [value]
        valid = [item for item in named if isinstance(item, int) and 0 <= item < size]
        if valid:
            found[kind] = valid[0]
    return found


def _further_stops(checkpoint: Checkpoint, eos: int | None, tokens: Sequence[str], template: str) -> dict[str, int]:
    """What llama.cpp has keys for besides `eos`, when generation_config stops at several tokens: eot and eom.

    "eot" is what llama.cpp writes to end a turn: `eos` where the template does so (Llama 3.1, Qwen), else the first
    other stop. At "eom" it only stops. Without "eot" it would guess among the texts that it knows.
    """
    stops = _companion_json(checkpoint, "generation_config.json").get("eos_token_id")
    others = [stop for stop in stops if stop != eos] if isinstance(stops, list) else []
    valid = [stop for stop in others if isinstance(stop, int) and 0 <= stop < len(tokens)]
    if valid and eos is not None and tokens[eos] in template:
        valid = [eos, *valid]
    return dict(zip(("eot", "eom"), valid, strict=False))


def _chat_template(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja if there is one (as in transformers), else the template of tokenizer_config.json."""
    data = checkpoint.text_file("chat_template.jinja")
    if data is not None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise BadInputError(f"{checkpoint.location}/chat_template.jinja is not UTF-8 text") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
