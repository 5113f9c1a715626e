"""Rules made of a choice give every Linear what was chosen, and touch no other."""

from pathlib import Path

import numpy as np
import pytest

from anyquant.formats import rules
from anyquant.models.detect import detect
from anyquant.pipeline.choice import Wanted, rules_of
from anyquant.pipeline.portions import Question, portions_of
from anyquant.pipeline.prepare import prepare
from anyquant.pipeline.recipe import Recipe, Rule
from anyquant.pipeline.rows import Unweighted
from anyquant.pipeline.search import space_of
from anyquant.pipeline.sensitivity import Sensitivity
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
    made = rules_of(architecture, wanted)
    for linear in architecture.linears:
        wish = wanted.get(linear.name)
        assert _applied(made, linear) == (None if wish is None else (wish.grid, wish.algorithm)), linear.name


def test_a_uniform_choice_is_one_rule_for_each_role(tmp_path: Path) -> None:
    architecture = detect(open_checkpoint(make_checkpoint(tmp_path / "model", "llama")))
    made = rules_of(architecture, {linear.name: Wanted("q4_k") for linear in architecture.linears})
    assert len(made) == len({linear.role for linear in architecture.linears})


def test_a_transform_that_prepares_for_rounding_leaves_some_to_do(tmp_path: Path) -> None:
    """Otherwise the plan of least predicted loss rounds nothing in the blocks, which awq refuses."""
    model, empty = prepare(open_checkpoint(make_checkpoint(tmp_path / "model", "llama")), Recipe()), Unweighted()
    portions = portions_of(Question(model, rules("gguf"), (), empty))
    found = Sensitivity("", "gradient", 0, 0, 0.0, 0, portions)

    def floats(recipe: Recipe) -> set[str]:
        groups = space_of(found, recipe, model.architecture).groups
        return {group.name for group in groups if any(each.name in ("f32", "bf16") for each in group.candidates)}

    named = {portion.name for portion in portions}
    assert floats(Recipe(algorithm="rotate -> gptq")) == named
    assert floats(Recipe(algorithm="awq -> rtn")) == {one.name for one in portions if one.block is None}
