"""The documentation names every option with its default, so that neither goes without the other."""

import json
import re
from pathlib import Path

import pytest

from anyquant.algorithms import ALGORITHMS
from anyquant.transforms import TRANSFORMS

DOCUMENT = Path(__file__).parents[1] / "docs" / "algorithms.md"
STEPS = {name: registry.get(name) for registry in (ALGORITHMS, TRANSFORMS) for name in registry.names()}
SAME = {"sparsegpt": ("sparsity", "pattern")}  # "the same" as in the row above


def rows() -> dict[str, str]:
    """Step -> what its row of the table of options says."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("## Options")[2].partition("\n`propagation`")[0]
    found = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    return {name: said for names, said in found for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("name", STEPS)
def test_every_option_is_documented_with_its_default(name: str) -> None:
    for option, default in STEPS[name].options.items():
        if option not in SAME.get(name, ()):
            assert f"`{option}` = {json.dumps(default)}" in rows()[name], option
