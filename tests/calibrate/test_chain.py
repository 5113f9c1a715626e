"""Statistics through changed blocks against hooks on whole transformers models in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from anyquant.calibrate.chain import Chain
from anyquant.calibrate.stats import Moments
from anyquant.core.checkpoint import read_tensor, read_view
from anyquant.core.errors import AnyQuantError, BadInputError, UsageError
from anyquant.core.linear import Linear
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint

Matrix = npt.NDArray[np.float32]
DOCUMENTS = [
    [int(token) for token in np.random.default_rng(length).integers(0, 300, length)] for length in (40, 7, 40, 1, 65)
]
TOKENS = sum(map(len, DOCUMENTS))
ALL = frozenset({"absolute_maximum", "mean", "second_moment", "hessian"})
CROSS = frozenset({"hessian", "cross"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("llama") / "model", "llama", hidden=64)
    return folder


def opened(folder: Path) -> StreamedModel:
    checkpoint = open_checkpoint(folder)
    return StreamedModel(checkpoint, detect(checkpoint))


def coarse(weights: Matrix, name: str) -> Matrix:
    """Each Linear has its own change, so that a row taken from a neighbour shows."""
    step = np.float32(0.05 + 0.01 * (sum(map(ord, name)) % 7))
    changed: Matrix = np.round(weights / step) * step
    return changed


def whole(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )


def change(model: Any, streamed: StreamedModel, block: int) -> None:
    """Round the Linears of one block of the whole model, found by the names of the checkpoint as it was saved."""
    parameters = dict(model.named_parameters())
    for linear in streamed.architecture.linears:
        if linear.block == block and linear.expert is None:
            name = linear.view.tensor.replace("block_sparse_moe", "mlp")
            target = parameters[name].data[linear.view.start : linear.view.start + linear.view.rows]
            target.copy_(torch.from_numpy(coarse(target.float().numpy(), linear.name)))
        elif linear.block == block:
            half = linear.shape[0] if linear.role.value == "ffn_up" else 0
            kind = "down_proj" if linear.role.value == "ffn_down" else "gate_up_proj"
            target = parameters[f"{linear.module}.{kind}"].data[linear.expert, half : half + linear.shape[0]]
            target.copy_(torch.from_numpy(coarse(target.float().numpy(), linear.name)))


def inputs(model: Any) -> dict[str, Any]:
    """Everything that enters each module, by path, float64 (tokens, in); of experts' modules, all three arguments."""
    seen: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        return lambda module, arguments: seen.setdefault(name, []).append(
            [argument.reshape(-1, argument.shape[-1]) for argument in arguments[:3]]
        )

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("gate", "experts") or isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for document in sorted(DOCUMENTS, key=len):  # as batches are ordered
            model(torch.tensor([document]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: [torch.cat(parts) for parts in zip(*calls, strict=True)] for name, calls in seen.items()}


def expert_inputs(model: Any, seen: dict[str, Any], linear: Linear) -> Any:
    """What enters a Linear of an expert, by the definition of a gated expert."""
    states, chosen, _ = seen[linear.module]
    mine = states[(chosen == linear.expert).any(-1)]
    if linear.role.value != "ffn_down":
        return mine
    experts = model.get_submodule(linear.module)
    gate, up = (mine @ experts.gate_up_proj[linear.expert].T).chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def same(found: Matrix | None, expected: Any) -> None:
    assert found is not None and found.dtype == np.float32
    reference = expected.detach().numpy()
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=2e-5 * np.abs(reference).max())


def check(moments: Moments, x: Any) -> None:
    assert moments.count == len(x)
    same(moments.second_moment, x.square().mean(0))
    same(moments.absolute_maximum, x.abs().amax(0))
    same(moments.mean, x.mean(0))
    same(moments.hessian, x.T @ x / len(x))


VARIANTS: list[tuple[str, bool]] = [
    *((family, False) for family in ("llama", "phi3", "mixtral", "qwen2_moe", "qwen3_moe")),
    *((family, True) for family in ("mixtral", "qwen2_moe")),
]


