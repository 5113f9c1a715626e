"""The verbs in Python, the same as on the command line: make, convert, plan, inspect, evaluate (and reproduce), run."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from tempfile import gettempdir
from typing import overload

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UnsupportedError, UsageError
from anyquant.core.progress import Progress, Silent
from anyquant.evaluation.limits import Contract, DropLimit, with_quality
from anyquant.evaluation.measures import Measures
from anyquant.formats import as_model, rules
from anyquant.grids import grid as find_grid
from anyquant.grids import names as grid_names
from anyquant.pipeline import artifacts
from anyquant.pipeline.certificate import Reproduction
from anyquant.pipeline.comparison import Comparison
from anyquant.pipeline.cost import Planned, estimate
from anyquant.pipeline.decoded import gguf_model
from anyquant.pipeline.planner import draft_job
from anyquant.pipeline.prepare import prepare
from anyquant.pipeline.recipe import Calibration, Recipe, canonical, chosen, load_recipe
from anyquant.pipeline.report import Report
from anyquant.pipeline.request import Bounds, Request
from anyquant.pipeline.rows import Unweighted
from anyquant.pipeline.sensitivity import Question, Sensitivity, refuse, sensitivities
from anyquant.pipeline.several import make_one, make_several
from anyquant.pipeline.statistics import gather
from anyquant.pipeline.targets import Target, neutral, target_or_format
from anyquant.pipeline.targets import target as find_target
from anyquant.pipeline.texts import load_splits, source_tokenizer
from anyquant.runtimes.base import cores
from anyquant.store.gguf import GGUFFile
from anyquant.store.open import open_checkpoint
from anyquant.transforms.merge import with_adapter

DEMO = "demo"
DEFAULT_TEXT_TOKENS = 4096  # about what the calibrate part of the default text has


def model_path(model: str | Path) -> Path:
    """The folder of a model; "demo" is the model that comes with AnyQuant, unless there is a folder of that name."""
    path = Path(model)
    if str(model) == DEMO and not path.exists():
        return Path(str(files("anyquant.demo") / "model"))
    return path


def source_of(path: Path) -> Checkpoint:
    """The checkpoint to quantize, decoded where it is quantized already. Raises UnsupportedError for a GGUF file."""
    checkpoint = open_checkpoint(path)
    if isinstance(checkpoint, GGUFFile):
        raise UnsupportedError(f"{path}: a GGUF file is no source yet; give the folder of the model it came from")
    return as_model(checkpoint)


def _convertible(path: Path, like: Path | None) -> Checkpoint:
    """What is to be converted: a quantized folder, or a GGUF file with the folder of the model it came from."""
    opened = open_checkpoint(path)
    if isinstance(opened, GGUFFile):
        if like is None:
            raise UsageError(f"{path}: has no config.json; name the folder of the model it was made from with --like")
        return gguf_model(path, source_of(like))
    if like is not None:
        raise UsageError(f"--like is for GGUF files, and {path} has a config.json of its own; leave it out")
    return as_model(opened)


def _recipe(
    base: Recipe | str | Path | None, preset: str | None, grid: str | None, data_free: bool, text: str | Path | None
) -> Recipe:
    recipe = base if isinstance(base, Recipe) else Recipe() if base is None else load_recipe(Path(base))
    recipe = chosen(recipe, preset, grid)
    calibration = recipe.calibration
    if data_free:
        calibration = replace(calibration, data_free=True)
    if text is not None:
        calibration = replace(calibration, text=str(text))
    return canonical(replace(recipe, calibration=calibration))


def _says_what(recipe: Recipe) -> bool:
    return recipe.preset is not None or recipe.grid is not None or bool(recipe.rules)


def _target(name: str | None, recipe: Recipe) -> Target:
    if name is None and recipe.preset is not None:
        raise UsageError(f"--preset {recipe.preset} belongs to a target; name it with --for llama.cpp")
    goal = neutral() if name is None else find_target(name)
    if recipe.grid is not None and recipe.grid.upper() in goal.presets and recipe.grid.lower() not in grid_names():
        raise UsageError(f"{recipe.grid} is a preset of {goal.name}: write --preset {recipe.grid.upper()}")
    return goal


def _refuse_idle(recipe: Recipe, budget: float | None, sensitivity: str | Path | None) -> None:
    """Raise UsageError for what only a search heeds, where there is none; first for a pin that no search would take."""
    for name in recipe.pins.values():
        find_grid(name)
    given = {"--pin": recipe.pins, "--budget": budget is not None, "--sensitivity": sensitivity is not None}
    for flag, used in given.items():
        if used:
            raise UsageError(
                f"{flag} is for a search, and nothing is searched here: give limits, and no preset, grid or rules"
            )


def _default(goal: Target, recipe: Recipe) -> Recipe:
    if not goal.default_preset:
        raise UsageError("say what to do: --grid, or a target with --for")
    return replace(recipe, preset=goal.default_preset)


@overload
def make(
    model: str | Path,
    *,
    out: str | Path,
    target: str | None = ...,
    preset: str | None = ...,
    grid: str | None = ...,
    adapter: str | Path | None = ...,
    quality: str | None = ...,
    contract: Contract | None = ...,
    recipe: Recipe | str | Path | None = ...,
    text: str | Path | None = ...,
    data_free: bool = ...,
    overwrite: bool = ...,
    threads: int | None = ...,
    memory: int | None = ...,
    budget: float | None = ...,
    sensitivity: str | Path | None = ...,
    progress: Progress | None = ...,
) -> Report: ...


@overload
def make(
    model: str | Path,
    *,
    out: str | Path,
    target: list[str] | tuple[str, ...],
    preset: str | None = ...,
    grid: str | None = ...,
    adapter: str | Path | None = ...,
    quality: str | None = ...,
    contract: Contract | None = ...,
    recipe: Recipe | str | Path | None = ...,
    text: str | Path | None = ...,
    data_free: bool = ...,
    overwrite: bool = ...,
    threads: int | None = ...,
    memory: int | None = ...,
    budget: float | None = ...,
    sensitivity: str | Path | None = ...,
    progress: Progress | None = ...,
) -> Comparison: ...


def make(
    model: str | Path,
    *,
    out: str | Path,
    target: str | list[str] | tuple[str, ...] | None = None,
    preset: str | None = None,
    grid: str | None = None,
    adapter: str | Path | None = None,
    quality: str | None = None,
    contract: Contract | None = None,
    recipe: Recipe | str | Path | None = None,
    text: str | Path | None = None,
    data_free: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    memory: int | None = None,
    budget: float | None = None,
    sensitivity: str | Path | None = None,
    progress: Progress | None = None,
) -> Report | Comparison:
    """Quantize `model` for `target`, verify and measure it there, and publish it with its report in `out`.

    What to do: `preset` or `grid` or `recipe`; none of them: the smallest mixture of the target's grids that keeps the
    contract (or the best within its bytes), or the default preset when there is no contract. `budget` are the minutes
    that the search may take, `sensitivity` a file for what it starts from. How good: `quality` ("lossless",
    "strict", "balanced", "compact": a mean KL) and the further limits of a `contract`. Without a target the neutral
    quantized state is published. `adapter` is the folder of a LoRA that is merged into the weights first: the original
    is then the merged model.

    A list of targets: each gets its artifact and report in `out`/TARGET, calibrated once and judged on the same text,
    and `out` a report that compares them; `budget` is for all of them together.

    Raises subclasses of AnyQuantError. A contract that is not met is not an error here: see `Report.status`.
    """
    limits = with_quality(contract or Contract(), quality)
    if limits.max_drop and adapter is not None:
        raise UsageError("--max-drop runs the original's folder, and with --adapter there is none of the merged model")
    if budget is not None and not (math.isfinite(budget) and budget > 0):
        raise UsageError(f"--budget is {budget:g}; give minutes, more than 0")
    names: Sequence[str | None] = target if isinstance(target, list | tuple) else [target]
    several = names is target
    if several and (sensitivity is not None or not names):
        what = "--sensitivity is the file of one target" if names else "no target is named"
        raise UsageError(f"{what}; name one with --for")
    wish = _recipe(recipe, preset, grid, data_free, text)
    request = Request(
        location=str(model) if adapter is None else f"{model} + {adapter}",
        checkpoint=with_adapter(source_of(model_path(model)), adapter),
        target=neutral(),
        recipe=wish,
        contract=limits,
        choose=not _says_what(wish) and not limits.empty,
        out=Path(out),
        overwrite=overwrite,
        threads=threads or cores(),
        memory=memory,
        bounds=Bounds(None if budget is None else 60 * budget / len(names)),
        sensitivity=None if sensitivity is None else Path(sensitivity),
    )
    if not request.choose:
        _refuse_idle(wish, budget, sensitivity)
    requests = [_for_target(request, name) for name in names]
    sink = progress or Silent()
    return make_several(requests, sink, time.monotonic) if several else make_one(requests[0], sink, time.monotonic)


def _for_target(request: Request, name: str | None) -> Request:
    """The request for one target. Raises UsageError for what makes no sense there."""
    goal, limits, recipe = _target(name, request.recipe), request.contract, request.recipe
    if limits.max_drop and name is None:
        raise UsageError("--max-drop runs the artifact, and nothing runs the neutral state; name a target with --for")
    if limits.max_drop and goal.schema_only:
        raise UsageError(f"--max-drop runs the artifact, and nothing here runs one for {goal.name}")
    if request.choose and goal.neutral:
        raise UsageError("a quality needs a target to be measured in; name one with --for")
    if not request.choose and not _says_what(recipe):
        recipe = _default(goal, recipe)
    return replace(request, target=goal, recipe=recipe)


def convert(
    source: str | Path,
    *,
    target: str,
    out: str | Path,
    like: str | Path | None = None,
    grid: str | None = None,
    embedding: str | None = None,
    head: str | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    context: int | None = None,
    data_free: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a quantized model in another format, with the codes that it has, and prove it in that format's runtime.

    `source` is a quantized Hugging Face folder, or a GGUF file with `like`, the folder of the model it was made from.
    `target` names a target or a format. `grid` is that of all quantized matrices; without it each takes the smallest of
    the target's that holds its codes, or where none does is rounded again to one of like bits. `embedding` and `head`
    as in `make`. The ledger says of every matrix: exact, rescaled or re-rounded. What was made is measured on `text`
    against the decoded source, or with `data_free` not at all.

    Raises subclasses of AnyQuantError.
    """
    for flag, given in (("--text", text), ("--tokens", tokens), ("--context", context)):
        if data_free and given is not None:
            raise UsageError(f"--data-free measures nothing, so {flag} has no effect; leave one of them out")
    if tokens is not None and text is None:
        raise UsageError("--tokens is for --text, and the default text is judged on whole; name a text or leave it out")
    checkpoint = _convertible(model_path(source), None if like is None else model_path(like))
    usual = Calibration(data_free=True, text=None if text is None else str(text))
    calibration = replace(usual, tokens=tokens or usual.tokens, context=context or usual.context)
    request = Request(
        location=str(source),
        checkpoint=checkpoint,
        target=target_or_format(target),
        recipe=canonical(Recipe(grid=grid, embedding=embedding, head=head, calibration=calibration)),
        contract=Contract(),
        choose=False,
        out=Path(out),
        overwrite=overwrite,
        threads=threads or cores(),
        transcode=True,
        unmeasured=data_free,
    )
    return make_one(request, progress or Silent(), time.monotonic)


