"""The state under every single fault and every kill: an entry is whole or absent, and the next run completes it."""

import errno
from pathlib import Path

import pytest

from anyquant.core.errors import OutputError
from anyquant.store.state import StateReader, StateWriter, entry_key
from anyquant.store.system import System
from faults.faulty import Counting, Failing, Killed, Short, Unsynced, in_child
from store.toy_grid import TOY, grids, matrix, rows_of, same

KEYS = [entry_key("source", number, "", "1") for number in range(2)]


def run(folder: Path, system: System) -> None:
    """Write two entries, skipping those that are there, and the plan: what a resumed run does."""
    with StateWriter(folder, system) as state:
        for number, key in enumerate(KEYS):
            if state.has(key, grids):
                continue
            whole = matrix(seed=number)
            with state.begin(key, TOY, whole.shape) as entry:
                entry.write(0, rows_of(whole, 0, 2))
                entry.write(2, rows_of(whole, 2, 6))
        state.write_plan({}, {str(number): key for number, key in enumerate(KEYS)})


def check_finished(folder: Path) -> None:
    reader = StateReader(folder, grids)
    for number in range(len(KEYS)):
        reader.entry(str(number)).verify()
        assert same(reader.entry(str(number)).load(), matrix(seed=number))
    assert {path.suffix for path in (folder / "entries").iterdir()} == {".safetensors"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_nth_call_fails(tmp_path: Path, code: int) -> None:
    for number in range(1000):
        folder = tmp_path / str(number)
        (folder / "entries").mkdir(parents=True)
        (folder / "entries" / f"{KEYS[0]}.3.partial").write_bytes(b"left by a dead run")
        system = Failing(number, code)
        try:
            run(folder, system)
        except OutputError as error:
            assert system.failed and "\n" not in str(error)
        if not system.failed:
            break
        run(folder, Unsynced())
        check_finished(folder)
    assert number > 30


@pytest.mark.parametrize("late", [False, True])
def test_kill_at_every_call(tmp_path: Path, late: bool) -> None:
    for number in range(1000):
        folder = tmp_path / str(number)
        status = in_child(lambda: run(folder, Killed(number, late)))  # noqa: B023
        run(folder, Unsynced())
        check_finished(folder)
        if status == 0:
            break
    assert number > 30


def test_resumed_run_writes_the_same_bytes(tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    run(tmp_path / "whole", Unsynced())
    for number in (10, 20, 30):
        in_child(lambda: run(tmp_path / str(number), Killed(number, False)))  # noqa: B023
        run(tmp_path / str(number), Unsynced())
        assert content(tmp_path / str(number)) == content(tmp_path / "whole")


def test_short_reads_and_writes(tmp_path: Path) -> None:
    run(tmp_path, Short())
    check_finished(tmp_path)


def test_finished_entries_are_not_written_again(tmp_path: Path) -> None:
    run(tmp_path, Unsynced())
    again = Counting()
    run(tmp_path, again)
    assert again.calls.count("allocate") == 0 and again.calls.count("pwrite") == 1  # the plan only
