"""A user's own metric: found, called and checked. What it is called with is handed in.

`function(session, split)` gets an opened model (tokenize, detokenize, logits, generate) and "select" or "certify", so
that what is searched on and what is judged on can be kept apart. It returns one score per item, or one number.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from anyquant.core.errors import AnyQuantError, UsageError
from anyquant.core.registry import Registry
from anyquant.evaluation.drops import Drop, Scores, drop_of, failed, refuse_zero
from anyquant.evaluation.kl import Float64
from anyquant.evaluation.limits import DropLimit, split_metric

SELECT, CERTIFY = "select", "certify"

EVALUATORS: Registry[Callable[[Any, str], Any]] = Registry("evaluator", {}, "anyquant.evaluators")


@dataclass(frozen=True)
class Metric:
    """A limit with the function that it is about."""

    limit: DropLimit
    function: Callable[[Any, str], Any]

    @property
    def name(self) -> str:
        return self.limit.metric


def load_metrics(limits: Sequence[DropLimit]) -> list[Metric]:
    """Import the functions: modules by their names, or the files that are named, each once; what packages register
    under the entry-point group `anyquant.evaluators`, by its name there. Raises UsageError.

    This runs the user's code; nothing but the user's own command line or call ever names it.
    """
    places = filter(None, dict.fromkeys(split_metric(limit.metric)[0] for limit in limits))
    modules = {place: _from_file(Path(place)) if place.endswith(".py") else _from_name(place) for place in places}
    return [_metric(limit, modules) for limit in limits]


def _metric(limit: DropLimit, modules: Mapping[str, ModuleType]) -> Metric:
    place, name, _ = split_metric(limit.metric)
    function = getattr(modules[place], name, None) if place else _registered(name)
    if function is None:
        raise UsageError(f"metric {limit.metric}: {place or 'its package'} has no {name}")
    if not callable(function):
        raise UsageError(f"metric {limit.metric}: {name} is {type(function).__name__}, not a function")
    return Metric(limit, function)


def _registered(name: str) -> Callable[[Any, str], Any]:
    known = EVALUATORS.names()
    if name not in known:
        raise UsageError(
            f"metric: no evaluator {name!r} is installed; known: {', '.join(known) or 'none'}; a function of your own "
            "is named with its module or file: module:function:higher"
        )
    try:
        return EVALUATORS.get(name)
    except (Exception, SystemExit) as error:
        raise UsageError(f"metric: cannot load the evaluator {name}: {_told(error)}") from error


def scores(metric: Metric, session: Any, split: str) -> Scores:
    """Call the metric once. Raises UsageError with its message and place when it throws, or gives no usable scores."""
    try:
        values = _numbers(metric.function(session, split))
    except (Exception, SystemExit) as error:
        file = getattr(getattr(metric.function, "__code__", None), "co_filename", "")
        raise UsageError(f"metric {metric.name} failed on {split}: {_told(error, file)}") from error
    if values.ndim > 1 or not values.size:
        shape = "nothing" if not values.size else f"scores of shape {values.shape}"
        raise UsageError(f"metric {metric.name} gave {shape} on {split}; return one score per item, or one number")
    flat = values.reshape(-1)
    broken = np.flatnonzero(~np.isfinite(flat))
    if len(broken):
        raise UsageError(f"metric {metric.name} gave {flat[broken[0]]} on {split}, item {broken[0]}; scores are finite")
    return Scores(flat, values.ndim == 0)


def baseline(metric: Metric, session: Any, split: str) -> Scores:
    """The scores of the original, taken twice. Raises UsageError when they differ, and as `scores`."""
    first, second = scores(metric, session, split), scores(metric, session, split)
    if first.single != second.single or not np.array_equal(first.values, second.values):
        raise UsageError(
            f"metric {metric.name} gave {_brief(first)} and then {_brief(second)} for the same model and text: "
            "it is not deterministic; fix its seeds"
        )
    refuse_zero(metric.limit, first)
    return first


def compare(metric: Metric, reference: Scores, session: Any, split: str) -> Drop:
    """The drop of an opened artifact. A metric that fails on it leaves the limit open: the artifact is not lost."""
    try:
        found = scores(metric, session, split)
    except UsageError as error:
        return failed(metric.limit, reference, str(error))
    return drop_of(metric.limit, reference, found)


def _numbers(returned: Any) -> Float64:
    """One number or a sequence of them, float64. Raises TypeError or ValueError for all else."""
    if returned is None or isinstance(returned, Mapping | str | bytes):
        raise TypeError(f"it returned {type(returned).__name__}; return one score per item, or one number")
    several = isinstance(returned, Iterable) and not isinstance(returned, np.ndarray)
    # copied: a metric may fill and return one buffer of its own, in which the artifact's scores would replace these
    return np.array(list(returned) if several else returned, dtype=np.float64)


def _from_name(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        hint = f"; a file is named with its ending: {place}.py" if isinstance(error, ModuleNotFoundError) else ""
        raise UsageError(f"metric: cannot import {place}: {_told(error)}{hint}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"metric: there is no file {path}")
    name = f"anyquant_metric_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"metric: {path} is not Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"metric: cannot import {path}: {_told(error, str(path))}") from error
    return module


def _told(error: BaseException, file: str = "") -> str:
    """The message of somebody else's error, and the last line of `file` on the way to it, or of any file."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AnyQuantError) and not file:
        return str(error)
    place = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def _brief(found: Scores) -> str:
    return f"{found.mean:.6g}" if found.single else f"{len(found.values)} scores of mean {found.mean:.6g}"
