"""Planning: every Linear gets a grid and a reason, nothing asked for is ignored, bytes are exact before any write."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors

from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.linear import Role
from anyquant.formats import rules
from anyquant.models.detect import detect
from anyquant.pipeline import planner
from anyquant.pipeline.accounts import make_ledger
from anyquant.pipeline.planner import Job, draft_job
from anyquant.pipeline.recipe import Recipe, Rule
from anyquant.store.open import open_checkpoint
from support.jobs import job_of

Model = Callable[[str], Path]
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "mixtral-stacked", "qwen3_moe-stacked"]


def grids(job: Job) -> dict[str, str]:
    return {name: decision.grid for name, decision in job.plan.decisions.items()}


def test_a_grid_is_for_the_block_linears(model: Model) -> None:
    job = job_of(model("llama"), grid="q4_0")
    for linear in job.architecture.linears:
        decision = job.plan.decisions[linear.name]
        if linear.block is not None:
            assert (decision.grid, decision.requested, decision.reason) == ("q4_0", "q4_0", "--grid")
    assert job.plan.decisions["embedding"].grid == "q4_0"  # as in llama.cpp's mixture on this base
    assert job.plan.decisions["head"].grid == "q6_k"


def test_routers_are_left_alone_by_a_grid(model: Model) -> None:
    job = job_of(model("qwen3_moe"), "state", grid="q8_0")
    kept = {linear.role for linear in job.architecture.linears if job.plan.decisions[linear.name].grid != "q8_0"}
    assert kept == {Role.EMBEDDING, Role.HEAD, Role.ROUTER}


def test_nothing_asked_for_means_as_stored(model: Model) -> None:
    job = job_of(model("llama-bf16"), rules=(Rule(role="attn_v", grid="q8_0"),))
    assert {grid for name, grid in grids(job).items() if not name.endswith("attn_v")} == {"bf16"}
    assert grids(job)["blocks.1.attn_v"] == "q8_0"


def test_overrides_lie_over_a_preset_and_rules_over_both(model: Model) -> None:
    first, second = Rule(role="attn_v", grid="f16"), Rule(pattern="blocks.1.*", blocks=(1, 1), grid="q4_1")
    job = job_of(model("llama"), preset="Q8_0", embedding="f16", head="f32", rules=(first, second))
    found = grids(job)
    assert (found["embedding"], found["head"]) == ("f16", "f32")
    assert (found["blocks.0.attn_v"], found["blocks.0.attn_q"]) == ("f16", "q8_0")
    assert {grid for name, grid in found.items() if name.startswith("blocks.1.")} == {"q4_1"}
    assert job.plan.decisions["embedding"].reason == "--embedding"
    assert "attn_v" in job.plan.decisions["blocks.0.attn_v"].reason
    assert job.plan.decisions["blocks.1.attn_v"].requested == "q4_1"  # the last rule wins
    assert job_of(model("llama"), preset="Q8_0", rules=(Rule(role="head", grid="f32"),), head="f16").plan.decisions[
        "head"
    ].grid == ("f32")


@pytest.mark.parametrize(
    ("name", "recipe", "named"),
    [
        ("llama", {"rules": (Rule(pattern="blocks.9.*", grid="f16"),)}, r"rule 0 .*blocks\.9.* matches no Linear"),
        ("llama", {"rules": (Rule(role="router", grid="f16"),)}, "router.*matches no Linear"),
        ("llama-tied", {"head": "f16"}, "tied to the embedding: use --embedding"),
        ("llama", {"grid": "q4_l"}, "unknown grid 'q4_l'; did you mean iq4_nl or q4_"),
        ("llama", {"preset": "Q4_K_N"}, "'Q4_K_N'.*Q4_K_M"),
        ("llama", {"grid": "f16", "algorithm": "gpqt"}, "unknown algorithm 'gpqt'"),
        ("llama", {"rules": (Rule(role="head", algorithm="rnt"),)}, "'rnt'; did you mean rtn"),
        ("llama", {"preset": "F16", "embedding": "q8"}, "unknown grid 'q8'"),
        ("phi3", {"grid": "q8_0", "rules": (Rule(role="attn_q", grid="f16"),)}, "one tensor.*must share a grid"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(model: Model, name: str, recipe: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        job_of(model(name), **recipe)


def test_parts_of_a_fused_tensor_that_agree(model: Model) -> None:
    fused = Rule(pattern="blocks.0.attn_[qkv]", grid="f16")
    job = job_of(model("phi3"), grid="q8_0", rules=(fused,))
    assert {grids(job)[f"blocks.0.attn_{part}"] for part in "qkv"} == {"f16"}
    groups = {job.plan.decisions[f"blocks.0.attn_{part}"].tie_group for part in "qkv"}
    assert len(groups) == 1
    assert None not in groups
    assert job.plan.decisions["blocks.0.attn_output"].tie_group is None


def test_a_width_that_does_not_divide_falls_back_and_says_so(model: Model) -> None:
    decision = job_of(model("llama-narrow"), grid="q4_k").plan.decisions["blocks.0.ffn_down"]
    assert (decision.requested, decision.grid) == ("q4_k", "q5_0")
    assert "480" in decision.reason
    assert "q5_0" in decision.reason
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.ffn_down: q4_k does not fit.*480"):
        job_of(model("llama-narrow"), "state", grid="q4_k")


def test_all_reasons_of_a_refusal_in_one_line_each_said_once(model: Model) -> None:
    with pytest.raises(UnsupportedError) as caught:
        job_of(model("llama"), grid="int4-g128")
    message = str(caught.value)
    assert message.count("int4-g128") == 1
    assert "blocks.0.attn_q and 13 more" in message


# bytes of a weight by hand: a scale of 2 bytes for 32 codes of 8 bits, 144 bytes for 256 weights, 210 bytes for 256
BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_k": 144 / 256, "q6_k": 210 / 256}


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize("grid", BYTES)
def test_bytes_are_known_exactly(model: Model, name: str, grid: str) -> None:
    """Against the shapes as the safetensors library reads them."""
    job = job_of(model(name), grid=grid, embedding=grid, head=grid)
    expected = 0.0
    with safetensors.safe_open(model(name) / "model.safetensors", "numpy") as stored:
        for tensor in stored.keys():  # noqa: SIM118 - not a dict
            shape = stored.get_slice(tensor).get_shape()
            expected += float(np.prod(shape)) * (BYTES[grid] if len(shape) == 2 else 4)
    assert job.layout.payload == expected
    assert sum(line.target_bytes for line in make_ledger(job).lines) == expected


@pytest.mark.parametrize("name", MOE)
def test_experts_are_planned_with_a_complete_ledger(model: Model, name: str) -> None:
    """Refused for GGUF by a reason, but every source tensor is listed with its grid and its exact bytes."""
    checkpoint = open_checkpoint(model(name))
    architecture = detect(checkpoint)
    model_as_it_is = planner.Model(architecture, checkpoint, checkpoint)
    job, refusal = draft_job(model_as_it_is, rules("gguf"), Recipe(preset="Q4_K_M"), False)
    assert "mixture-of-experts" in refusal
    ledger = make_ledger(job)
    assert {line.source for line in ledger.lines} == set(checkpoint.names())
    assert sum(line.source_bytes for line in ledger.lines) == sum(
        checkpoint.spec(tensor).nbytes for tensor in checkpoint.names()
    )
    applied = {line.name: line for line in ledger.lines}
    assert applied["blocks.1.experts.3.ffn_up"].applied == "q4_k"
    expert = architecture.by_name["blocks.1.experts.3.ffn_up"]
    assert applied[expert.name].target_bytes == expert.shape[0] * expert.shape[1] * 144 // 256
    assert all(applied[linear.name].applied == "f32" for linear in architecture.linears if linear.role is Role.ROUTER)
    with pytest.raises(UnsupportedError, match="mixture-of-experts"):
        job_of(model(name), preset="Q4_K_M")


def test_what_is_outside_the_blocks_is_not_pruned_unless_a_rule_says_so(model: Model) -> None:
    asked = job_of(model("llama"), "state", importance=True, grid="int4-g32", algorithm="wanda -> gptq -> eora")
    assert asked.plan.decisions["blocks.0.attn_q"].chain == "wanda -> gptq -> eora"
    assert asked.plan.decisions["head"].chain == "rtn" and not asked.plan.decisions["head"].corrections
    rule = Rule(role="head", grid="int8-g32", algorithm="magnitude")
    ruled = job_of(model("llama"), "state", importance=True, grid="int4-g32", rules=(rule,))
    assert ruled.plan.decisions["head"].chain == "magnitude -> rtn"


def test_rewritten_norms_are_planned_in_a_type_that_holds_them(model: Model) -> None:
    asked = job_of(model("llama-bf16"), "state", importance=True, grid="int4-g32", algorithm="awq")
    assert set(asked.plan.carried.values()) == {"F32"}
    assert set(job_of(model("llama-bf16"), "state", grid="int4-g32").plan.carried.values()) == {""}
