"""The proof: float logits of every dense family before and after each rewrite, and that a wrong rewrite is seen."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.calibrate.stats import Moments, Statistics
from anyquant.core.grid import Grid
from anyquant.core.options import complete_options
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.transforms import TRANSFORMS
from anyquant.transforms.base import BlockScene
from anyquant.transforms.checkpoint import RewrittenCheckpoint
from anyquant.transforms.operations import Operation, Permute, Scale, random_rotation
from anyquant.transforms.proof import LIMIT, relative_logit_difference
from anyquant.transforms.rewrites import Rewrite, Rewrites, chain
from anyquant.transforms.sites import block_sites
from support.checkpoints import make_checkpoint
from support.memory import MemoryCheckpoint

DENSE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}
TOKENS = [[int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (24, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], MemoryCheckpoint]:
    """A checkpoint by family and tying, with grouped key-value heads and every bias that the family can have."""
    made: dict[tuple[str, bool], MemoryCheckpoint] = {}

    def get(family: str, tied: bool) -> MemoryCheckpoint:
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            config = {"intermediate_size": 96, **BIASES.get(family, {})}
            make_checkpoint(folder, family, hidden=64, tied=tied, config=config)
            made[family, tied] = MemoryCheckpoint.of(folder)
        return made[family, tied]

    return get


def invented(architecture: Architecture) -> Statistics:
    """Statistics with outlier channels and unequal channels, without running anything."""
    rng = np.random.default_rng(5)
    moments = {}
    for linear in architecture.linears:
        size = linear.shape[1]
        scale = np.exp(rng.standard_normal(size)).astype(np.float32)
        moments[linear.input_group] = Moments(scale**2, 100, absolute_maximum=4 * scale)
    return Statistics(moments)


def rewritten(
    checkpoint: Any, name: str, options: Mapping[str, Any], grid: str = "int3-g16"
) -> tuple[RewrittenCheckpoint, Rewrites]:
    transform = TRANSFORMS.get(name)
    architecture = detect(checkpoint)
    complete = complete_options(name, options, transform.options)
    assert transform.refuses(architecture, complete) is None
    if transform.prepare is not None:
        rewrites = transform.prepare(architecture, checkpoint, complete)
    else:
        grids: Callable[[str], Grid | None] = lambda linear: find_grid(grid)  # noqa: E731
        assert transform.block is not None
        rewrites = chain(
            [
                transform.block(BlockScene(architecture, block, checkpoint, invented(architecture), grids), complete)
                for block in range(architecture.dimensions.blocks)
            ]
        )
    return RewrittenCheckpoint(checkpoint, rewrites), rewrites


CHOICES: list[tuple[str, Mapping[str, Any]]] = [
    ("fold_norms", {}),
    ("fold_norms", {"untie": True}),
    ("rotate", {}),
    ("rotate", {"r2": False, "kind": "random", "seed": 3}),
    ("rotate", {"r1": False}),
    ("rotate", {"kind": "learned", "steps": 3, "grid": "int3-g16"}),
    ("smoothquant", {}),
    ("awq", {"ratios": 3}),
    ("permute", {}),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", DENSE)
def test_logits_stay(model: Callable[[str, bool], MemoryCheckpoint], family: str, tied: bool) -> None:
    original = model(family, tied)
    for name, options in CHOICES:
        changed, rewrites = rewritten(original, name, options)
        assert not rewrites.empty, name
        assert relative_logit_difference(original, changed, TOKENS) < LIMIT, (name, options)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_chain_of_transforms_keeps_the_logits(model: Callable[[str, bool], MemoryCheckpoint], family: str) -> None:
    original = model(family, True)
    changed: Any = original
    steps = []
    for name in ("fold_norms", "rotate", "smoothquant", "permute"):
        changed, rewrites = rewritten(changed, name, {})
        steps.append(rewrites)
    once = RewrittenCheckpoint(original, chain(steps))  # one wrapper does what four did
    assert relative_logit_difference(original, once, TOKENS) < LIMIT
    assert relative_logit_difference(changed, once, TOKENS) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_every_site_takes_what_it_says(model: Callable[[str, bool], MemoryCheckpoint], family: str) -> None:
    """Random operations, all sites at once; heads are permuted within themselves."""
    original = model(family, False)
    architecture = detect(original)
    rng = np.random.default_rng(2)
    for kind in ("scale", "permute", "hadamard", "rotate"):
        steps = []
        for site in block_sites(architecture, 1):
            run = site.head_dim or site.channels
            index = np.concatenate([start + rng.permutation(run) for start in range(0, site.channels, run)])
            if kind in site.takes:
                operation: Operation = Scale(np.exp(rng.standard_normal(site.channels)).astype(np.float32))
                if kind == "permute":
                    operation = Permute(index)
                elif kind != "scale":
                    operation = random_rotation(site.channels, run, 3, kind)
                steps.append(site.rewrite(operation))
        assert len(steps) == {"scale": 4, "permute": 2}.get(kind, 1)
        changed = RewrittenCheckpoint(original, chain(steps))
        assert relative_logit_difference(original, changed, TOKENS) < LIMIT, kind


def test_only_what_must_be_is_untied(model: Callable[[str, bool], MemoryCheckpoint]) -> None:
    original = model("llama", True)
    changed, rewrites = rewritten(original, "rotate", {})
    found = detect(changed)
    assert not found.tied and found.by_name["head"].shape == found.by_name["embedding"].shape
    assert changed.spec("lm_head.weight").nbytes == 4 * 64 * found.dimensions.vocabulary
    assert any("head is stored apart" in note for note in rewrites.notes)

    plain = MemoryCheckpoint(dict(original.arrays), dict(original.config))
    plain.arrays["model.norm.weight"] = np.ones(64, dtype=np.float32)
    plain.arrays["lm_head.weight"] = plain.arrays["model.embed_tokens.weight"]  # stored once more, as some models do
    changed, rewrites = rewritten(plain, "rotate", {})
    assert detect(changed).tied and not rewrites.copies
    assert relative_logit_difference(plain, changed, TOKENS) < LIMIT


def test_what_does_not_read_as_before_is_seen(model: Callable[[str, bool], MemoryCheckpoint]) -> None:
    """Each way to be wrong that the transforms could have: a reader, a maker, a bias or a norm left out."""
    original = model("llama", False)
    victims = (
        "q_proj.weight",
        "o_proj.weight",
        "o_proj.bias",
        "down_proj.bias",
        "embed_tokens.weight",
        "lm_head.weight",
    )
    for name, ends in (
        ("rotate", victims),
        ("fold_norms", ("input_layernorm.weight", "up_proj.weight")),
        ("smoothquant", ("v_proj.weight", "v_proj.bias", "up_proj.bias", "gate_proj.weight", "o_proj.weight")),
        ("permute", ("gate_proj.weight", "gate_proj.bias", "up_proj.bias")),
    ):
        _, rewrites = rewritten(original, name, {})
        for end in ends:
            wrong = {tensor: found for tensor, found in rewrites.tensors.items() if not tensor.endswith(end)}
            assert len(wrong) < len(rewrites.tensors), end
            broken = RewrittenCheckpoint(original, replace(rewrites, tensors=wrong))
            assert relative_logit_difference(original, broken, TOKENS) > 100 * LIMIT, (name, end)


def test_the_wrong_direction_is_seen(model: Callable[[str, bool], MemoryCheckpoint]) -> None:
    original = model("phi3", False)
    _, rewrites = rewritten(original, "rotate", {})
    tensor = "model.layers.0.self_attn.o_proj.weight"
    turned = tuple(Rewrite(r.operation.inverse, r.axis, r.start, r.stop) for r in rewrites.tensors[tensor])
    broken = RewrittenCheckpoint(original, replace(rewrites, tensors={**rewrites.tensors, tensor: turned}))
    assert relative_logit_difference(original, broken, TOKENS) > 100 * LIMIT


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("stacked", [False, True])
def test_experts(tmp_path: Path, family: str, stacked: bool) -> None:
    """Routers, shared and routed experts, stored one by one and as one tensor."""
    folder = make_checkpoint(tmp_path / "model", family, hidden=64, stacked=stacked, config={"intermediate_size": 96})
    original = MemoryCheckpoint.of(folder)
    learned = {"kind": "learned", "steps": 3, "grid": "mxfp4"}
    for name, options in (("rotate", {}), ("rotate", learned), ("smoothquant", {}), ("permute", {})):
        changed, rewrites = rewritten(original, name, options)
        assert any("expert" in tensor for tensor in rewrites.tensors)
        assert relative_logit_difference(original, changed, TOKENS) < LIMIT, name


def test_other_families_are_refused_with_the_reason(model: Callable[[str, bool], MemoryCheckpoint]) -> None:
    architecture = detect(model("llama", False))
    post = replace(architecture, family="olmo2")
    gemma = replace(architecture, family="gemma")
    rotate, fold, awq = (TRANSFORMS.get(name) for name in ("rotate", "fold_norms", "awq"))
    assert "r1 = false" in (rotate.refuses(post, rotate.options) or "")
    assert "post-norm" in (rotate.refuses(post, rotate.options) or "")
    assert rotate.refuses(post, {**rotate.options, "r1": False}) is None
    assert "1 + gain" in (fold.refuses(gemma, fold.options) or "")
    assert awq.refuses(gemma, awq.options) is not None
    assert awq.refuses(gemma, {**awq.options, "sites": "ffn_down_input, attn_output_input"}) is None
    assert "not known" in (fold.refuses(replace(architecture, family="new"), fold.options) or "")
