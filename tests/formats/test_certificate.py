"""The certificate in the files: fields of fixed length, read by the ecosystem's own libraries."""

import hashlib
import json
import math
import struct
from pathlib import Path

import gguf
import pytest

from anyquant.core.errors import BadInputError
from anyquant.formats.certificate import BLANK, KEY, WIDTHS, Certificate, read_certificate, stamp_gguf
from anyquant.formats.folder.config import _rendered, stamp_config
from anyquant.formats.gguf.metadata import add_certificate
from anyquant.formats.gguf.writer import header, new_writer

FULL = Certificate(
    status="inconclusive",
    limit="max_kl=0.02 max_drop a.py:f:higher=1%",
    mean_kl=0.1 + 0.2,
    mean_kl_upper=1e-300,
    documents=30,
    tokens=123_456_789_012,
    text_sha256="a" * 64,
    recipe_sha256="b" * 64,
    tensor_sha256="c" * 64,
)
LONG = Certificate(status="pass", limit='m"\\\n\u00e4' + "x" * 500, mean_kl=math.inf)


def blank_header() -> bytes:
    writer = new_writer("LLAMA")
    add_certificate(writer)
    # a name that looks like a key of ours stays as it is
    key = (KEY + "status").encode()
    writer.add_name((struct.pack("<Q", len(key)) + key + struct.pack("<I", 8)).decode() + "pass" + " " * 20)
    writer.add_uint32("general.file_type", 7)
    return header(writer, [], [])


@pytest.mark.parametrize("certificate", [BLANK, FULL, LONG], ids=["blank", "full", "long"])
def test_gguf_keys_read_by_the_gguf_library(certificate: Certificate, tmp_path: Path) -> None:
    planned = blank_header()
    stamped = stamp_gguf(planned, certificate)
    assert len(stamped) == len(planned)
    (tmp_path / "a.gguf").write_bytes(stamped)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    fitted = certificate.fitted()
    for name in ("status", "limit", "text_sha256"):
        assert fields[KEY + name].contents() == getattr(fitted, name).ljust(WIDTHS[name])
    for name in ("mean_kl", "documents", "tokens"):
        assert repr(fields[KEY + name].contents()) == repr(getattr(certificate, name))
    assert fields["general.file_type"].contents() == 7
    assert fields["general.name"].contents().endswith("pass" + " " * 20)
    metadata = {name: field.contents() for name, field in fields.items()}
    assert repr(read_certificate(metadata, {}, "here")) == repr(fitted)


@pytest.mark.parametrize("certificate", [BLANK, FULL, LONG], ids=["blank", "full", "long"])
def test_config_keeps_its_length(certificate: Certificate) -> None:
    source = {"model_type": "llama", "name": "\u00e4 \U0001f600", "rope_theta": 1e-05, "nested": {"b": 1, "a": [1, 2]}}
    planned = _rendered(source, BLANK)
    stamped = stamp_config(planned, certificate)
    assert len(stamped) == len(planned)
    found = json.loads(stamped)
    assert {key: value for key, value in found.items() if key != "anyquant"} == source
    read = read_certificate({}, found, "here")
    wanted = certificate.fitted()
    assert read is not None
    assert (read.status, read.limit, read.tokens) == (wanted.status, wanted.limit, wanted.tokens)
    assert read.mean_kl == wanted.mean_kl if math.isfinite(wanted.mean_kl) else math.isnan(read.mean_kl)


def test_long_texts_are_cut_off_and_harmless() -> None:
    limit = LONG.fitted().limit
    assert len(limit) == WIDTHS["limit"] and limit.startswith("m????x")
    assert limit.endswith("x..." + hashlib.sha256(LONG.limit.encode()).hexdigest()[:16])
    assert LONG.fitted().fitted().limit == limit
    exact = "y" * WIDTHS["limit"]
    assert Certificate(limit=exact).fitted().limit == exact


def test_no_two_texts_look_the_same() -> None:
    """Behind the cut, and where a character has no place."""
    texts = ["x" * 200, "x" * 199 + "y", "x" * 201, "max_drop \u00e4.py:f:higher=1%", "max_drop \u00f6.py:f:higher=1%"]
    assert len({Certificate(limit=text).fitted().limit for text in texts}) == len(texts)


def test_what_is_no_certificate() -> None:
    assert read_certificate({"general.name": "a"}, {"model_type": "llama"}, "here") is None
    for wrong in ([], {"status": "pass"}, FULL.plain() | {"tokens": True}, FULL.plain() | {"status": 1}):
        with pytest.raises(BadInputError, match="certificate"):
            read_certificate({}, {"anyquant": wrong}, "here")
