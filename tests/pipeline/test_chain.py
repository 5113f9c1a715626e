"""Chains of algorithms and transforms as people write them, and what is wrong with those that cannot be meant."""

from typing import Any

import pytest

from anyquant.core.errors import UsageError
from anyquant.pipeline.chain import parse_chain


@pytest.mark.parametrize(
    "text", ["rotate -> awq -> wanda -> gptq -> eora", "rotate,awq,wanda,gptq,eora", "Rotate+AWQ + wanda->gptq ->eora"]
)
def test_every_step_finds_its_place(text: str) -> None:
    chain = parse_chain(text)
    assert [step.name for step in chain.transforms] == ["rotate", "awq"]
    assert chain.prune is not None and chain.prune.name == "wanda"
    assert chain.correct is not None and chain.correct.name == "eora"
    assert chain.quantize.name == "gptq" and "dampening" in chain.quantize.options


def test_what_is_not_named_is_rounding_or_what_the_pruner_is_made_for() -> None:
    assert parse_chain("awq").quantize.name == "rtn"
    assert parse_chain("wanda").quantize.name == "rtn"
    assert parse_chain("sparsegpt").quantize.name == "gptq"
    assert parse_chain("lorc").quantize.name == "rtn"


def test_options_go_to_the_step_that_knows_them() -> None:
    chain = parse_chain("wanda -> gptq", {"sparsity": 0.25, "gptq.dampening": 0.5})
    assert chain.prune is not None and chain.prune.options["sparsity"] == 0.25
    assert chain.quantize.options["dampening"] == 0.5


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("gtpq", {}, "unknown algorithm 'gtpq'; did you mean gptq"),
        ("", {}, "a step is empty"),
        ("gptq -> gptq", {}, "names gptq twice"),
        ("gptq -> hqq", {}, "gptq and hqq do the same work"),
        ("wanda -> magnitude", {}, "wanda and magnitude do the same work"),
        ("gptq -> awq", {}, "transforms of the model (awq) come before all else"),
        ("gptq -> wanda", {}, "the order is pruning, quantizing, correcting; move wanda"),
        ("gptq", {"dampenin": 0.1}, "no option 'dampenin'; did you mean dampening"),
        ("gptq", {"dampening": "much"}, "option dampening is 'much', expected a number"),
        ("gptq", {"wanda.sparsity": 0.1}, "has no step 'wanda'"),
    ],
)
def test_what_cannot_be_meant(text: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_chain(text, options)
    assert said in str(caught.value)
