"""Chains: "rotate -> awq -> gptq" as data. Transforms of the model, then one pruner, algorithm, corrector at most.

Options are those of the step that knows them ("dampening"), or name it ("gptq.dampening").
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Algorithm
from anyquant.core.errors import UsageError
from anyquant.core.options import complete_options
from anyquant.core.plan import EMPTY, Step
from anyquant.core.registry import suggest
from anyquant.transforms import TRANSFORMS

_ARROW = re.compile(r"\s*(?:->|,|\+)\s*")


@dataclass(frozen=True)
class Chain:
    """What happens to a matrix. Every option has its value. `transforms` belong to the model as a whole."""

    quantize: Step
    prune: Step | None = None
    correct: Step | None = None
    transforms: tuple[Step, ...] = ()


def parse_chain(text: str, options: Mapping[str, Any] = EMPTY) -> Chain:
    """The chain that `text` names. Raises UsageError for unknown names, an impossible order, options without a step."""
    names = [name.strip().lower() for name in _ARROW.split(text.strip())]
    known = [*ALGORITHMS.names(), *TRANSFORMS.names()]
    if "" in names:
        raise UsageError(f"{text!r}: a step is empty; write e.g. 'rotate -> gptq'")
    for name in names:
        if name not in known:
            raise UsageError(f"unknown algorithm {name!r}; {suggest(name, known)}")
        if names.count(name) > 1:
            raise UsageError(f"{text!r} names {name} twice")
    given = _assign(text, names, options)
    transforms = [name for name in names if name in TRANSFORMS.names()]
    algorithms = [ALGORITHMS.get(name) for name in names if name not in transforms]
    if names != [*transforms, *(algorithm.name for algorithm in algorithms)]:
        raise UsageError(f"{text!r}: transforms of the model ({', '.join(transforms)}) come before all else")
    steps = _kinds(text, algorithms, given)
    done = tuple(Step(name, complete_options(name, given[name], TRANSFORMS.get(name).options)) for name in transforms)
    return Chain(steps["quantize"], steps.get("prune"), steps.get("correct"), done)


def _kind(algorithm: Algorithm) -> str:
    return "prune" if algorithm.prune else "correct" if algorithm.correct else "quantize"


def _kinds(text: str, algorithms: list[Algorithm], given: Mapping[str, Mapping[str, Any]]) -> dict[str, Step]:
    order, found = ["prune", "quantize", "correct"], dict[str, Step]()
    for algorithm in algorithms:
        kind = _kind(algorithm)
        if kind in found:
            raise UsageError(f"{text!r}: {found[kind].name} and {algorithm.name} do the same work; keep one of them")
        if any(order.index(earlier) > order.index(kind) for earlier in found):
            raise UsageError(f"{text!r}: the order is pruning, quantizing, correcting; move {algorithm.name}")
        found[kind] = Step(algorithm.name, complete_options(algorithm.name, given[algorithm.name], algorithm.options))
    if "quantize" not in found:
        finisher = ALGORITHMS.get(ALGORITHMS.get(found["prune"].name).finisher if "prune" in found else "rtn")
        found["quantize"] = Step(finisher.name, complete_options(finisher.name, {}, finisher.options))
    return found


def _assign(text: str, names: list[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by step. Raises UsageError for one that no step, or more than one, knows."""
    defaults = {name: _defaults(name) for name in names}
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        owner, _, option = key.rpartition(".")
        owners = [owner] if owner else [name for name in names if option in defaults[name]]
        if owner and owner not in names:
            raise UsageError(f"option {key}: the chain {text!r} has no step {owner!r}; {suggest(owner, names)}")
        if not owners:
            known = sorted({option for each in defaults.values() for option in each})
            advice = suggest(option, known) if known else "it takes none"
            raise UsageError(f"algorithm {text} has no option {option!r}; {advice}")
        if len(owners) > 1:
            raise UsageError(f"option {key} is known to {' and '.join(owners)}: write {owners[0]}.{key}")
        given[owners[0]][option] = value
    return given


def _defaults(name: str) -> Mapping[str, Any]:
    return TRANSFORMS.get(name).options if name in TRANSFORMS.names() else ALGORITHMS.get(name).options
