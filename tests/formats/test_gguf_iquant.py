"""Whole files of I-quants: llama.cpp computes with them what it computes with the values that we say they hold."""

from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.linear import Carried, Linear, Role
from anyquant.formats import FORMATS
from anyquant.formats.gguf.metadata import file_type
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.runtimes.llamacpp import LlamaCpp
from anyquant.store.open import open_checkpoint
from support.checkpoints import PROBE_TEXTS, make_checkpoint
from support.write import make_plan, write

NAMES = ("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s")
FORM = FORMATS.get("gguf")


@cache
def source(root: Path) -> Path:
    made: Path = make_checkpoint(root / "source", "llama", config={"intermediate_size": 512})
    return made


@cache
def exact(root: Path) -> Path:
    """The source as a GGUF of float32."""
    checkpoint = open_checkpoint(source(root))
    write(checkpoint, detect(checkpoint), root / "exact", "f32")
    return root / "exact"


def divergence(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Mean KL(first || second) over positions of log-probabilities."""
    return float((np.exp(first) * (first - second)).sum(axis=-1).mean())


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    logs: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return logs


def logits(artifact: Path, tokens: list[int]) -> npt.NDArray[np.float64]:
    with LlamaCpp.open(artifact / "model.gguf", context=256, threads=1) as model:
        return log_softmax(model.logits(tokens))


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_reads_the_values_that_we_read(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp()
    checkpoint = open_checkpoint(source(root))
    architecture = detect(checkpoint)
    folder, decoded = root / name, root / f"{name}-decoded"
    write(checkpoint, architecture, folder, name)
    grid = find_grid(name)

    def rounded(item: Linear | Carried, values: Float32) -> Float32:
        if isinstance(item, Carried):
            return values
        params, codes = grid.quantize(values)
        return grid.decode(codes, params)

    write(checkpoint, architecture, decoded, "f32", change=rounded)
    view = architecture.by_name["blocks.0.ffn_down"].view
    ours_opened, opened = (read_view(FORM.open(path, architecture), view, 0, view.rows) for path in (folder, decoded))
    np.testing.assert_array_equal(ours_opened, opened)
    tokens = Tokenizer.from_file(str(source(root) / "tokenizer.json")).encode(" ".join(PROBE_TEXTS[:12])).ids[:128]
    ours, expected, other = logits(folder, tokens), logits(decoded, tokens), logits(exact(root), tokens)
    # llama.cpp rounds activations to eight bits before it multiplies
    assert divergence(expected, ours) < min(0.02, 0.1 * divergence(expected, other))


def architecture_of(root: Path) -> Architecture:
    return detect(open_checkpoint(source(root)))


def test_plans_are_llama_cpps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What llama_model_quantize of llama.cpp v0.5.0 does with mixtures of these types (recorded by hand)."""
    architecture = architecture_of(tmp_path_factory.getbasetemp())
    by_role = {linear.role: linear for linear in architecture.linears}
    head, embedding, down = by_role[Role.HEAD], by_role[Role.EMBEDDING], by_role[Role.FFN_DOWN]
    recorded = MappingProxyType(
        {
            "iq4_nl": ("q6_k", "iq4_nl", 25),
            "iq4_xs": ("q6_k", "iq4_xs", 30),
            "iq3_s": ("q6_k", "iq3_s", 26),
            "iq3_xxs": ("q5_k", "iq3_s", 23),
            "iq2_s": ("q5_k", "iq3_s", 28),
        }
    )
    for name, (of_head, of_embedding, number) in recorded.items():
        assert FORM.default_grid(head, architecture, name, "bf16")[0] == of_head
        assert FORM.default_grid(embedding, architecture, name, "bf16")[0] == of_embedding
        chosen = {linear.name: name for linear in architecture.linears}
        assert file_type(architecture, make_plan(FORM, architecture, chosen, name, "F32")) == number
        assert FORM.fallback(name, down) is None


def test_narrow_rows_fall_back_to_iq4_nl(tmp_path: Path) -> None:
    narrow = detect(open_checkpoint(make_checkpoint(tmp_path / "narrow", "llama", config={"intermediate_size": 352})))
    down = next(linear for linear in narrow.linears if linear.role is Role.FFN_DOWN)
    assert [FORM.fallback(name, down) for name in NAMES] == [None, *["iq4_nl"] * 4]
