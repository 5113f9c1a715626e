"""The quantized state: what is written is read, by us and by the safetensors library, and by nobody when half done."""

import hashlib
import itertools
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from anyquant.core.corrections import LowRank, Mask
from anyquant.core.errors import AnyQuantError, BadInputError, OutputError, UnsupportedError
from anyquant.core.plan import Decision
from anyquant.core.qtensor import QTensor
from anyquant.store.state import PLAN, StateReader, StateWriter, canonical_json, entry_key
from store.toy_grid import PAIRS, TOY, grids, matrix, rows_of, same

KEY = entry_key("source", {"grid": "TOY"}, "", "1")


def store(folder: Path, whole: QTensor, cuts: tuple[int, ...] = (0, 2, 6), key: str = KEY) -> Path:
    with StateWriter(folder) as state:
        with state.begin(key, whole.grid, whole.shape) as entry:
            for start, stop in reversed(list(itertools.pairwise(cuts))):
                entry.write(start, rows_of(whole, start, stop))
        state.write_plan({"label": "test", "x": 0.1}, {"linear": key})
    return folder / "entries" / f"{key}.safetensors"


@pytest.mark.parametrize("cuts", [(0, 6), (0, 2, 6), (0, 1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("groups", [None, [3, 2, 1, 0] * 4])
def test_round_trip(tmp_path: Path, cuts: tuple[int, ...], groups: list[int] | None) -> None:
    whole = matrix(groups=groups)
    store(tmp_path, whole, cuts)
    reader = StateReader(tmp_path, grids)
    assert reader.plan == {"label": "test", "x": 0.1} and list(reader.names()) == ["linear"]
    entry = reader.entry("linear")
    assert (entry.grid, entry.shape, entry.key) == (TOY, (6, 16), KEY)
    assert same(entry.load(), whole)
    assert same(entry.rows(1, 4), rows_of(whole, 1, 4))
    assert np.array_equal(entry.load().decode(), whole.decode())
    entry.verify()


def test_corrections_are_kept_by_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    mask = Mask(random.random((6, 16)) < 0.5)
    pair = LowRank(*(random.standard_normal(size).astype(np.float16) for size in ((6, 2), (2, 16))))
    whole = replace(matrix(), corrections=(mask, pair))
    with StateWriter(tmp_path) as state:
        with state.begin(KEY, TOY, whole.shape) as entry:
            for start, stop in ((2, 6), (0, 2)):
                cut = tuple(correction.rows(start, stop) for correction in whole.corrections)
                entry.write(start, replace(rows_of(matrix(), start, stop), corrections=cut))
        read = state.read(KEY, grids)
    expected = np.where(mask.keep, matrix().decode(), 0) + pair.left.astype(np.float64) @ pair.right.astype(np.float64)
    np.testing.assert_allclose(read.load().decode(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(read.rows(1, 4).decode(), read.load().decode()[1:4])


def test_the_library_reads_entries(tmp_path: Path) -> None:
    whole = matrix()
    path = store(tmp_path, whole)
    arrays = safetensors.numpy.load_file(path)
    assert arrays.keys() == {"codes", "overall", "row", "scale"}
    assert np.array_equal(arrays["codes"], whole.codes)
    assert all(np.array_equal(arrays[name], whole.params[name]) for name in whole.params)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert (metadata["grid"], metadata["shape"], metadata["key"]) == ("TOY", "6,16", KEY)
    data = path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :]
    assert metadata["sha256"] == hashlib.sha256(data).hexdigest()


def test_vectors_and_sixteen_bit_codes(tmp_path: Path) -> None:
    codes = np.arange(3 * 4, dtype=np.uint16).reshape(3, 4) * 1000
    whole = QTensor(PAIRS, (3, 8), codes, {"row": np.ones((3, 1), np.float16)})
    store(tmp_path, whole, (0, 1, 3))
    assert same(StateReader(tmp_path, grids).entry("linear").load(), whole)


def test_cuts_and_threads_do_not_change_the_bytes(tmp_path: Path) -> None:
    whole = matrix(rows=64)
    one = store(tmp_path / "a", whole, (0, 64)).read_bytes()
    with StateWriter(tmp_path / "b") as state, state.begin(KEY, TOY, whole.shape) as entry:
        threads = [
            threading.Thread(target=lambda i=i: entry.write(i, rows_of(whole, i, i + 4))) for i in range(0, 64, 4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "b" / "entries" / f"{KEY}.safetensors").read_bytes() == one


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    whole = matrix()

    other = {**whole.params, "overall": np.array([[0.5]], np.float32)}
    wrong = [
        (0, replace(matrix(columns=8)), AnyQuantError),
        (1, whole, AnyQuantError),
        (0, replace(whole, corrections=(Mask(np.ones((6, 16), bool)),) * 2), AnyQuantError),
    ]
    with StateWriter(tmp_path) as state:
        for first, rows, error in wrong:
            with pytest.raises(error), state.begin(KEY, TOY, whole.shape) as entry:
                entry.write(first, rows)
        with pytest.raises(AnyQuantError, match="disagree"), state.begin(KEY, TOY, (12, 16)) as entry:
            entry.write(0, whole)
            entry.write(6, replace(whole, params=other))
        with pytest.raises(UnsupportedError, match="multiple"), state.begin(KEY, TOY, (6, 12)) as entry:
            entry.write(0, QTensor(TOY, (6, 12), *cut(whole, 12)))
        assert not state.has(KEY, grids)
    assert list((tmp_path / "entries").iterdir()) == []


def cut(whole: QTensor, columns: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    params = {**whole.params, "scale": whole.params["scale"][:, : columns // 4]}
    return whole.codes[:, :columns], params


@pytest.mark.parametrize("blocks", [[], [(0, 3)], [(3, 6)], [(0, 2), (4, 6)], [(0, 3), (2, 6)], [(0, 6), (0, 6)]])
def test_rows_missing_or_twice(tmp_path: Path, blocks: list[tuple[int, int]]) -> None:
    whole = matrix()
    with StateWriter(tmp_path) as state:
        with pytest.raises(AnyQuantError, match="missing"), state.begin(KEY, TOY, whole.shape) as entry:
            for start, stop in blocks:
                entry.write(start, rows_of(whole, start, stop))
        assert not state.has(KEY, grids)
    assert list((tmp_path / "entries").iterdir()) == []


def test_a_failed_entry_leaves_nothing_and_the_rest_stays(tmp_path: Path) -> None:
    store(tmp_path, matrix())
    second = entry_key("other", {}, "", "1")
    with StateWriter(tmp_path) as state:
        with pytest.raises(ZeroDivisionError), state.begin(second, TOY, (6, 16)) as entry:
            entry.write(0, rows_of(matrix(), 0, 2))
            1 / 0  # noqa: B018
        assert state.has(KEY, grids) and not state.has(second, grids)
        assert same(state.read(KEY, grids).load(), matrix())


def test_every_flipped_byte_of_an_entry_is_noticed(tmp_path: Path) -> None:
    path = store(tmp_path, matrix())
    sound = path.read_bytes()
    unnoticed = []
    for position in range(len(sound)):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        try:
            StateReader(tmp_path, grids).entry("linear").verify()
            unnoticed.append(sound[position : position + 1])
        except BadInputError:
            pass
    assert not unnoticed
    path.write_bytes(sound[:-1] + b"?")
    with StateWriter(tmp_path) as state:
        assert not state.has(KEY, grids)  # damaged: to be computed again


def test_plans_that_are_not_finished(tmp_path: Path) -> None:
    store(tmp_path, matrix())
    for text in (
        "",
        "{}",
        "[]",
        '{"schema": 2, "plan": {}, "entries": {}}',
        '{"schema":1,"plan":{},"entries":{"a":1}}',
    ):
        (tmp_path / PLAN).write_text(text)
        with pytest.raises(BadInputError):
            StateReader(tmp_path, grids)
    (tmp_path / PLAN).write_text('{"schema": 1, "plan": {}, "entries": {"a": "../../x"}}')
    with pytest.raises(BadInputError, match="not the key"):
        StateReader(tmp_path, grids).entry("a")
    (tmp_path / PLAN).unlink()
    with pytest.raises(BadInputError, match="run again"):
        StateReader(tmp_path, grids)


def test_one_writer_at_a_time_and_leftovers_go(tmp_path: Path) -> None:
    with StateWriter(tmp_path / "s"), pytest.raises(OutputError, match="another run"):
        StateWriter(tmp_path / "s")
    leftover = tmp_path / "s" / "entries" / f"{KEY}.7.partial"
    leftover.write_bytes(b"half")
    StateWriter(tmp_path / "s").close()
    assert not leftover.exists()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["entries"]  # no lock file stays behind


def test_keys_depend_on_everything_and_on_nothing_else() -> None:
    decision = Decision("linear", "TOY", "TOY", "asked for", options={"b": 1, "a": (0.1, None)})
    keys = {
        entry_key("s", decision, "", "1"),
        entry_key("t", decision, "", "1"),
        entry_key("s", decision, "x", "1"),
        entry_key("s", decision, "", "2"),
        entry_key("s", replace(decision, options={"b": 1, "a": (0.2, None)}), "", "1"),
    }
    assert len(keys) == 5
    turned = replace(decision, options={"a": [0.1, None], "b": 1})
    assert entry_key("s", turned, "", "1") == entry_key("s", decision, "", "1")
    for value in (float("nan"), {1, 2}, object()):
        with pytest.raises(AnyQuantError):
            canonical_json(value)
