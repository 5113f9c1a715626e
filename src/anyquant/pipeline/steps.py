"""The steps of a decision, one after the other: prune, quantize, correct."""

from dataclasses import replace

from anyquant.algorithms import ALGORITHMS
from anyquant.algorithms.base import Task
from anyquant.core.errors import AnyQuantError, UnsupportedError
from anyquant.core.plan import Decision, Step
from anyquant.core.qtensor import QTensor


def steps_of(decision: Decision) -> list[Step]:
    """Pruner, algorithm and corrector of a decision."""
    return [step for step in (decision.prune, Step(decision.algorithm, decision.options), decision.correct) if step]


def rows_apart(decision: Decision) -> bool:
    """Whether a slice of rows can be handled for itself."""
    return all(ALGORITHMS.get(step.name).rows_apart for step in steps_of(decision))


def pruned(decision: Decision, task: Task) -> Task:
    """The task with the weights that may stay, where the decision prunes."""
    if decision.prune is None:
        return task
    prune = ALGORITHMS.get(decision.prune.name).prune
    if prune is None:
        raise AnyQuantError(f"{decision.prune.name} does not prune")
    return replace(task, keep=prune(replace(task, options=decision.prune.options)))


def quantized(decision: Decision, task: Task) -> QTensor:
    """What is left of the (pruned) task. What its grid cannot hold is refused by the name of the matrix."""
    quantize = ALGORITHMS.get(decision.algorithm).quantize
    if quantize is None:
        raise AnyQuantError(f"{task.place}: {decision.algorithm} does not quantize a matrix by itself")
    try:
        return quantize(task)
    except UnsupportedError as error:
        said = str(error)
        raise UnsupportedError(said if task.place in said else f"{task.place}: {said}") from None


def corrected(decision: Decision, task: Task, result: QTensor) -> QTensor:
    """`result` with what the decision adds to it."""
    if decision.correct is None:
        return result
    correct = ALGORITHMS.get(decision.correct.name).correct
    if correct is None:
        raise AnyQuantError(f"{decision.correct.name} does not correct")
    return correct(replace(task, options=decision.correct.options), result)


def apply_steps(decision: Decision, task: Task) -> QTensor:
    """All steps. Raises as the algorithms do."""
    return corrected(decision, task, quantized(decision, pruned(decision, task)))
