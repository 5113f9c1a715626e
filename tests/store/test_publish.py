"""An output is complete under its final name, or it is not there; an old one is never lost."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from anyquant.core.errors import AnyQuantError, BadInputError, OutputError
from anyquant.store.manifest import MANIFEST, read_manifest, verify_manifest
from anyquant.store.open import open_checkpoint
from anyquant.store.publish import Stage
from anyquant.store.system import System


def make(out: Path, text: bytes = b"hello", system: System | None = None, overwrite: bool = False) -> None:
    with Stage(out, overwrite=overwrite, system=system or System()) as stage:
        descriptor = stage.create_sized("sub/big.bin", 8)
        stage.write_at(descriptor, 4, np.arange(2, dtype=np.uint16))
        stage.write_at(descriptor, 0, b"abcd")
        stage.write_file("small.txt", text)
        (stage.folder / "foreign.txt").write_text("written by somebody else")
        stage.publish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_published_folder(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]  # no lock, no staging folder
    assert (tmp_path / "out" / "sub" / "big.bin").read_bytes() == b"abcd\x00\x00\x01\x00"
    manifest = verify_manifest(tmp_path / "out")
    assert [file.path for file in manifest.files] == ["foreign.txt", "small.txt", "sub/big.bin"]
    assert manifest.files[1].sha256 == hashlib.sha256(b"hello").hexdigest()
    document = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert document["complete"] is True and document["files"][1]["bytes"] == 5


def test_same_content_same_manifest(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def test_changes_after_publishing_are_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    (out / "small.txt").write_bytes(b"hellO")
    read_manifest(out)  # same size
    with pytest.raises(BadInputError, match=r"small\.txt has sha256"):
        verify_manifest(out)
    (out / "small.txt").write_bytes(b"hello!")
    with pytest.raises(BadInputError, match="has 6 bytes, its manifest says 5"):
        open_checkpoint(out)
    (out / MANIFEST).unlink()
    with pytest.raises(BadInputError, match="nothing to compare with"):
        verify_manifest(out)


def test_given_hashes_are_used(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        stage.write_file("a", b"x")
        stage.write_file("b", b"y")
        manifest = stage.publish({"a": "1" * 64})
    assert [file.sha256 for file in manifest.files] == ["1" * 64, hashlib.sha256(b"y").hexdigest()]


def test_unpublished_and_failed_work_leaves_nothing(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        stage.write_file("a", b"x")
        with pytest.raises(BadInputError, match="did not finish"):
            open_checkpoint(stage.folder)
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), Stage(tmp_path / "out") as stage:
        stage.create_sized("a", 10)
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_discarded_files_can_be_made_again(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        stage.discard("a")
        stage.create_sized("a", 4)
        stage.discard("a")
        stage.write_file("a", b"xy")
        stage.discard("a")
        stage.write_file("a", b"z")
        stage.publish()
    assert (tmp_path / "out" / "a").read_bytes() == b"z"


def test_first_bytes_of_a_finished_file_are_replaced(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        stage.write_file("a.bin", b"blank and more")
        stage.replace_start("a.bin", b"FULL!")
        stage.publish()
    assert (tmp_path / "out" / "a.bin").read_bytes() == b"FULL! and more"
    verify_manifest(tmp_path / "out")
    with pytest.raises(OutputError, match=r"none\.bin"), Stage(tmp_path / "two") as stage:
        stage.replace_start("none.bin", b"x")


def test_foreign_disk_errors_become_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*out: the disk is full"), Stage(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), Stage(tmp_path / "out"):
        raise FileNotFoundError(2, "a bug, not a disk")


def test_existing_outputs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    with pytest.raises(OutputError, match=r"exists; choose another -o, or replace it with --force"):
        make(out, b"new")
    assert (out / "small.txt").read_bytes() == b"hello"
    make(out, b"new", overwrite=True)
    assert (out / "small.txt").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_force_never_removes_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(OutputError, match="not written by AnyQuant"):
            make(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "diary.txt").read_text() == "dear diary"


class Old(System):
    """A system without renameat2."""

    def rename_special(self, source: Path, target: Path, flag: int) -> bool:
        return False


def test_without_atomic_exchange(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, system=Old())
    make(out, b"new", system=Old(), overwrite=True)
    assert (out / "small.txt").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]
    # killed between the two renames of the replacement: the next run puts the old one back
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(OutputError, match="exists"):
        make(out, b"newer")
    assert (out / "small.txt").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("system", [System(), Old()])
def test_output_that_appears_meanwhile_is_kept(tmp_path: Path, system: System) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="appeared while"), Stage(out, system=system) as stage:
        stage.write_file("a", b"x")
        out.mkdir()
        stage.publish()
    assert names(tmp_path) == ["out"] and names(out) == []


def test_second_run_on_one_output_is_refused(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as first:
        with pytest.raises(OutputError, match="another run is writing it"):
            Stage(tmp_path / "out").__enter__()
        with Stage(tmp_path / "other") as other:  # neighbours do not disturb each other
            other.write_file("a", b"x")
            other.publish()
        first.write_file("a", b"x")
        first.publish()
    assert names(tmp_path) == ["other", "out"]


def test_leftovers_of_dead_runs_of_this_name_are_removed(tmp_path: Path) -> None:
    for name in (".out.partial-1", ".out.partial-2", ".output.partial-3", ".other.partial-4"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text("x")
    (tmp_path / ".out.lock").write_text("")
    make(tmp_path / "out")
    assert names(tmp_path) == [".other.partial-4", ".output.partial-3", "out"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it: mkdir -p"):
        make(tmp_path / "absent" / "out")
    with pytest.raises(OutputError, match="cannot be the name"):
        make(Path("/"))
    with pytest.raises(OutputError, match="cannot be the name"):
        make(tmp_path / ("x" * 250))
    if Path("/proc/self").is_dir():  # nobody, not even root, creates files there
        with pytest.raises(OutputError, match="/proc/self/out"):
            make(Path("/proc/self/out"))


def test_space_is_asked_for_first(tmp_path: Path) -> None:
    class Small(System):
        def free_bytes(self, folder: Path) -> int:
            return 1049

    with pytest.raises(OutputError, match="1050 bytes are needed, 1049 are free"):
        Stage(tmp_path / "out", needed=1000, system=Small()).__enter__()
    assert names(tmp_path) == []
    with Stage(tmp_path / "out", needed=999, system=Small()) as stage:
        stage.publish()


def test_names_inside_the_output(tmp_path: Path) -> None:
    with Stage(tmp_path / "out") as stage:
        for name in ("../x", "/x", "a/../../x", ""):
            with pytest.raises(AnyQuantError, match="cannot write"):
                stage.write_file(name, b"")
        stage.write_file("a", b"")
        with pytest.raises(OutputError):
            stage.write_file("a", b"")  # nothing is written twice
        (stage.folder / "link").symlink_to("/etc/passwd")
        with pytest.raises(AnyQuantError, match="not a regular file"):
            stage.publish()
    assert names(tmp_path) == []
