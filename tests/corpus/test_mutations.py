"""Sound files with random damage: refused with our own errors, or read as the reference library reads them."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import BadInputError, UnsupportedError
from anyquant.store.gguf import GGUFFile
from anyquant.store.safetensors import SafetensorsCheckpoint
from corpus import gguf_files as g
from corpus import safetensors_files as s

ROUNDS = 1500
NUMBERS = [0, 1, 2, 7, 8, 32, 255, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1]

SAFETENSORS_SEED = s.file(
    {
        "__metadata__": {"format": "pt"},
        "a": s.tensor("F32", [2, 3], [0, 24]),
        "b": s.tensor("BF16", [4], [24, 32]),
        "c": s.tensor("I8", [], [32, 33]),
        "d": s.tensor("U8", [0, 9], [33, 33]),
    },
    bytes(range(33)),
)
GGUF_SEED = g.file(
    [
        g.pair("general.architecture", g.STRING, g.text("llama")),
        g.pair("general.alignment", g.UINT32, g.u32(32)),
        g.pair("flag", g.BOOL, b"\x01"),
        g.pair("words", g.ARRAY, g.array(g.STRING, 3, g.text("a") + g.text("") + g.text("ü"))),
        g.pair("counts", g.ARRAY, g.array(g.INT32, 2, bytes(8))),
    ],
    [
        g.info("a", (8, 3), g.F32),
        g.info("b", (32, 2), g.Q4_0, 96),
        g.info("c", (256,), g.Q4_K, 160),
    ],
    bytes(i % 256 for i in range(160 + 160)),
)


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """One to three changes: a flipped bit, a byte, a number, a piece removed, doubled or moved, a cut."""
    data = bytearray(seed)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        place, kind = chance.randrange(len(data)), chance.randrange(7)
        length = chance.choice([1, 2, 4, 8, chance.randrange(1, 40)])
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place] = chance.choice(b'\x00\x01\x02\xff0123456789[]{},:"' + seed[:40])
        elif kind == 2:
            data[place : place + 8] = struct.pack("<Q", chance.choice(NUMBERS))
        elif kind == 3:
            data[place : place + 4] = struct.pack("<I", chance.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 4:
            del data[place : place + length]
        elif kind == 5:
            data[place:place] = data[place : place + length]
        else:
            del data[chance.randrange(len(data)) :]
        if not data:
            break
    return bytes(data)


def raw(checkpoint: Checkpoint, name: str) -> bytes:
    spec = checkpoint.spec(name)
    buffer = np.empty(spec.nbytes, np.uint8)
    checkpoint.read_into(name, 0, spec.rows, buffer)
    return buffer.tobytes()


def agrees_safetensors(path: Path) -> None:
    ours = SafetensorsCheckpoint(path.parent)
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert set(ours.names()) == theirs.keys()
    for name, tensor in theirs.items():
        spec = ours.spec(name)
        assert (spec.dtype, list(spec.shape), raw(ours, name)) == (tensor["dtype"], tensor["shape"], tensor["data"])


def agrees_gguf(path: Path) -> None:
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert list(ours.names()) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        spec = ours.spec(tensor.name)
        assert spec.dtype == tensor.tensor_type.name
        assert spec.shape == tuple(reversed(tensor.shape.tolist()))
        assert raw(ours, tensor.name) == tensor.data.tobytes()
    for field in theirs.fields.values():
        if not field.name.startswith("GGUF."):
            mine, contents = ours.metadata[field.name], field.contents()
            if not isinstance(mine, float) and field.types[-1] not in (
                gguf.GGUFValueType.FLOAT32,
                gguf.GGUFValueType.FLOAT64,
            ):
                assert list(mine) == list(contents) if isinstance(contents, list) else mine == contents


@pytest.mark.parametrize(
    ("name", "seed", "agrees"),
    [
        ("model.safetensors", SAFETENSORS_SEED, agrees_safetensors),
        ("model.gguf", GGUF_SEED, agrees_gguf),
    ],
)
def test_random_damage(tmp_path: Path, name: str, seed: bytes, agrees: Callable[[Path], None]) -> None:
    path = tmp_path / name
    path.write_bytes(seed)
    agrees(path)
    accepted = 0
    for number in range(ROUNDS):
        content = mutated(seed, random.Random(number))
        path.write_bytes(content)
        try:
            agrees(path)
            accepted += 1
        except (BadInputError, UnsupportedError):
            pass
        except BaseException as error:
            raise AssertionError(f"round {number}: {content!r}") from error
    assert 0.01 * ROUNDS < accepted < 0.9 * ROUNDS  # the damage is neither harmless nor always fatal
