"""What a power loss could undo must not be there yet: all data is durable before the name, the name before the end."""

import os
from pathlib import Path

from anyquant.store.publish import Stage
from anyquant.store.state import StateWriter, entry_key
from anyquant.store.system import System
from store.toy_grid import TOY, matrix


class Log(System):
    """Which inodes are on the disk for sure, at each rename: synced, and not written to since."""

    def __init__(self) -> None:
        self.safe: set[int] = set()
        self.unsafe_at_rename: list[set[str]] = []
        self.synced_since_rename: set[int] = set()

    def fsync(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        self.safe.add(inode)
        self.synced_since_rename.add(inode)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.safe.discard(os.fstat(descriptor).st_ino)
        return super().pwrite(descriptor, data, offset)

    def unlink(self, path: Path) -> None:
        self.safe.discard(path.parent.stat().st_ino)
        super().unlink(path)

    def rename(self, source: Path, target: Path) -> None:
        self._renamed(source)
        super().rename(source, target)

    def rename_special(self, source: Path, target: Path, flag: int) -> bool:
        self._renamed(source)
        return super().rename_special(source, target, flag)

    def _renamed(self, source: Path) -> None:
        paths = [source, *source.rglob("*")] if source.is_dir() else [source]
        self.unsafe_at_rename.append({path.name for path in paths if path.stat().st_ino not in self.safe})
        self.synced_since_rename.clear()


def test_published_folder_is_durable_before_and_after_its_name(tmp_path: Path) -> None:
    log = Log()
    with Stage(tmp_path / "out", system=log) as stage:
        left_open = stage.create_sized("sub/deeper/open.bin", 4)
        finished = stage.create_sized("finished.bin", 4)
        stage.write_at(left_open, 0, b"abcd")
        stage.write_at(finished, 0, b"abcd")
        stage.finish(finished)
        (stage.folder / "sub" / "foreign.txt").write_text("put here by somebody else")
        stage.publish()
    assert log.unsafe_at_rename == [set()]
    assert tmp_path.stat().st_ino in log.synced_since_rename


def test_entries_and_plan_are_durable_before_and_after_their_names(tmp_path: Path) -> None:
    log = Log()
    with StateWriter(tmp_path, log) as state:
        with state.begin(entry_key("", {}, "", ""), TOY, (6, 16)) as entry:
            entry.write(0, matrix())
        assert (tmp_path / "entries").stat().st_ino in log.synced_since_rename
        state.write_plan({}, {})
    assert log.unsafe_at_rename == [set(), set()]
    assert tmp_path.stat().st_ino in log.synced_since_rename
