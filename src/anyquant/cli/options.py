"""Flags that several verbs share, and how they become a recipe and a contract."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from anyquant.core.errors import UsageError
from anyquant.evaluation.verdict import QUALITIES, Contract
from anyquant.pipeline.recipe import LEAST_CONTEXT, LEAST_TOKENS, Recipe, chosen, load_recipe

Decorated = Callable[..., Any]

_WHAT = (
    click.option("--for", "target", metavar="TARGET", help="Where it must run: llama.cpp, transformers, vllm."),
    click.option("--preset", metavar="NAME", help="A named mixture of the target, e.g. Q4_K_M."),
    click.option("--grid", metavar="GRID", help="One grid for all matrices of the blocks, e.g. q4_k or int4-g128."),
    click.option("--algorithm", metavar="NAME", help="How values are chosen on the grid (default: rtn)."),
    click.option("--embedding", metavar="GRID", help="Grid of the embedding."),
    click.option("--head", metavar="GRID", help="Grid of the output head."),
    click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="All of this as a TOML file."),
    click.option("--data-free", is_flag=True, help="No calibration: rounding without importance."),
    click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores to use (default: all)."),
)

_HOW_GOOD = (
    click.option("--quality", type=click.Choice(list(QUALITIES)), help="Climb the presets until this mean KL holds."),
    click.option("--max-kl", type=float, metavar="X", help="Largest mean KL to the original, nats per token."),
    click.option("--max-ppl-increase", type=float, metavar="X", help="Largest perplexity increase: 0.01 is 1 %."),
    click.option("--min-same-top", type=float, metavar="X", help="Smallest share of tokens with the same top choice."),
)

_TEXT = (
    click.option(
        "--text", type=click.Path(), metavar="PATH", help="Text file, folder or .jsonl to calibrate and judge on."
    ),
    click.option(
        "--imatrix", type=click.Path(), metavar="FILE", help="llama.cpp importance file, instead of calibrating."
    ),
    click.option(
        "--tokens", type=click.IntRange(LEAST_TOKENS), metavar="N", help="Most calibration tokens (default 65536)."
    ),
    click.option(
        "--context", type=click.IntRange(LEAST_CONTEXT), metavar="N", help="Tokens of a document (default 512)."
    ),
)


def _add(options: tuple[Any, ...]) -> Callable[[Decorated], Decorated]:
    def decorate(function: Decorated) -> Decorated:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


what_to_do, how_good, which_text = _add(_WHAT), _add(_HOW_GOOD), _add(_TEXT)


def recipe_of(flags: dict[str, Any]) -> Recipe:
    """The recipe file, if any, with the flags on top. Raises UsageError for flags that exclude each other."""
    path = flags["recipe"]
    recipe = chosen(Recipe() if path is None else load_recipe(path), flags["preset"], flags["grid"])
    given = {name: flags[name] for name in ("algorithm", "embedding", "head") if flags[name] is not None}
    calibration = {
        name: flags[name] for name in ("text", "imatrix", "tokens", "context") if flags.get(name) is not None
    }
    if flags.get("keep_imatrix"):
        calibration["keep_imatrix"] = True
    if flags["data_free"]:
        calibration["data_free"] = True
        if flags.get("imatrix") is not None:
            raise UsageError("--data-free and --imatrix exclude each other")
    return replace(recipe, **given, calibration=replace(recipe.calibration, **calibration))


def contract_of(flags: dict[str, Any]) -> Contract | None:
    """The limits given as flags, or None."""
    limits = {name: flags[name] for name in ("max_kl", "max_ppl_increase", "min_same_top") if flags[name] is not None}
    return Contract(**limits) if limits else None
