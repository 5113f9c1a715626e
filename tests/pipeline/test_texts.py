"""The text of a run: enough of it is read, and what there is gets divided."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.core.errors import BadInputError, InconclusiveError, UsageError
from anyquant.models.detect import detect
from anyquant.pipeline.recipe import Calibration, Recipe, canonical
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


def _saved(path: Path, array: np.ndarray[Any, Any]) -> Path:
    np.save(path, array)
    return path


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
    said = describe(splits, Calibration(), searched=True)
    assert set(said) == {"text", "kind", "calibrate", "select", "certify"}
    assert set(describe(splits, Calibration(data_free=True), searched=True)) == set(said) - {"calibrate"}
    assert set(describe(splits, Calibration(imatrix="i.gguf"), searched=False)) == {"text", "kind", "certify"}


def test_the_report_names_the_source_and_its_kind(model: Model, tmp_path: Path) -> None:
    records = [{"body": lines(2, first=2 * number)} for number in range(60)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    counts, said = load(model("llama"), text=str(path), context=64, field="body")
    assert sum(counts) >= 46
    assert (said["text"], said["kind"], said["field"]) == (str(path), "JSONL records", "body")
    with pytest.raises(BadInputError, match="two tokens"):
        load(model("llama"), text=str(_saved(tmp_path / "empty.npy", np.zeros((9, 1), np.int32))))
    array = _saved(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 200, (50, 40)))
    counts, said = load(model("llama"), text=str(array), context=64)
    assert sum(counts) == 50 and said["kind"] == "array of token ids"


def test_ids_that_the_model_lacks_are_refused(model: Model, tmp_path: Path) -> None:
    vocabulary = detect(open_checkpoint(model("llama"))).dimensions.vocabulary
    ids = np.ones((50, 40), np.int64)
    ids[3, 17] = vocabulary
    with pytest.raises(BadInputError, match=rf"t.npy, row 3, column 17: {vocabulary} is no token id"):
        load(model("llama"), text=str(_saved(tmp_path / "t.npy", ids)), context=64)


def test_the_name_of_a_data_set_is_checked_without_asking_for_it() -> None:
    recipe = Recipe(calibration=Calibration(text="dataset:nobody/nothing@main#test"))
    assert canonical(recipe) == recipe
    with pytest.raises(UsageError, match="is no name of a data set"):
        canonical(Recipe(calibration=Calibration(text="dataset:a/b/c")))
