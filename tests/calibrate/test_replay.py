"""What is kept between the passes of a block changes what is computed, and how often, but no bit of any result."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from anyquant.calibrate import chain as module
from anyquant.calibrate.chain import Chain
from anyquant.calibrate.live import LiveBlock
from anyquant.models.detect import detect
from anyquant.models.streaming import StreamedModel
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint
from support.structural import MODELS, make

DOCUMENTS = [
    [int(token) for token in np.random.default_rng(seed).integers(0, 300, length)]
    for seed, length in enumerate((40, 7, 40, 1, 35))
]
NEEDS = frozenset({"hessian", "cross", "residual"})
OWN = ("llama", "phi3", "mixtral", "qwen2_moe")
Bits = dict[str, bytes]


def quantize(live: LiveBlock) -> Bits:
    """Input by input: observe, round, settle, as error feedback does."""
    groups = list(dict.fromkeys(linear.input_group for linear in live.linears if linear.expert is None))
    steps = [[one for one in live.linears if one.input_group == group] for group in groups]
    experts = [one for one in live.linears if one.expert is not None]
    steps += [experts] if experts else []
    seen: Bits = {}
    for linears in steps:
        for group, found in live.observe(NEEDS, linears, last=linears is steps[-1]).items():
            for name in ("second_moment", *sorted(NEEDS)):
                values = getattr(found, name)
                seen[f"{group} {name}"] = b"" if values is None else values.tobytes()
        for linear in linears:
            weights = live.weights(linear)
            live.settle(linear, (np.round(weights * 8) / 8).astype(np.float32))
    live.advance()
    return seen


def run(folder: Path) -> tuple[Bits, Counter[str]]:
    """All statistics of all blocks and the last states; and how often each Linear of the first block was computed."""
    checkpoint = open_checkpoint(folder)
    chain = Chain(StreamedModel(checkpoint, detect(checkpoint), batch_tokens=40), DOCUMENTS, both=True)
    seen: Bits = {}
    computed: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda module, arguments, output: computed.update([name])

    for index in range(chain.model.blocks):
        with chain.block(index) as live:
            hooks = [
                part.register_forward_hook(count(name))
                for name, part in live.module.named_modules()
                if index == 0 and getattr(part, "weight", torch.empty(0)).dim() == 2
            ]
            seen |= quantize(live)
            for hook in hooks:
                hook.remove()
    for number, batch in enumerate(chain.batches):
        seen[f"states {number}"] = batch.states.numpy().tobytes()
    found = chain.head(frozenset({"hessian", "cross"}))
    assert found.cross is not None
    return {**seen, "head": found.cross.tobytes()}, computed


@pytest.mark.parametrize("family", [*OWN, *MODELS])
def test_no_bit_changes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = (
        make_checkpoint(tmp_path / "model", family, hidden=64) if family in OWN else make(tmp_path / "model", family)
    )
    kept, some = run(folder)
    for room in (0, 20_000):  # nothing, and what fits
        monkeypatch.setattr(module, "KEPT_BYTES", room)
        again, all_of_them = run(folder)
        assert again == kept
        # the attention of gpt_oss returns its weights beside the states, that of bloom adds to the stream itself
        assert room or some.total() < all_of_them.total() or family in ("gpt_oss", "bloom")


def test_a_llama_computes_each_matrix_as_often_as_it_must(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", hidden=64)
    _, computed = run(folder)
    batches, once = 5, 1  # the survey of the first batch
    # q, k, v: observing o, for either model. o: observing gate and up; the float model's is kept. gate, up: observing
    # down; down: the float model at that, the quantized one at last
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert computed[name] == 2 * batches + once, name


def test_the_stream_where_a_part_adds_to_it_itself(tmp_path: Path) -> None:
    """Bloom's attention returns the stream with its output added, which must not be added to the stream once more."""
    folder = make(tmp_path / "model", "bloom")
    checkpoint = open_checkpoint(folder)
    chain = Chain(StreamedModel(checkpoint, detect(checkpoint)), DOCUMENTS, both=True)
    float_model, rounded = (
        transformers.BloomForCausalLM.from_pretrained(folder, dtype=torch.float64).eval() for _ in range(2)
    )
    with chain.block(0) as live:
        for linear in live.linears[:-1]:
            found = live.observe(NEEDS, [linear])
            weights = (np.round(live.weights(linear) * 8) / 8).astype(np.float32)
            live.settle(linear, weights)
            rounded.get_submodule(linear.module).weight.data.copy_(torch.from_numpy(weights))
        last = live.linears[-1]
        found = live.observe(NEEDS, [last], last=True)
        live.advance()
    streams, entering = [], []
    for model in (float_model, rounded):
        block = model.transformer.h[0]
        seen: list[Any] = []
        block.post_attention_layernorm.register_forward_pre_hook(lambda module, given, to=seen: to.append(given[0][0]))
        inputs: list[Any] = []
        model.get_submodule(last.module).register_forward_pre_hook(
            lambda module, given, to=inputs: to.append(given[0].reshape(-1, given[0].shape[-1]))
        )
        with torch.no_grad():
            for document in DOCUMENTS:
                model(torch.tensor([document]))
        streams.append(torch.cat(seen))
        entering.append(torch.cat(inputs))
    expected = (streams[0] - streams[1]).T @ entering[1] / len(streams[0])
    residual = found[last.input_group].residual
    np.testing.assert_allclose(residual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_part_that_is_called_in_pieces_is_left_alone(tmp_path: Path) -> None:
    """BERT may apply its feed-forward part to pieces of the tokens: nothing of it is kept, and nothing fails."""
    results = []
    for pieces in (0, 2):
        folder = make(tmp_path / f"model-{pieces}", "bert", chunk_size_feed_forward=pieces)
        checkpoint = open_checkpoint(folder)
        documents = [document for document in DOCUMENTS if len(document) % 2 == 0]
        chain = Chain(StreamedModel(checkpoint, detect(checkpoint)), documents)
        with chain.block(0) as live:
            for linear in live.linears:
                live.settle(linear, (np.round(live.weights(linear) * 8) / 8).astype(np.float32))
            live.observe(frozenset({"second_moment"}), live.linears[:1])
            live.advance()
        results.append(np.concatenate([batch.states.numpy().ravel() for batch in chain.batches]))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)