@pytest.mark.parametrize(("family", "stacked"), VARIANTS)
def test_statistics_are_those_behind_the_quantized_blocks(tmp_path: Path, family: str, stacked: bool) -> None:
    folder = make_checkpoint(tmp_path / "model", family, hidden=64, stacked=stacked)
    streamed, model = opened(folder), whole(folder)
    chain = Chain(streamed, DOCUMENTS)
    for index in range(2):
        expected = inputs(model)
        with chain.block(index) as live:
            found = live.observe(ALL)
            assert set(found) == {linear.input_group for linear in live.linears}
            for linear in live.linears:
                if linear.expert is None:
                    check(found[linear.input_group], expected[linear.module][0])
                else:
                    check(found[linear.input_group], expert_inputs(model, expected, linear))
                before = live.weights(linear)
                view = linear.view
                np.testing.assert_array_equal(before, read_view(streamed.checkpoint, view, 0, view.rows))
                live.assign(linear, coarse(before, linear.name))
                np.testing.assert_array_equal(live.weights(linear), coarse(before, linear.name))
            live.advance()
        change(model, streamed, index)
    check(chain.head(ALL), inputs(model)["lm_head"][0])
    assert chain.unrouted == ()


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_cross_statistics_pair_both_models(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path / "model", family, hidden=64)
    streamed, original, model = opened(folder), whole(folder), whole(folder)
    floats = inputs(original)
    chain = Chain(streamed, DOCUMENTS, both=True)
    for index in range(2):
        with chain.block(index) as live:
            (attention, *_, last) = [linear for linear in live.linears if linear.expert is None]
            live.assign(attention, coarse(live.weights(attention), attention.name))  # the first of this block, too
            if index:
                found = live.observe(CROSS)
            for linear in live.linears[1:]:
                live.assign(linear, coarse(live.weights(linear), linear.name))
            live.advance()
        if not index:
            change(model, streamed, 0)
    parameters = dict(model.named_parameters())
    target = parameters[attention.view.tensor].data
    target.copy_(torch.from_numpy(coarse(target.float().numpy(), attention.name)))
    quantized = inputs(model)
    x, f = quantized[last.module][0], floats[last.module][0]
    assert not torch.allclose(x, f, atol=1e-2)
    same(found[last.input_group].cross, f.T @ x / TOKENS)
    same(found[last.input_group].hessian, x.T @ x / TOKENS)
    for linear in live.linears:
        if linear.expert is not None and linear.role.value != "ffn_down":
            mine = (quantized[linear.module][1] == linear.expert).any(-1)  # routed by the quantized model
            x, f = (seen[linear.module][0][mine] for seen in (quantized, floats))
            same(found[linear.input_group].cross, f.T @ x / len(x))
    change(model, streamed, 1)
    behind = chain.head(CROSS)
    f, x = floats["lm_head"][0], inputs(model)["lm_head"][0]
    same(behind.cross, f.T @ x / TOKENS)


def streams(model: Any, path: str) -> Any:
    """What enters the norm at `path`: the residual stream there, float64 (tokens, hidden)."""
    seen: list[Any] = []
    norm = model.get_submodule(path)
    handle = norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].reshape(-1, 64)))
    inputs(model)
    handle.remove()
    return torch.cat(seen).detach()


def test_residual_statistics_are_of_the_stream_before_each_writer(llama: Path) -> None:
    streamed, original, model = opened(llama), whole(llama), whole(llama)
    chain = Chain(streamed, DOCUMENTS, both=True)
    needs = CROSS | {"residual"}
    for index in range(2):
        with chain.block(index) as live:
            if index:
                found = live.observe(needs)
                early = live.observe(needs, [one for one in live.linears if one.role.value == "attn_output"])
            for linear in live.linears:
                live.assign(linear, coarse(live.weights(linear), linear.name))
            live.advance()
        if not index:
            change(model, streamed, 0)
    quantized = inputs(model)
    places = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    for linear in live.linears:
        moments = found[linear.input_group]
        path = linear.module.removeprefix("model.layers.1.")
        if path not in places:
            assert moments.residual is None
            continue
        before, after = (streams(one, f"model.layers.1.{places[path]}") for one in (original, model))
        x = quantized[linear.module][0]
        same(moments.residual, (before - after).T @ x / TOKENS)
        if path == "self_attn.o_proj":
            np.testing.assert_array_equal(early[linear.input_group].residual, moments.residual)
            np.testing.assert_array_equal(early[linear.input_group].hessian, moments.hessian)


