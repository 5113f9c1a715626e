"""Recipes: what a TOML file says becomes one object, and whatever is not understood is refused by its name."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from anyquant.core.errors import BadInputError, UsageError
from anyquant.core.linear import Linear, Role, View
from anyquant.pipeline.recipe import MAXIMUM_BYTES, Calibration, Recipe, Rule, canonical, load_recipe, parse_recipe

FULL = """
version = 1
grid = "q4_k"
algorithm = "rtn"
embedding = "q8_0"
head = "q6_k"

[options]
steps = 3

[[rule]]
role = "ffn_down"
blocks = [0, 3]
grid = "q6_k"

[[rule]]
pattern = "blocks.*.attn_v"
algorithm = "rtn"
options = { depth = 2 }

[calibration]
text = "mine.txt"
tokens = 1000
context = 128
"""


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(FULL)
    assert load_recipe(path) == Recipe(
        grid="q4_k",
        algorithm="rtn",
        options={"steps": 3},
        embedding="q8_0",
        head="q6_k",
        rules=(
            Rule(role="ffn_down", blocks=(0, 3), grid="q6_k"),
            Rule(pattern="blocks.*.attn_v", algorithm="rtn", options={"depth": 2}),
        ),
        calibration=Calibration(text="mine.txt", tokens=1000, context=128),
    )
    assert parse_recipe({"version": 1}) == Recipe()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "version is None"),
        ("version = 2", "version is 2"),
        ("version = true", "version is True"),
        ("version = 1\ngird = 'q4_k'", "'gird'; did you mean grid"),
        ("version = 1\ngrid = 4", "grid is 4, expected str"),
        ("version = 1\npreset = 'Q4_K_M'\ngrid = 'q4_k'", "preset or grid, not both"),
        ("version = 1\nrule = 3", "rule is 3, expected list"),
        ("version = 1\nrule = [1]", "rule 0: expected a table"),
        (
            "version = 1\n[[rule]]\nrole = 'ffn_dwn'\ngrid = 'q4_k'",
            "rule 0: unknown role 'ffn_dwn'; did you mean ffn_d",
        ),
        ("version = 1\n[[rule]]\nrole = 'head'", "rule 0: names neither a grid nor an algorithm"),
        ("version = 1\n[[rule]]\nrole = 'head'\ngrid = 'f32'\n[[rule]]\nbits = 4", "rule 1: unknown key 'bits'"),
        ("version = 1\n[[rule]]\nblocks = [1]\ngrid = 'f32'", "blocks is [1], expected [first, last]"),
        ("version = 1\n[[rule]]\nblocks = [true, 3]\ngrid = 'f32'", "expected [first, last]"),
        ("version = 1\n[[rule]]\nblocks = [3, 1]\ngrid = 'f32'", "expected [first, last]"),
        ("version = 1\n[[rule]]\nblocks = 1\ngrid = 'f32'", "rule 0: blocks is 1, expected list"),
        ("version = 1\n[[rule]]\nblocks = [-1, 1]\ngrid = 'f32'", "expected [first, last]"),
        ("version = 1\noptions = { day = 2026-01-01 }", "option day is datetime.date(2026, 1, 1)"),
        ("version = 1\n[[rule]]\ngrid = 'f32'\noptions = { x = inf }", "rule 0: option x is inf"),
        ("version = 1\n[[rule]]\npattern = 1\ngrid = 'f32'", "rule 0: pattern is 1, expected str"),
        ("version = 1\n[calibration]\ntoken = 5", "calibration: unknown key 'token'; did you mean tokens"),
        ("version = 1\n[calibration]\ntokens = true", "tokens is True, expected int"),
        ("version = 1\n[calibration]\ncontext = 1", "context is 1, expected at least 32"),
        ("version = 1\n[calibration]\ndata_free = 'yes'", "data_free is 'yes', expected bool"),
        ("version = 1\ncalibration = 3", "calibration is 3, expected dict"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(tomllib.loads(text))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with pytest.raises(BadInputError, match=r"recipe\.toml"):
        load_recipe(path)
    path.write_text("version = ")
    with pytest.raises(BadInputError, match="not TOML"):
        load_recipe(path)
    path.write_bytes(b"version = 1 # \xff")
    with pytest.raises(BadInputError, match="not TOML"):
        load_recipe(path)
    path.write_text("version = 1\n" + "#" * MAXIMUM_BYTES)
    with pytest.raises(BadInputError, match="larger than"):
        load_recipe(path)
    with pytest.raises(BadInputError, match="cannot read the recipe"):
        load_recipe(tmp_path)


def test_a_rule_matches_by_all_of_its_conditions() -> None:
    linear = Linear("blocks.2.attn_v", Role.ATTN_V, View("t", 0, 4, 4), 2, "blocks.2.attn", "m")
    head = Linear("head", Role.HEAD, View("h", 0, 4, 4), None, "head", "m")
    assert Rule(role="attn_v", pattern="blocks.?.attn_v", blocks=(2, 2)).matches(linear)
    assert not Rule(role="attn_q", pattern="blocks.?.attn_v").matches(linear)
    assert not Rule(role="attn_v", pattern="blocks.?.attn_V").matches(linear)
    assert not Rule(role="attn_v", blocks=(3, 9)).matches(linear)
    assert Rule().matches(head)
    assert not Rule(blocks=(0, 99)).matches(head)
    assert Rule(role="head", blocks=(0, 0)).describe() == "rule role=head, blocks=(0, 0)"
    assert Rule().describe() == "rule for everything"


def test_the_digest_is_the_recipe_and_nothing_else() -> None:
    """Not the order of keys, not the hash seed of the process; but every value."""
    table = tomllib.loads(FULL)
    digest = parse_recipe(table).digest()
    assert parse_recipe(dict(reversed(table.items()))).digest() == digest
    code = (
        "import sys, tomllib; from anyquant.pipeline.recipe import parse_recipe;"
        "print(parse_recipe(tomllib.loads(sys.stdin.read())).digest())"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code], input=FULL, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert run.stdout.strip() == digest, run.stderr
    changed = [FULL.replace(*change) for change in (('"q8_0"', '"q4_0"'), ("[0, 3]", "[0, 4]"), ("1000", "1001"))]
    assert len({digest, *(parse_recipe(tomllib.loads(text)).digest() for text in changed)}) == 4


@pytest.mark.parametrize(("other", "value"), [("data_free", True), ("imatrix", __file__)])
def test_importance_that_is_not_collected_cannot_be_kept(other: str, value: object) -> None:
    calibration = Calibration(keep_imatrix=True, **{other: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keep-imatrix"):
        canonical(Recipe(calibration=calibration))
