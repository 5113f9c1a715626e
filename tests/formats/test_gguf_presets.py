"""Presets against what llama.cpp's own quantizer chose (tools/record_presets.py recorded it)."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from anyquant.core.errors import UsageError
from anyquant.core.linear import Linear, Role, View
from anyquant.formats.gguf.presets import fallback, preset, preset_names, resolve
from anyquant.models.architecture import Architecture, Dimensions

GOLDEN = Path(__file__).parents[1] / "golden" / "presets"
NAMES = "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 Q3_K_L Q3_K_M Q3_K_S Q2_K Q2_K_S"


def architecture_of(shape: dict[str, Any], family: str | None = None) -> Architecture:
    """The model that a golden table was recorded for, by hand."""
    hidden, ffn, experts, blocks = shape["hidden"], shape["ffn"], shape["experts"], shape["blocks"]
    linears = [Linear("embedding", Role.EMBEDDING, View("embed", 0, 2, hidden), None, "tokens", "embed")]

    def add(block: int, role: Role, tensor: str, start: int = 0, expert: int | None = None) -> None:
        name = f"blocks.{block}.{role}" if expert is None else f"blocks.{block}.experts.{expert}.{role}"
        columns = ffn if role is Role.FFN_DOWN else hidden
        linears.append(Linear(name, role, View(f"{block}.{tensor}", start, 2, columns), block, "", tensor, expert))

    for block in range(blocks):
        for index, role in enumerate((Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)):
            add(block, role, "qkv" if shape["fused"] else role, 2 * index if shape["fused"] else 0)
        add(block, Role.ATTN_OUTPUT, "output")
        if experts:
            add(block, Role.ROUTER, "router")
        for expert in range(experts) if experts else [None]:
            add(block, Role.FFN_GATE, "gate_up" if shape["fused"] else f"gate{expert}", 0, expert)
            add(block, Role.FFN_UP, "gate_up" if shape["fused"] else f"up{expert}", 2, expert)
            add(block, Role.FFN_DOWN, f"down{expert}", 0, expert)
    if not shape["tied"]:
        linears.append(Linear("head", Role.HEAD, View("head", 0, 2, hidden), None, "", "head"))
    sizes = Dimensions(
        hidden, ffn, blocks, shape["heads"], shape["kv_heads"], 32, 2, 512, 1e-5, 1e4, 32, experts=experts
    )
    return Architecture(family or shape["family"], "", sizes, tuple(linears), (), shape["tied"], "")


def tensor_of(linear: Linear, fused: bool) -> str:
    """Name in the GGUF."""
    if linear.block is None:
        return {Role.EMBEDDING: "token_embd.weight", Role.HEAD: "output.weight"}[linear.role]
    role: str = {Role.ROUTER: "ffn_gate_inp"}.get(linear.role, linear.role)
    if fused:
        role = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}.get(role, role)
    return f"blk.{linear.block}.{role}{'_exps' if linear.expert is not None else ''}.weight"


def expanded(table: dict[str, str], blocks: int) -> dict[str, str]:
    """Undo the run-length code of a golden table: tensor name to type."""
    types = {}
    for place, runs in table.items():
        kinds = [kind for run in runs.split() for kind in [run.split("*")[0]] * int(run.split("*")[1])]
        assert len(kinds) == (blocks if "*" in place else 1)
        types |= {place.replace("*", str(block)): kind for block, kind in enumerate(kinds)}
    return types


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_tensor_types_equal_those_of_llama_quantize(path: Path) -> None:
    golden = json.loads(path.read_text())
    shape, compared = golden["shape"], 0
    architecture = architecture_of(shape)
    for name in preset_names():
        for importance in (False, True):
            table = golden["tables"][name]
            if importance:
                table = golden["tables"].get(f"{name} with importance", table)
            if "refused" in table:
                assert preset(name).needs_importance and not importance, table["refused"]
                continue
            found: dict[str, set[str]] = {}
            for linear, (grid, _) in zip(
                architecture.linears, resolve(name, architecture, importance).values(), strict=True
            ):
                found.setdefault(tensor_of(linear, shape["fused"]), set()).add(grid)
            assert found == {tensor: {kind} for tensor, kind in expanded(table, shape["blocks"]).items()}, name
            compared += 1
    assert compared >= 2 * len(preset_names()) - 1


def test_names_and_file_types_are_those_of_gguf() -> None:
    assert preset_names() == NAMES.split()
    for name in preset_names():
        number = preset(name).file_type
        assert gguf.LlamaFileType(number).name == ("ALL_F32" if name == "F32" else f"MOSTLY_{name}")
    assert preset("q4_k_m") is preset("Q4_K_M")
    with pytest.raises(UsageError, match="unknown preset 'Q4_K_N'; did you mean Q4_K_"):
        preset("Q4_K_N")


def test_reasons_name_the_rule_and_the_fallback() -> None:
    shape = json.loads((GOLDEN / "llama-9-width-320.json").read_text())["shape"]
    reasons = resolve("Q4_K_M", architecture_of(shape), importance=False)
    assert reasons["blocks.1.ffn_down"] == (
        "q5_0",
        "Q4_K_M: base grid; q5_0 instead of q4_k: rows of 352 are no multiple of 256",
    )
    assert reasons["blocks.8.ffn_down"][0] == "q8_0"
    assert reasons["blocks.8.ffn_down"][1].startswith("Q4_K_M: ffn_down, more bits of the blocks; q8_0 instead of q6_k")
    routed = json.loads((GOLDEN / "llama-32-8-experts.json").read_text())["shape"]
    chosen = resolve("Q4_0", architecture_of(routed), importance=False)
    assert chosen["blocks.3.router"] == ("f32", "Q4_0: routers stay in float")
    assert chosen["blocks.3.attn_v"] == ("q8_0", "Q4_0: attn_v, 8 experts")


def test_a_mistral_is_a_llama_to_these_rules() -> None:
    """Its GGUF says "llama", so a Mistral of 80 blocks counts as a 70B."""
    shape = json.loads((GOLDEN / "llama-80-gqa8.json").read_text())["shape"]
    llama, mistral = (resolve("Q3_K_S", architecture_of(shape, family), False) for family in ("llama", "mistral"))
    assert llama == mistral and llama["blocks.40.attn_v"][0] == "q5_k"


def test_fallback_reaches_a_grid_that_fits() -> None:
    assert fallback("q4_k", 512) is None and fallback("q4_k", 320) == "q5_0"
    assert fallback("q4_k", 40) == "f16" and fallback("q8_0", 40) == "f16" and fallback("f16", 41) is None
