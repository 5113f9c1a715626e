"""Flags that several verbs share, and how they become a recipe and a contract."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from anyquant.calibrate.sources import LEAST_CONTEXT
from anyquant.core.arithmetic import DTYPES
from anyquant.core.errors import UsageError
from anyquant.evaluation.limits import QUALITIES, Contract, DropLimit, size_limit
from anyquant.pipeline.recipe import LEAST_TOKENS, Recipe, chosen, load_recipe

Decorated = Callable[..., Any]

adapter = click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="A LoRA adapter of peft, merged into the weights first.",
)
_WHAT = (
    click.option(
        "--for",
        "target",
        metavar="TARGET[,TARGET]",
        help="Where it must run: llama.cpp, transformers, vllm, mlx and others.",
    ),
    adapter,
    click.option("--preset", metavar="NAME", help="A named mixture of the target, e.g. Q4_K_M."),
    click.option("--grid", metavar="GRID", help="One grid for all matrices of the blocks, e.g. q4_k or int4-g128."),
    click.option(
        "--algorithm",
        metavar="CHAIN",
        help='How values are chosen (default: rtn), e.g. gptq or "rotate -> awq -> gptq".',
    ),
    click.option(
        "--option", "options", multiple=True, metavar="NAME=VALUE", help="Option of an algorithm, e.g. dampening=0.02."
    ),
    click.option(
        "--activations", metavar="GRID", help="Round what enters the matrices: int8-channel, or int8-tensor:static."
    ),
    click.option("--embedding", metavar="GRID", help="Grid of the embedding."),
    click.option("--head", metavar="GRID", help="Grid of the output head."),
    click.option(
        "--kv-cache",
        metavar="TYPE",
        help="llama.cpp's key-value cache: q8_0, or keys,values: q8_0,q4_0 (default: f16).",
    ),
    click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE", help="All of this as a TOML file."),
    click.option("--data-free", is_flag=True, help="No calibration: rounding without importance."),
    click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores to use (default: all)."),
)

_HOW_GOOD = (
    click.option("--quality", type=click.Choice(list(QUALITIES)), help="A name for a --max-kl: balanced is 0.011."),
    click.option("--max-kl", type=float, metavar="X", help="Largest mean KL to the original, nats per token."),
    click.option("--max-kl-99-9", type=float, metavar="X", help="Largest 99.9 % quantile of the KL of single tokens."),
    click.option("--max-ppl-increase", type=float, metavar="X", help="Largest perplexity increase: 0.01 is 1 %."),
    click.option("--min-same-top", type=float, metavar="X", help="Smallest share of tokens with the same top choice."),
    click.option(
        "--max-drop",
        multiple=True,
        metavar="METRIC=X",
        help="Largest drop of a metric of your own, 0.01 or 1%; METRIC is file.py:function:higher (or :lower), "
        "module:function:higher, or NAME:higher of an installed evaluator. Repeatable.",
    ),
    click.option("--max-size", metavar="SIZE", help="Most bytes of its files: 4.6GB, 13200000B or 4.5bpw."),
    click.option(
        "--pin",
        "pins",
        multiple=True,
        metavar="NAME=GRID",
        help="What the search must not change: attn_v=q6_k, blocks.0.*=q8_0. Repeatable.",
    ),
    click.option(
        "--budget", type=float, metavar="MINUTES", help="Time for all searches; the best by then is certified."
    ),
    click.option(
        "--sensitivity",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="What `anyquant sensitivity --save` wrote; made if it is not there.",
    ),
)

# flag -> key of [calibration] in a recipe
CALIBRATION = {name: name for name in ("text", "imatrix", "tokens", "context")}
CALIBRATION |= {"text_field": "field", "calibration_dtype": "dtype"}
TEXT_HELP = "Text file, folder, .jsonl, .npy of token ids, or dataset:NAME"
_TEXT = (
    click.option("--text", type=click.Path(), metavar="PATH", help=f"{TEXT_HELP}: to calibrate and judge on."),
    click.option(
        "--calibration-dtype",
        type=click.Choice(DTYPES),
        help="What blocks compute in while calibrating; bfloat16 is faster where the processor has it.",
    ),
    click.option("--text-field", metavar="NAME", help="Field of its records to take (default: text)."),
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


kv_cache = click.option(
    "--kv-cache", metavar="TYPE", help="Types of llama.cpp's key-value cache (default: those it was made for, or f16)."
)
what_to_do, how_good, which_text = _add(_WHAT), _add(_HOW_GOOD), _add(_TEXT)


def recipe_of(flags: dict[str, Any]) -> Recipe:
    """The recipe file, if any, with the flags on top. Raises UsageError for flags that exclude each other."""
    path = flags["recipe"]
    recipe = chosen(Recipe() if path is None else load_recipe(path), flags["preset"], flags["grid"])
    kept = ("algorithm", "embedding", "head", "activations", "kv_cache")
    given: dict[str, Any] = {name: flags[name] for name in kept if flags[name] is not None}
    if flags["options"]:
        options = list(map(_option, flags["options"]))
        names = [name for name, _ in options]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"--option {twice[0]} is given twice; keep one of them")
        given["options"] = {**recipe.options, **dict(options)}
    if flags.get("pins"):
        given["pins"] = {**recipe.pins, **dict(map(_pin, flags["pins"]))}
    calibration = {name: flags[flag] for flag, name in CALIBRATION.items() if flags.get(flag) is not None}
    if flags.get("keep_imatrix"):
        calibration["keep_imatrix"] = True
    if flags["data_free"]:
        calibration["data_free"] = True
        if flags.get("imatrix") is not None:
            raise UsageError("--data-free and --imatrix exclude each other")
    return replace(recipe, **given, calibration=replace(recipe.calibration, **calibration))


def targets_of(text: str | None) -> str | list[str] | None:
    """One target, or the list of several. Raises UsageError for an empty name."""
    if text is None or "," not in text:
        return text
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"--for {text}: a name is empty; write them as vllm,mlx,llama.cpp")
    return names


def _pin(text: str) -> tuple[str, str]:
    name, equals, grid = text.partition("=")
    if not equals or not name.strip() or not grid.strip():
        raise UsageError(f"--pin {text}: expected NAME=GRID, e.g. attn_v=q6_k")
    return name.strip(), grid.strip()


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as TOML would read it: a number, true, false; all else is a text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--option {text}: expected NAME=VALUE, e.g. dampening=0.02")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    return name.strip(), parsed if isinstance(parsed, bool | int | float | str) else value


def bytes_of(text: str | None) -> int | None:
    """ "8GB", "512 MiB" or a number of bytes. Raises UsageError."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not an amount of memory; write 8GB or 512MiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def contract_of(flags: dict[str, Any]) -> Contract | None:
    """The limits given as flags, or None."""
    names = ("max_kl", "max_kl_99_9", "max_ppl_increase", "min_same_top")
    limits = {name: flags[name] for name in names if flags[name] is not None}
    if flags["max_size"] is not None:
        limits |= size_limit(flags["max_size"])
    drops = tuple(DropLimit.parse(text) for text in flags["max_drop"])
    return Contract(**limits, max_drop=drops) if limits or drops else None
