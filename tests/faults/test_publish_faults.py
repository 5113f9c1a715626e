"""Publishing under every single fault: a clean error and the old state, or success and the new one."""

import errno
import os
from pathlib import Path

import pytest

from anyquant.core.errors import OutputError
from anyquant.store.manifest import verify_manifest
from anyquant.store.publish import Stage
from anyquant.store.system import System
from faults.faulty import CALLS, Broken, Counting, Failing, Killed, Short, Unsynced, in_child


class Old:
    """Mixed in: a file system without renameat2."""

    def rename_special(self, source: Path, target: Path, flag: int) -> bool:
        return False


class OldFailing(Old, Failing):
    pass


class OldKilled(Old, Killed):
    pass


class OldCounting(Old, Counting):
    pass


def make(out: Path, text: bytes, system: System, overwrite: bool) -> None:
    with Stage(out, overwrite=overwrite, needed=10, system=system) as stage:
        descriptor = stage.create_sized("sub/big.bin", 6)
        stage.write_at(descriptor, 0, text)
        stage.write_at(descriptor, 3, text)
        stage.write_file("small.txt", text[::-1])
        stage.replace_start("small.txt", text)
        (stage.folder / "foreign").write_bytes(text)
        stage.publish()


def state(out: Path) -> bytes | None:
    """The text of a complete output, None for no output; anything between fails."""
    if not out.exists():
        return None
    verify_manifest(out)
    text = (out / "small.txt").read_bytes()
    assert (out / "sub" / "big.bin").read_bytes() == text * 2
    assert (out / "foreign").read_bytes() == text
    return text


def fresh(folder: Path, overwrite: bool) -> Path:
    folder.mkdir()
    if overwrite:
        make(folder / "out", b"old", Unsynced(), False)
    return folder / "out"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", [Failing, OldFailing])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_nth_call_fails(tmp_path: Path, overwrite: bool, kind: type[Failing], code: int) -> None:
    before = b"old" if overwrite else None
    descriptors = len(os.listdir("/dev/fd"))  # noqa: PTH208 - Path.iterdir holds one more open
    for number in range(1000):
        assert len(os.listdir("/dev/fd")) == descriptors  # noqa: PTH208
        out = fresh(tmp_path / str(number), overwrite)
        system = kind(number, code)
        try:
            make(out, b"new", system, overwrite)
        except OutputError as error:
            assert system.failed and "\n" not in str(error)
            assert state(out) == before, system.calls
        else:
            assert state(out) == b"new", system.calls
            if not system.failed:
                break
        make(out, b"end", Unsynced(), True)  # whatever was left over does not disturb the next run
        assert state(out) == b"end"
        assert [path.name for path in out.parent.iterdir()] == ["out"], system.calls
    assert number > 40


@pytest.mark.parametrize("overwrite", [False, True])
def test_device_that_is_gone_from_the_nth_call_on(tmp_path: Path, overwrite: bool) -> None:
    """Nothing can be tidied up then; still no half output under the final name, and the next run recovers."""
    for number in range(1000):
        out = fresh(tmp_path / str(number), overwrite)
        system = Broken(number, errno.EIO)
        try:
            make(out, b"new", system, overwrite)
        except OutputError:
            assert system.failed
        assert state(out) in ((b"old", b"new") if overwrite else (None, b"new"))
        if not system.failed:
            break
        make(out, b"end", Unsynced(), True)
        assert state(out) == b"end" and len(list(out.parent.iterdir())) == 1
    assert number > 40


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_kill_at_every_call(tmp_path: Path, overwrite: bool, late: bool) -> None:
    for number in range(1000):
        out = fresh(tmp_path / str(number), overwrite)
        status = in_child(lambda: make(out, b"new", Killed(number, late), overwrite))  # noqa: B023
        assert state(out) in ((b"old", b"new") if overwrite else (None, b"new"))
        if status == 0:
            break
        assert status == -9
        make(out, b"end", Unsynced(), True)
        assert state(out) == b"end" and len(list(out.parent.iterdir())) == 1
    assert number > 40 and state(out) == b"new"


def test_kill_without_atomic_exchange_never_loses_the_old_output(tmp_path: Path) -> None:
    for number in range(1000):
        out = fresh(tmp_path / str(number), True)
        status = in_child(lambda: make(out, b"new", OldKilled(number, False), True))  # noqa: B023
        if status == 0:
            break
        seen = state(out)
        with pytest.raises(OutputError, match="exists"):  # a run without --force puts it back at least
            make(out, b"end", Unsynced(), False)
        assert state(out) == (seen or b"old")
    assert number > 40


def test_short_reads_and_writes(tmp_path: Path) -> None:
    make(tmp_path / "out", b"new", Short(), False)
    assert state(tmp_path / "out") == b"new"


def test_every_call_of_the_layer_is_reached(tmp_path: Path) -> None:
    """Otherwise the tests above would prove less than they say."""
    one, two = Counting(), OldCounting()
    make(tmp_path / "out", b"new", one, False)
    make(tmp_path / "out", b"new", two, True)
    assert {*one.calls, *two.calls} == set(CALLS)