def test_an_expert_without_tokens_gets_the_mean_of_the_others(tmp_path: Path) -> None:
    """With a router of zeros all scores are equal, and the same two experts get every token."""
    chain = Chain(opened(make_checkpoint(tmp_path / "model", "mixtral", hidden=64, blocks=1)), DOCUMENTS[:1])
    with chain.block(0) as live:
        router = next(linear for linear in live.linears if linear.role.value == "router")
        live.assign(router, np.zeros((4, 64), np.float32))
        found = live.observe(ALL)
        counts = [found[f"blocks.0.experts.{expert}.ffn_input"].count for expert in range(4)]
        missing = [linear.name for linear in live.linears if linear.expert is not None and not counts[linear.expert]]
    assert sorted(counts) == [0, 0, 40, 40] and len(missing) == 6
    assert sorted(chain.unrouted) == sorted(missing)
    for kind in ("ffn_input", "ffn_down_input"):
        moments = [found[f"blocks.0.experts.{expert}.{kind}"] for expert in np.argsort(counts)]
        for need in ("second_moment", "hessian", "mean"):
            none, _, one, two = (getattr(moment, need) for moment in moments)
            same(none, torch.from_numpy((one + two) / 2))


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("both", [False, True])
def test_a_tuner_sees_outputs_targets_and_gradients(tmp_path: Path, family: str, both: bool) -> None:
    folder = make_checkpoint(tmp_path / "model", family, hidden=64)
    chain = Chain(opened(folder), DOCUMENTS, both=both)
    with chain.block(0) as live:
        live.assign(live.linears[0], 0 * live.weights(live.linears[0]))
        live.advance()
    with chain.block(1) as live:
        target = [live.target(batch) for batch in range(live.batches)]
        weights = {
            linear.name: torch.from_numpy(coarse(live.weights(linear), linear.name)).requires_grad_()
            for linear in live.linears
        }
        output = live.call(1, weights)
        output.square().sum().backward()
        gradients = [values.grad for values in weights.values()]
        assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)
        assert gradients[-1] is not None
        probe, name = live.linears[-1], live.linears[-1].name
        nudged = {key: values.detach().clone() for key, values in weights.items()}
        nudged[name][0, 0] += 0.01
        with torch.no_grad():
            slope = (live.call(1, nudged).double().square().sum() - output.double().square().sum()) / 0.01
        assert float(slope) == pytest.approx(float(gradients[-1][0, 0]), rel=0.05, abs=1e-2)
        for linear in live.linears:
            live.assign(linear, weights[linear.name].detach().numpy())
        for batch, before in enumerate(target):  # still that of the float block
            torch.testing.assert_close(live.target(batch), before, rtol=0, atol=0)
        live.advance()
        torch.testing.assert_close(chain.batches[1].states, output.detach(), rtol=1e-5, atol=1e-5)
        assert probe.name in weights
    if both:
        model = whole(folder)
        with torch.no_grad():
            last = [model.model(torch.tensor([document])).last_hidden_state[0] for document in DOCUMENTS[1:2]]
        place = next(n for n, batch in enumerate(chain.batches) if batch.documents == (1,))
        normed = chain.model.head_input(target[place])
        torch.testing.assert_close(normed[0].double(), last[0], rtol=1e-4, atol=1e-4)


def test_states_on_disk_and_resumed_states_are_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    def run(chain: Chain, first: int, stop: int = 2) -> None:
        for index in range(first, stop):
            with chain.block(index) as live:
                for linear in live.linears:
                    live.assign(linear, coarse(live.weights(linear), linear.name))
                live.advance()

    plain = Chain(opened(llama), DOCUMENTS, both=True)
    run(plain, 0, 1)
    digest = plain.save(tmp_path / "states")
    run(plain, 1)
    size = 2 * 4 * 64 * TOKENS
    assert (tmp_path / "states").stat().st_size == size
    spilled = Chain(opened(llama), DOCUMENTS, both=True, scratch=tmp_path, memory=size - 1)
    assert isinstance(spilled._chains[0].array, np.memmap) and not isinstance(plain._chains[0].array, np.memmap)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["states"]
    assert spilled.restore(1, tmp_path / "states") == digest
    run(spilled, 1)
    for one, other in zip(plain._chains, spilled._chains, strict=True):
        np.testing.assert_array_equal(one.array, other.array)
    with (tmp_path / "states").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadInputError, match=f"holds {size + 1} bytes of states, these documents have {size}"):
        plain.restore(1, tmp_path / "states")


def test_norms_are_assigned_and_a_transform_is_accepted(llama: Path) -> None:
    """Halving a norm and doubling what reads it preserves the function; the target stays, whichever weights count."""
    streamed = opened(llama)
    norm = streamed.architecture.carried_by_name["blocks.0.attn_norm"]
    chain = Chain(streamed, DOCUMENTS)
    with chain.block(0) as live:
        before = live.target(1)
        half = read_tensor(streamed.checkpoint, norm.tensor) / np.float32(2)
        live.assign_carried(norm, half)
        for linear in live.linears[:3]:
            live.assign(linear, 2 * live.weights(linear))
        live.accept()
        np.testing.assert_array_equal(live.module.input_layernorm.weight.numpy(), half)
        live.assign(live.linears[0], 0 * live.weights(live.linears[0]))
        torch.testing.assert_close(live.target(1), before, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(live.call(1, {}), before, atol=1e-3)
        with pytest.raises(AnyQuantError, match=r"attn_norm: shape \(3,\) cannot be assigned, it has \(64,\)"):
            live.assign_carried(norm, np.zeros(3, np.float32))


def test_blocks_come_in_order_and_cross_needs_both(llama: Path) -> None:
    chain = Chain(opened(llama), DOCUMENTS)
    with pytest.raises(AnyQuantError, match="block 0 is next"), chain.block(1):
        pass
    with chain.block(0) as live, pytest.raises(AnyQuantError, match="unquantized model"):
        live.observe(CROSS)
    with pytest.raises(AnyQuantError, match="block 0 is next in the chain, not 2"):
        chain.head(ALL)
    with pytest.raises(UsageError, match="no tokens"):
        Chain(opened(llama), [[]])