def plan(
    model: str | Path,
    *,
    target: str | None = None,
    preset: str | None = None,
    grid: str | None = None,
    adapter: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    data_free: bool = False,
    threads: int | None = None,
) -> Planned:
    """Decide everything and write nothing: the job with every tensor, its grid and exact bytes, and what it costs.

    What the target cannot hold is said in `refusal`, beside a complete plan. Raises as `make` does for all else that
    it would refuse before it starts.
    """
    checkpoint = with_adapter(source_of(model_path(model)), adapter)
    wish = _recipe(recipe, preset, grid, data_free, None)
    goal = _target(target, wish)
    if not _says_what(wish):
        wish = _default(goal, wish)
    importance = not wish.calibration.data_free
    job, refusal = draft_job(prepare(checkpoint, wish), rules(goal.format), wish, importance)
    tokens = (wish.calibration.tokens if wish.calibration.text else DEFAULT_TEXT_TOKENS) if importance else 0
    return Planned(job, estimate(job, threads or cores(), tokens), refusal)


def sensitivity(
    model: str | Path,
    *,
    target: str | None = None,
    candidates: Sequence[str] = (),
    method: str = "gradient",
    text: str | Path | None = None,
    tokens: int | None = None,
    context: int | None = None,
    save: str | Path | None = None,
    show: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """What each part of `model` loses on each of the `candidates`, grids of the target by default: nats per token.

    `method`: "gradient", or "forward", which needs less memory. `save` names a file that is used when it answers the
    same question, and written otherwise. `text`, its `tokens` and their `context` as in `make`: rounding is steered by
    the calibration part, the loss estimated on the select part. A grid to `show` must be a candidate: refused at once.
    """
    checkpoint, sink = source_of(model_path(model)), progress or Silent()
    recipe = _recipe(None, None, None, False, text)
    usual = recipe.calibration
    calibration = replace(usual, tokens=tokens or usual.tokens, context=context or usual.context)
    prepared, form = prepare(checkpoint, recipe), rules(_target(target, recipe).format)
    saved = None if save is None else Path(save)
    question = Question(prepared, form, (), Unweighted(), tuple(candidates), method)
    refuse(question, saved, show)  # before anything is read
    splits = load_splits(source_tokenizer(checkpoint), prepared.architecture, calibration)
    statistics = gather(checkpoint, prepared.architecture, calibration, splits.calibrate, sink)
    question = replace(question, documents=[document.tokens for document in splits.select], statistics=statistics)
    folder = Path(gettempdir()) if saved is None else saved.parent
    return sensitivities(question, folder, threads or cores(), sink, saved)


def inspect(path: str | Path) -> artifacts.Contents:
    """What a checkpoint or artifact holds: kind, family, tensors with type, shape and bytes. Headers only."""
    return artifacts.inspect(model_path(path))


def evaluate(
    artifact: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    tokens: int | None = None,
    context: int = Calibration().context,
    text_field: str = Calibration().field,
    threads: int | None = None,
    kv_cache: str | None = None,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Measures:
    """Measure an artifact in its runtime against the original on a text (all of it, up to `tokens`).

    `adapter`: the folder of the LoRA that was merged into the original.

    `kv_cache`: types of llama.cpp's key-value cache, "q8_0" or "q8_0,q4_0" (keys, values); None: those that the
    artifact was made for.
    """
    return artifacts.evaluate(
        Path(artifact),
        model_path(against),
        artifacts.Judging(
            None if text is None else str(text),
            tokens,
            context,
            threads or cores(),
            text_field,
            kv_cache,
            None if adapter is None else Path(adapter),
        ),
        progress or Silent(),
    )


def reproduce(
    artifact: str | Path,
    *,
    against: str | Path,
    text: str | Path | None = None,
    threads: int | None = None,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Measure an artifact again as its certificate says it was, and compare.

    The text is the one that its report names; `text` is where it lies now, if it was moved. `adapter` as in `make`.
    """
    where, folder = None if text is None else str(text), None if adapter is None else Path(adapter)
    judging = artifacts.Judging(where, None, Calibration().context, threads or cores(), adapter=folder)
    return artifacts.reproduce(Path(artifact), model_path(against), judging, progress or Silent())


def run(
    artifact: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    kv_cache: str | None = None,
) -> Iterator[str]:
    """Generate from `prompt` with an artifact in its own runtime, piece by piece. `kv_cache` as in `evaluate`."""
    return artifacts.generate(Path(artifact), prompt, tokens, temperature, seed, threads or cores(), kv_cache)


__all__ = [
    "Calibration",
    "Comparison",
    "Contract",
    "DropLimit",
    "Recipe",
    "Report",
    "Sensitivity",
    "convert",
    "evaluate",
    "inspect",
    "make",
    "plan",
    "reproduce",
    "run",
    "sensitivity",
]
