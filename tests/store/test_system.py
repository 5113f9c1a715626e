"""What the storage layer does where the operating system offers less, or answers oddly."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from anyquant.core.errors import BadInputError, OutputError
from anyquant.store import system as layer
from anyquant.store.files import read_small
from anyquant.store.publish import Stage
from anyquant.store.system import RENAME_NOREPLACE, System, pwrite_fully, reading, writing


def test_space_is_reserved_or_at_least_the_size_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(code: int) -> None:
        def fallocate(descriptor: int, offset: int, nbytes: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)

    descriptor = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    system = System()
    system.allocate(descriptor, 1000)
    assert os.fstat(descriptor).st_size == 1000
    answers(errno.EOPNOTSUPP)
    system.allocate(descriptor, 2000)
    assert os.fstat(descriptor).st_size == 2000
    answers(errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        system.allocate(descriptor, 3000)
    monkeypatch.delattr(os, "posix_fallocate")
    system.allocate(descriptor, 4000)
    assert os.fstat(descriptor).st_size == 4000
    os.close(descriptor)


def test_renames_of_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError):
        System().rename_special(tmp_path / "a", tmp_path / "b", RENAME_NOREPLACE)
    assert not System().rename_special(tmp_path / "a", tmp_path / "c", 1 << 30)  # a flag that no system knows
    monkeypatch.setattr(layer, "_renameat2", lambda: None)
    assert not System().rename_special(tmp_path / "a", tmp_path / "c", RENAME_NOREPLACE)
    assert (tmp_path / "a").is_dir()


def test_writes_that_make_no_progress_end(tmp_path: Path) -> None:
    class Stuck(System):
        def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
            return 0

    with pytest.raises(OSError, match="No space"):
        pwrite_fully(Stuck(), 0, b"x", 0)
    pwrite_fully(Stuck(), 0, np.empty((0, 3), np.float16), 0)  # nothing to write is no failure


@pytest.mark.parametrize("code", [*layer._WHY, errno.ELOOP, errno.EISDIR])
def test_errors_are_one_line_with_the_place(code: int) -> None:
    for wrap, kind in ((writing, OutputError), (reading, BadInputError)):
        with pytest.raises(kind, match="/some/place: ") as caught, wrap("/some/place"):
            raise OSError(code, "text of the system")
        assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    class Shrinking(System):
        def pread(self, descriptor: int, buffer: memoryview, offset: int) -> int:
            return 0

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match="ends after 0 of 2 bytes"):
        read_small(tmp_path, "config.json", 10, Shrinking())


def test_lock_file_that_vanishes_is_taken_again(tmp_path: Path) -> None:
    """The holder before us removed it between our open and our lock."""

    class Racing(System):
        tries = 0

        def lock(self, descriptor: int) -> bool:
            self.tries += 1
            if self.tries == 1:
                (tmp_path / ".out.lock").unlink()
            return super().lock(descriptor)

    system = Racing()
    descriptors = len(os.listdir("/dev/fd"))  # noqa: PTH208 - Path.iterdir holds one more open
    with Stage(tmp_path / "out", system=system) as stage:
        with pytest.raises(OutputError, match="another run"):
            Stage(tmp_path / "out").__enter__()
        stage.publish()
    assert system.tries == 2
    assert len(os.listdir("/dev/fd")) == descriptors  # noqa: PTH208
