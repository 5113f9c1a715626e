"""Each limit at its last allowed value and one beyond. Those too large for a test are lowered first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyquant.core.errors import BadInputError
from anyquant.store import limits
from anyquant.store.files import read_small
from anyquant.store.gguf import GGUFFile
from anyquant.store.safetensors import INDEX, SafetensorsCheckpoint
from anyquant.store.strict_json import parse_json
from corpus import gguf_files as g
from corpus import safetensors_files as s

Lower = Callable[[str, int], None]


@pytest.fixture
def lower(monkeypatch: pytest.MonkeyPatch) -> Lower:
    def apply(name: str, value: int) -> None:
        assert value < getattr(limits, name)
        monkeypatch.setattr(limits, name, value)

    return apply


def opens(path: Path, content: bytes) -> bool:
    """Whether the file of this content is accepted; refusals other than BadInputError fail."""
    path.write_bytes(content)
    try:
        GGUFFile(path) if path.suffix == ".gguf" else SafetensorsCheckpoint(path.parent)
    except BadInputError:
        return False
    return True


def many(count: int) -> dict[str, Any]:
    return {f"t{number}": s.tensor(offsets=(8 * number, 8 * number + 8)) for number in range(count)}


def test_safetensors_limits(tmp_path: Path, lower: Lower) -> None:
    path = tmp_path / "model.safetensors"
    lower("TENSORS", 3)
    assert opens(path, s.file(many(2), bytes(16))) and opens(path, s.file(many(3), bytes(24)))
    assert not opens(path, s.file(many(4), bytes(32)))
    assert opens(path, s.file(s.fields(shape=[1] * 7 + [2]), s.DATA))
    assert not opens(path, s.file(s.fields(shape=[1] * 8 + [2]), s.DATA))
    assert opens(path, s.file({"x" * 512: s.tensor()}, s.DATA))
    assert not opens(path, s.file({"x" * 513: s.tensor()}, s.DATA))
    padded = json.dumps({"a": s.tensor()}).encode().ljust(100)
    lower("SAFETENSORS_HEADER_BYTES", 100)
    assert opens(path, s.file(padded, s.DATA))
    assert opens(path, s.file(padded[:99], s.DATA))
    assert not opens(path, s.file(padded + b" ", s.DATA))


def test_shard_limit(tmp_path: Path, lower: Lower) -> None:
    for number in range(3):
        (tmp_path / f"{number}.safetensors").write_bytes(s.file({str(number): s.tensor()}, s.DATA))

    def with_shards(count: int) -> None:
        weight_map = {str(number): f"{number}.safetensors" for number in range(count)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        SafetensorsCheckpoint(tmp_path)

    lower("SHARDS", 2)
    with_shards(2)
    with pytest.raises(BadInputError, match="more than 2 shards"):
        with_shards(3)
    lower("TENSORS", 1)
    with pytest.raises(BadInputError, match="more than 1 tensors"):
        with_shards(2)


def test_json_limits(tmp_path: Path, lower: Lower) -> None:
    deepest = b'{"a":' + b"[" * 15 + b"]" * 15 + b"}"
    assert parse_json(deepest, "x")
    with pytest.raises(BadInputError, match="deeper than 16"):
        parse_json(deepest.replace(b"[]", b"[{}]"), "x")
    (tmp_path / "config.json").write_bytes(b"{}        ")
    lower("SMALL_FILE_BYTES", 10)
    assert read_small(tmp_path, "config.json", limits.SMALL_FILE_BYTES) == b"{}        "
    (tmp_path / "config.json").write_bytes(b"{}         ")
    with pytest.raises(BadInputError, match="11 bytes, at most 10"):
        read_small(tmp_path, "config.json", limits.SMALL_FILE_BYTES)


def test_gguf_limits(tmp_path: Path, lower: Lower) -> None:
    path = tmp_path / "model.gguf"

    def string(length: int) -> bytes:
        return g.file([g.pair("k", g.STRING, g.text("x" * length))])

    def strings(length: int) -> bytes:
        return g.file([g.pair("k", g.ARRAY, g.array(g.STRING, 2, g.text("x" * length) + g.text("")))])

    def numbers(count: int) -> bytes:
        return g.file([g.pair("k", g.ARRAY, g.array(g.UINT8, count, bytes(count)))])

    def texts(count: int) -> bytes:
        return g.file([g.pair("k", g.ARRAY, g.array(g.STRING, count, g.text("") * count))])

    def tensors(count: int) -> bytes:
        return g.file([], [g.info(str(number), offset=32 * number) for number in range(count)], bytes(32 * count))

    def aligned(value: int) -> bytes:
        pair = g.pair("general.alignment", g.UINT32, g.u32(value))
        return g.file([pair], [g.info()], bytes(8), alignment=value)

    lower("GGUF_STRING_BYTES", 20)
    lower("GGUF_ARRAY_ITEMS", 20)
    lower("TENSORS", 20)
    for make in (string, strings, numbers, texts, tensors):
        assert opens(path, make(19)) and opens(path, make(20)), make.__name__
        assert not opens(path, make(21)), make.__name__
    assert opens(path, g.file([g.pair("k" * 65_535, g.UINT8, b"x")]))
    assert not opens(path, g.file([g.pair("k" * 65_536, g.UINT8, b"x")]))
    assert opens(path, g.file([], [g.info("x" * 63)], bytes(32)))
    assert not opens(path, g.file([], [g.info("x" * 64)], bytes(32)))
    assert opens(path, g.file([], [g.info(dims=(2, 1, 1, 1))], bytes(32)))
    assert not opens(path, g.file([], [g.info(dims=(2, 1, 1, 1, 1))], bytes(32)))
    assert opens(path, aligned(8)) and opens(path, aligned(65_536))
    assert not opens(path, aligned(4)) and not opens(path, aligned(131_072))


def test_gguf_metadata_limit(tmp_path: Path, lower: Lower) -> None:
    path = tmp_path / "model.gguf"
    content = g.file([g.pair("k", g.STRING, g.text("x" * 100))])
    lower("GGUF_METADATA_BYTES", len(content))
    assert opens(path, content)
    lower("GGUF_METADATA_BYTES", len(content) - 1)
    assert not opens(path, content)


def test_claimed_sizes_cost_nothing(tmp_path: Path) -> None:
    """A sparse file of 8 TiB backs every claim that a length makes; only limits are left to refuse them."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(s.file(s.fields(), s.DATA, limits.SAFETENSORS_HEADER_BYTES + 1))
    with path.open("r+b") as file:
        file.truncate(8 << 40)
    with pytest.raises(BadInputError, match="exceeds"):
        SafetensorsCheckpoint(tmp_path)
    for pair in (
        g.pair("k", g.STRING, g.text("", 1 << 40)),
        g.pair("k", g.ARRAY, g.array(g.STRING, 1 << 40)),
        g.pair("k", g.ARRAY, g.array(g.UINT8, 1 << 40)),
        g.text("", 1 << 40),
    ):
        path = tmp_path / "model.gguf"
        path.write_bytes(g.file([pair]))
        with path.open("r+b") as file:
            file.truncate(8 << 40)
        with pytest.raises(BadInputError, match="at most"):
            GGUFFile(path)
