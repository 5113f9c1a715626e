"""Several runs on one output: exactly one wins, the others are told."""

import os
from pathlib import Path

from anyquant.core.errors import OutputError
from anyquant.store.manifest import verify_manifest
from anyquant.store.publish import Stage
from faults.faulty import in_child


def contend(out: Path, number: int, gate: int) -> None:
    os.read(gate, 1)  # all start together
    try:
        with Stage(out) as stage:
            stage.write_file("who", str(number).encode())
            stage.publish()
    except OutputError:
        os._exit(7)
    os._exit(0)


def test_one_wins(tmp_path: Path) -> None:
    for attempt in range(10):
        out = tmp_path / str(attempt)
        gate, start = os.pipe()
        children = []
        for number in range(5):
            child = os.fork()
            if child == 0:
                contend(out, number, gate)
            children.append(child)
        os.write(start, b".....")
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(gate)
        os.close(start)
        assert sorted(codes) == [0, 7, 7, 7, 7]
        verify_manifest(out)
        assert (out / "who").read_text() == str(codes.index(0))
        assert sorted(path.name for path in tmp_path.iterdir()) == [str(i) for i in range(attempt + 1)]


def test_lock_of_a_dead_run_is_free(tmp_path: Path) -> None:
    def dies() -> None:
        stage = Stage(tmp_path / "out").__enter__()
        stage.write_file("who", b"dead")
        os._exit(3)

    assert in_child(dies) == 3
    assert {path.name[:6] for path in tmp_path.iterdir()} == {".out.l", ".out.p"}
    with Stage(tmp_path / "out") as stage:
        stage.write_file("who", b"alive")
        stage.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
