"""Names from a model may not leave its folder, whatever they say and whatever stands there."""

import os
from pathlib import Path

import pytest

from anyquant.core.errors import BadInputError
from anyquant.store import limits
from anyquant.store.paths import find_inside, open_inside, refuse_name

HOSTILE = [
    "",
    "/etc/passwd",
    "..",
    "../secret",
    "a/../../secret",
    "./a",
    "a//b",
    "a/",
    "a\\b",
    "C:x",
    "a\x00b",
    "a\nb",
    "a\x1fb",
    "\x7f",
    "NUL",
    "aux.safetensors",
    "com1.txt",
    "x" * 256,
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path.parent / "secret").write_text("s")
    with pytest.raises(BadInputError, match="refused the file name"):
        open_inside(tmp_path, name)


def test_part_length_limit() -> None:
    assert refuse_name("x" * limits.PATH_PART_BYTES) is None
    assert refuse_name("x" * (limits.PATH_PART_BYTES + 1)) is not None
    assert refuse_name("é" * 128) is not None  # 256 bytes
    assert refuse_name("a/b..c/.hidden") is None
    assert refuse_name("with a space") is None


def read(root: Path, name: str) -> bytes:
    descriptor = open_inside(root, name)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_plain_files_and_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"inside")
    assert read(tmp_path, "sub/a.txt") == b"inside"
    assert find_inside(tmp_path, "sub/b.txt") is None
    assert find_inside(tmp_path, "other/b.txt") is None
    assert find_inside(tmp_path / "absent", "b.txt") is None
    with pytest.raises(BadInputError, match=r"'b\.txt' is missing"):
        open_inside(tmp_path, "b.txt")


def test_what_is_not_a_plain_file_is_refused_without_waiting(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    root = tmp_path / "model"
    root.mkdir()
    (root / "link").symlink_to(secret)
    (root / "folder_link").symlink_to(tmp_path)
    (root / "hard").hardlink_to(secret)
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    for name in ("link", "folder_link/secret", "hard", "pipe", "folder"):
        with pytest.raises(BadInputError):
            open_inside(root, name)


def test_links_of_the_hub_cache_reach_their_own_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc123"
    (snapshot / "sub").mkdir(parents=True)
    (repository / "blobs").mkdir()
    blob = repository / "blobs" / ("0f" * 20)
    blob.write_bytes(b"blob")
    (snapshot / "good").symlink_to(f"../../blobs/{blob.name}")
    (snapshot / "sub" / "good").symlink_to(f"../../../blobs/{blob.name}")
    assert read(snapshot, "good") == b"blob"
    assert read(snapshot, "sub/good") == b"blob"

    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "ff").write_bytes(b"foreign")
    (repository / "refs").write_bytes(b"main")
    (repository / "blobs" / "chain").symlink_to(other / "ff")
    (snapshot / "foreign").symlink_to("../../../models--c--d/blobs/ff")
    (snapshot / "beside").symlink_to("../../refs")
    (snapshot / "above").symlink_to("../../blobs/../refs")
    (snapshot / "chained").symlink_to("../../blobs/chain")
    (snapshot / "dangling").symlink_to("../../blobs/00")
    before = open_descriptors()
    for name in ("foreign", "beside", "above", "chained"):
        with pytest.raises(BadInputError):
            read(snapshot, name)
    assert find_inside(snapshot, "dangling") is None
    assert read(snapshot, "good") == b"blob"
    assert open_descriptors() == before


def open_descriptors() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - Path.iterdir holds one more open
