"""The text of a run: enough of it is read, and what there is gets divided."""

from collections.abc import Callable
from pathlib import Path

import pytest

from anyquant.core.errors import InconclusiveError
from anyquant.models.detect import detect
from anyquant.pipeline.recipe import Calibration
from anyquant.pipeline.texts import describe, load_splits, source_tokenizer
from anyquant.store.open import open_checkpoint

Model = Callable[[str], Path]


def lines(count: int, first: int = 0) -> str:
    return "".join(f"the model reads block {first + n} of its rows and writes it\n" for n in range(count))


def load(model: Path, **calibration: object) -> tuple[list[int], dict[str, object]]:
    checkpoint = open_checkpoint(model)
    wanted = Calibration(**calibration)  # type: ignore[arg-type]
    splits = load_splits(source_tokenizer(checkpoint), detect(checkpoint), wanted)
    assert not {d.name for d in splits.calibrate} & {d.name for d in splits.certify}
    return [len(part) for part in splits], describe(splits, wanted, searched=False)


def test_few_tokens_do_not_make_a_long_text_short(model: Model, tmp_path: Path) -> None:
    """What --tokens bounds is the work, not the right to a verdict: the fewest documents are always there."""
    path = tmp_path / "long.txt"
    path.write_text(lines(2000))
    counts, said = load(model("llama"), text=str(path), tokens=64, context=32)
    assert counts == [8, 8, 30]
    assert said["certify"] == {"documents": 30, "tokens": 960, "sha256": said["certify"]["sha256"]}  # type: ignore[index]


def test_a_few_long_files_are_divided_by_windows(model: Model, tmp_path: Path) -> None:
    for name, first in (("a.txt", 0), ("b.txt", 5000)):
        (tmp_path / name).write_text(lines(800, first))
    counts, _ = load(model("llama"), text=str(tmp_path), tokens=512, context=32)
    assert counts[2] >= 30


def test_too_little_text_is_inconclusive(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(lines(20))
    with pytest.raises(InconclusiveError, match="too little text"):
        load(model("llama"), text=str(path), context=32)


def test_only_text_that_was_used_is_in_the_report(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(lines(400))
    splits = load_splits(
        source_tokenizer(open_checkpoint(model("llama"))),
        detect(open_checkpoint(model("llama"))),
        Calibration(text=str(path), context=32),
    )
    assert set(describe(splits, Calibration(), searched=True)) == {"text", "calibrate", "select", "certify"}
    assert set(describe(splits, Calibration(data_free=True), searched=True)) == {"text", "select", "certify"}
    assert set(describe(splits, Calibration(imatrix="i.gguf"), searched=False)) == {"text", "certify"}
