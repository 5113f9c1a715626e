"""Rules made of a choice give every Linear what was chosen, and touch no other."""

from pathlib import Path

import numpy as np
import pytest

from anyquant.models.detect import detect
from anyquant.pipeline.choice import Wanted, rules_of
from anyquant.pipeline.recipe import Rule
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint


def _applied(rules: tuple[Rule, ...], linear: object) -> tuple[str | None, str | None] | None:
    found = None
    for rule in rules:
        if rule.matches(linear):  # type: ignore[arg-type]
            found = rule.grid, rule.algorithm
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("seed", range(4))
def test_rules_say_exactly_what_was_chosen(tmp_path: Path, family: str, seed: int) -> None:
    architecture = detect(open_checkpoint(make_checkpoint(tmp_path / "model", family)))
    random = np.random.default_rng(seed)
    wishes = [None, Wanted("q4_k"), Wanted("q4_k", "gptq"), Wanted("q6_k", "rtn")]
    wanted = {}
    for linear in architecture.linears:
        wish = wishes[random.choice(4, p=[0.1, 0.6, 0.15, 0.15])]
        if wish is not None:
            wanted[linear.name] = wish
    rules = rules_of(architecture, wanted)
    for linear in architecture.linears:
        wish = wanted.get(linear.name)
        assert _applied(rules, linear) == (None if wish is None else (wish.grid, wish.algorithm)), linear.name


def test_a_uniform_choice_is_one_rule_for_each_role(tmp_path: Path) -> None:
    architecture = detect(open_checkpoint(make_checkpoint(tmp_path / "model", "llama")))
    rules = rules_of(architecture, {linear.name: Wanted("q4_k") for linear in architecture.linears})
    assert len(rules) == len({linear.role for linear in architecture.linears})
