"""SmoothQuant by hand; AWQ and permutation against plain rounding, measured on activations; what they leave alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyquant.calibrate.stats import Moments, Statistics
from anyquant.core.checkpoint import read_tensor
from anyquant.core.errors import UsageError
from anyquant.core.options import complete_options
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.transforms import TRANSFORMS
from anyquant.transforms.base import BlockScene
from anyquant.transforms.checkpoint import RewrittenCheckpoint
from anyquant.transforms.operations import Permute, Scale
from anyquant.transforms.rewrites import Rewrites
from anyquant.transforms.search import site_error, site_readers
from anyquant.transforms.sites import block_sites
from anyquant.transforms.smooth import smoothing_scales
from support.checkpoints import make_checkpoint
from support.memory import MemoryCheckpoint

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MemoryCheckpoint:
    folder = tmp_path_factory.mktemp("llama") / "model"
    make_checkpoint(folder, "llama", hidden=64, blocks=1, config={"intermediate_size": 96})
    return MemoryCheckpoint.of(folder)


def activations(size: int, outliers: int = 3) -> Any:
    """Correlated activations (512, size) with a few channels forty times as large."""
    x = RNG.standard_normal((512, size)) @ (np.eye(size) + 0.1 * RNG.standard_normal((size, size)))
    x[:, RNG.choice(size, outliers, replace=False)] *= 40
    return x.astype(np.float32)


def scene(checkpoint: Any, inputs: dict[str, Any], grid: str, hessian: bool = False) -> BlockScene:
    moments = {
        group: Moments(
            np.square(x).mean(axis=0),
            len(x),
            absolute_maximum=np.abs(x).max(axis=0),
            hessian=x.T @ x / len(x) if hessian else None,
        )
        for group, x in inputs.items()
    }
    return BlockScene(detect(checkpoint), 0, checkpoint, Statistics(moments), lambda linear: find_grid(grid))


def run(name: str, given: BlockScene, **options: Any) -> Rewrites:
    transform = TRANSFORMS.get(name)
    assert transform.block is not None
    complete = complete_options(name, options, transform.options)
    assert transform.refuses(given.architecture, complete) is None
    return transform.block(given, complete)


def output_error(checkpoint: Any, tensor: str, x: Any, grid: str) -> float:
    """Mean squared output error of rounding the tensor to nearest with importance, measured on x itself."""
    weights, lies_on = read_tensor(checkpoint, tensor), find_grid(grid)
    params, codes = lies_on.quantize(weights, np.square(x).mean(axis=0))
    return float(np.square(x.astype(np.float64) @ (lies_on.decode(codes, params) - weights).T).mean())


def test_smoothing_by_hand() -> None:
    """sqrt(4 / 1), sqrt(9 / 4), and channels where nothing flows."""
    x, w = np.array([4, 9, 0, 5], dtype=np.float32), np.array([1, 4, 2, 0], dtype=np.float32)
    np.testing.assert_allclose(smoothing_scales(x, w, 0.5), [2, 1.5, 1, 1])
    np.testing.assert_allclose(smoothing_scales(x, w, 1.0), [4, 9, 1, 1])
    np.testing.assert_allclose(smoothing_scales(x, w, 0.0), [1, 1 / 4, 1, 1])


def test_smoothed_model_by_hand(llama: MemoryCheckpoint) -> None:
    """Equation 4 written out for the site behind a norm, and for values, where two heads share a scale."""
    inputs = {"blocks.0.attn_input": activations(64), "blocks.0.attn_output_input": activations(64)}
    rewrites = run("smoothquant", scene(llama, inputs, "int8-channel"), alpha=0.75)
    changed = RewrittenCheckpoint(llama, rewrites)
    prefix = "model.layers.0."
    attention = {name: llama.arrays[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkvo"}
    largest = np.abs(np.concatenate([attention[name] for name in "qkv"])).max(axis=0)
    scales = np.abs(inputs["blocks.0.attn_input"]).max(axis=0) ** 0.75 / largest**0.25
    gain = llama.arrays[f"{prefix}input_layernorm.weight"]
    np.testing.assert_allclose(read_tensor(changed, f"{prefix}input_layernorm.weight"), gain / scales, rtol=1e-5)
    found = read_tensor(changed, f"{prefix}self_attn.q_proj.weight")
    np.testing.assert_allclose(found, attention["q"] * scales, rtol=1e-5)

    peaks = np.abs(inputs["blocks.0.attn_output_input"]).max(axis=0)
    per_query = peaks**0.75 / np.abs(attention["o"]).max(axis=0) ** 0.25
    heads = per_query.reshape(4, 16)
    shared = [(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]
    found = read_tensor(changed, f"{prefix}self_attn.o_proj.weight")
    wide = np.concatenate([shared[0], shared[0], shared[1], shared[1]])
    np.testing.assert_allclose(found, attention["o"] * wide, rtol=1e-5)
    values = read_tensor(changed, f"{prefix}self_attn.v_proj.weight")
    both = attention["v"] * scales / np.concatenate(shared)[:, None]
    np.testing.assert_allclose(values, both, rtol=1e-5)
    assert not any("up_proj" in tensor for tensor in rewrites.tensors)  # no statistics: left alone, and said
    assert sum("not smoothed" in note for note in rewrites.notes) == 2


@pytest.mark.parametrize("hessian", [False, True])
@pytest.mark.parametrize("grid", ["int3-g32", "q4_0"])
def test_awq_lowers_the_error_on_activations_with_outliers(llama: MemoryCheckpoint, grid: str, hessian: bool) -> None:
    x = activations(64)
    rewrites = run("awq", scene(llama, {"blocks.0.attn_input": x}, grid, hessian))
    changed = RewrittenCheckpoint(llama, rewrites)
    (operation,) = rewrites.inputs["blocks.0.attn_input"]
    tensors = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    before = sum(output_error(llama, tensor, x, grid) for tensor in tensors)
    after = sum(output_error(changed, tensor, operation.apply(x), grid) for tensor in tensors)
    # the rounding knows the importance of channels, and still scaling them helps
    assert after < 0.95 * before
    assert float(operation.apply(x).std(axis=0).max()) < float(x.std(axis=0).max())


def test_the_error_that_is_searched_is_the_error_of_the_outputs(llama: MemoryCheckpoint) -> None:
    x, grid, tensor = activations(64), "int3-g32", "model.layers.0.self_attn.o_proj.weight"
    given = scene(llama, {"blocks.0.attn_output_input": x}, grid, hessian=True)
    site = next(block_sites(given.architecture, 0, ["attn_output_input"]))
    readers = site_readers(given, site, 0)
    rows = len(llama.arrays[tensor])
    np.testing.assert_allclose(site_error(readers, site, None) / rows, output_error(llama, tensor, x, grid), rtol=1e-3)
    for operation in (
        Scale(np.exp(RNG.standard_normal(32)).astype(np.float32)),
        Permute(np.concatenate([RNG.permutation(16), 16 + RNG.permutation(16)])),
    ):
        rewrites = site.rewrite(operation)
        measured = output_error(RewrittenCheckpoint(llama, rewrites), tensor, site.widen(operation).apply(x), grid)
        np.testing.assert_allclose(site_error(readers, site, operation) / rows, measured, rtol=1e-3)


def test_awq_leaves_alone_what_it_does_not_help(llama: MemoryCheckpoint) -> None:
    """A grid that holds every weight exactly: no error to lower."""
    rewrites = run("awq", scene(llama, {"blocks.0.attn_input": activations(64)}, "f32"), ratios=4)
    assert rewrites.empty and any("no scale lowers" in note for note in rewrites.notes)
    assert len(rewrites.notes) == 4  # every site accounts for itself


def test_permutation_gathers_large_channels(llama: MemoryCheckpoint) -> None:
    checkpoint = MemoryCheckpoint(dict(llama.arrays), dict(llama.config))
    down = "model.layers.0.mlp.down_proj.weight"
    checkpoint.arrays[down] = llama.arrays[down] * np.where(np.arange(96) % 3, 1, 10).astype(np.float32)
    x = RNG.standard_normal((512, 96)).astype(np.float32)
    rewrites = run("permute", scene(checkpoint, {"blocks.0.ffn_down_input": x}, "int4-g32"))
    changed = RewrittenCheckpoint(checkpoint, rewrites)
    (operation,) = rewrites.inputs["blocks.0.ffn_down_input"]
    before = output_error(checkpoint, down, x, "int4-g32")
    assert output_error(changed, down, operation.apply(x), "int4-g32") < 0.7 * before


def test_options_are_checked(llama: MemoryCheckpoint) -> None:
    given = scene(llama, {}, "int4-g32")
    for name, options, message in (
        ("awq", {"ratio": 3}, "has no option 'ratio'; did you mean ratios"),
        ("awq", {"ratios": 0}, "at least 1"),
        ("awq", {"sites": "attn_inptu"}, "did you mean attn_input"),
        ("smoothquant", {"alpha": 1.5}, "0 to 1"),
        ("smoothquant", {"alpha": "half"}, "expected a number"),
    ):
        with pytest.raises(UsageError, match=message):
            run(name, given, **options)
    with pytest.raises(UsageError, match="did you mean rotate"):
        TRANSFORMS.get("rotat")
    rotate = TRANSFORMS.get("rotate")
    for options, message in (
        ({"kind": "hadamrd"}, "kind is 'hadamrd'"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"seed": -1}, "seed is -1, expected at least 0"),
        ({"grid": "int4-g12", "kind": "learned"}, "int4-g12"),
        ({"grid": "bf16", "kind": "learned"}, "grid is 'bf16', a float type"),
        ({"grid": "nvfp4"}, "grid is for kind = 'learned', kind is 'hadamard'"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            rotate.refuses(detect(llama), {**rotate.options, **options})
        assert "\n" not in str(raised.value)


def test_rotation_lowers_outliers_of_the_stream(tmp_path: Path) -> None:
    """Weights with one large input channel per matrix become flat."""
    folder = make_checkpoint(tmp_path / "model", "llama", hidden=64, blocks=1)
    checkpoint = MemoryCheckpoint.of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint.arrays[name][:, 5] *= 30
    rotate = TRANSFORMS.get("rotate")
    assert rotate.prepare is not None
    rewrites = rotate.prepare(detect(checkpoint), checkpoint, dict(rotate.options))
    turned = read_tensor(RewrittenCheckpoint(checkpoint, rewrites), name)

    def peak(weights: Any) -> float:
        return float(np.abs(weights).max() / np.sqrt(np.square(weights).mean()))

    assert peak(turned) < 0.5 * peak(checkpoint.arrays[name])
