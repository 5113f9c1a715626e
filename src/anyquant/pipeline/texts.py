"""The text of a run: documents of the user, or the demo's held-out topics, in three disjoint splits."""

from dataclasses import replace

from anyquant.calibrate.chat import chat_of
from anyquant.calibrate.sources import FIELD, kind_of, read_documents
from anyquant.calibrate.text import (
    Amounts,
    Splits,
    Tokenizer,
    demo_splits,
    digest,
    load_tokenizer,
    split,
    token_count,
    within,
)
from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, InconclusiveError, UnsupportedError
from anyquant.models.architecture import Architecture
from anyquant.pipeline.recipe import Calibration


def default_text_warning(calibrated: bool) -> str:
    """What to say where no text was given."""
    done, better = ("calibrated and judged", "a better artifact and ") if calibrated else ("judged", "")
    return (
        f"no --text was given: {done} on AnyQuant's default English documentation text; "
        f"text of your own domain gives {better}a verdict that means more"
    )


def source_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer and chat template of the checkpoint. Raises UnsupportedError when there is no tokenizer.json."""
    content = checkpoint.text_file("tokenizer.json")
    if content is None:
        raise UnsupportedError(f"{checkpoint.location}: has no tokenizer.json; only that kind of tokenizer is read")
    tokenizer = load_tokenizer(content, f"{checkpoint.location}/tokenizer.json")
    return replace(tokenizer, chat=chat_of(checkpoint))


def usable_context(wanted: int, architecture: Architecture) -> int:
    """Tokens of a document: no more than the model's context, nor than where its LongRoPE changes factors.

    llama.cpp chooses the factors by the context it was opened with, `transformers` by the length of the text.
    """
    dimensions = architecture.dimensions
    original = dimensions.rope_scaling.get("original_max_position_embeddings")
    limits = [wanted, dimensions.context, *([int(original)] if isinstance(original, int) else [])]
    return min(limits)


def load_splits(tokenizer: Tokenizer, architecture: Architecture, calibration: Calibration, certify: int = 0) -> Splits:
    """Tokenized documents, at least `certify` tokens of them to certify on.

    Raises InconclusiveError when the text is too short for that, or for three disjoint splits.

    A few long files cannot be divided between the splits as wholes: then their windows are, as those of a single file.
    """
    context = usable_context(calibration.context, architecture)
    tokenizer = within(tokenizer, architecture.dimensions.vocabulary)
    if calibration.text is None:
        return _enough(demo_splits(tokenizer, context, calibration.tokens), certify)
    last = max(calibration.tokens * 2 // 3, certify)
    amounts = Amounts(tokens=(calibration.tokens, calibration.tokens // 3, last))
    # few tokens must not make the text look short: the fewest documents of all splits are read in any case
    tokens = sum(max(pair[0], pair[1] * context) for pair in zip(amounts.tokens, amounts.documents, strict=True))
    documents = read_documents(calibration.text, tokenizer, context, tokens=tokens, field=calibration.field)
    if not documents:
        raise BadInputError(f"{calibration.text}: holds no text of two tokens or more to calibrate and measure on")
    if certify and (total := token_count(documents)) < (wanted := sum(amounts.tokens) * certify // last):
        raise InconclusiveError(_too_short(certify, f"the text has {total} tokens in all, give it {wanted}"))
    try:
        found = split(documents, amounts)
    except InconclusiveError:
        found = split([replace(document, source=document.name) for document in documents], amounts)
    return _enough(found, certify)


def _enough(splits: Splits, certify: int) -> Splits:
    tokens = token_count(splits.certify)
    if tokens < certify:
        raise InconclusiveError(_too_short(certify, f"here are {tokens}; give a longer --text"))
    return splits


def _too_short(certify: int, found: str) -> str:
    return f"--max-kl-99-9 is certified on {certify} tokens or more: {found}, or limit the mean with --max-kl"


def describe(splits: Splits, calibration: Calibration, searched: bool) -> dict[str, object]:
    """What the report says of the text: source and its kind, sizes and a hash per split, of those that were used.

    `searched`: whether anything was chosen on *select*.
    """
    calibrated = not calibration.data_free and calibration.imatrix is None
    used = {"calibrate": calibrated, "select": searched, "certify": True}
    text, field = calibration.text, calibration.field
    return {
        "text": text or "the default text (documentation topics of CPython)",
        "kind": "default text" if text is None else str(kind_of(text)),
        **({} if field == FIELD else {"field": field}),
        **{
            name: {
                "documents": len(part),
                "tokens": token_count(part),
                "sha256": digest(part),
            }
            for name, part in zip(Splits._fields, splits, strict=True)
            if used[name]
        },
    }
