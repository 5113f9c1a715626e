"""Every damaged file is refused with our own error, in one line, within a second and without much memory."""

import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import safetensors

from anyquant.core.errors import AnyQuantError
from anyquant.store.gguf import GGUFFile
from anyquant.store.safetensors import SafetensorsCheckpoint
from corpus import gguf_files, safetensors_files

MEMORY = 64 << 20


@pytest.fixture(autouse=True)
def _one_second_of_processor_time() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError("more than a second of processor time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1.0)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


def expect(path: Path, error: type[Exception]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(AnyQuantError) as caught:
            GGUFFile(path) if path.suffix == ".gguf" else SafetensorsCheckpoint(path.parent)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error, caught.value
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1000


def names(cases: list[gguf_files.Case]) -> list[str]:
    return [name for name, _, _ in cases]


@pytest.mark.parametrize("case", safetensors_files.CASES, ids=names(safetensors_files.CASES))
def test_safetensors(tmp_path: Path, case: safetensors_files.Case) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(case[1])
    expect(path, case[2])


@pytest.mark.parametrize("case", gguf_files.CASES, ids=names(gguf_files.CASES))
def test_gguf(tmp_path: Path, case: gguf_files.Case) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(case[1])
    expect(path, case[2])


def test_corpora_are_large_and_their_seeds_sound(tmp_path: Path) -> None:
    """A corpus made from a broken seed would be refused for the wrong reason."""
    for cases in (safetensors_files.CASES, gguf_files.CASES):
        assert len(set(names(cases))) == len(cases) >= 60
        assert len({content for _, content, _ in cases}) == len(cases)
    (tmp_path / "model.safetensors").write_bytes(safetensors_files.SOUND)
    assert SafetensorsCheckpoint(tmp_path).names() == ["a"]
    assert safetensors.deserialize(safetensors_files.SOUND)[0][0] == "a"
    (tmp_path / "model.gguf").write_bytes(gguf_files.SOUND)
    assert GGUFFile(tmp_path / "model.gguf").names() == ["a"]
    assert gguf.GGUFReader(tmp_path / "model.gguf").tensors[0].name == "a"
