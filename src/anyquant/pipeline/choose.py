"""What a contract asks for: the mixture of the target's grids that keeps it, found by measuring."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from anyquant.calibrate.text import Splits, token_count
from anyquant.contract.search import Effort
from anyquant.core.errors import AnyQuantError
from anyquant.core.progress import Progress
from anyquant.formats.base import Rules
from anyquant.pipeline.measure import ReferenceLogits
from anyquant.pipeline.planner import Job, Model, make_job, refuse_unknown
from anyquant.pipeline.portions import Question
from anyquant.pipeline.quantized import Quantizer
from anyquant.pipeline.recipe import Recipe
from anyquant.pipeline.request import Request
from anyquant.pipeline.rows import Unweighted
from anyquant.pipeline.search import Found, Search, space_of
from anyquant.pipeline.selection import Selection
from anyquant.pipeline.sensitivity import Sensitivity, ask, portions_of, recall, refuse
from anyquant.pipeline.watch import Watch


@dataclass(frozen=True)
class Chosen:
    """The job to publish, and a sentence about how it was found; `frontier`: (bytes, mean KL) as expected elsewhere."""

    job: Job
    reason: str
    frontier: tuple[tuple[int, float], ...] = ()


def _not_yet(job: Job) -> Found:
    raise AnyQuantError("a plan was to be measured before the search began")


class Chooser:
    """One search for a request on a model that is prepared; the budget counts from when it is made."""

    def __init__(self, request: Request, model: Model, rules: Rules, watch: Watch, progress: Progress) -> None:
        self._request, self._model, self._rules = request, model, rules
        self._watch, self._progress = watch, progress
        self._began = watch.clock()

    def refuse(self) -> None:
        """Raise now what a search would raise later: for its file, for pins, and for too few bytes."""
        request = self._request
        pinned = filter(None, (rule.grid for rule in request.recipe.pinned))
        refuse_unknown(pinned, self._rules, self._model.architecture)
        question = Question(self._model, self._rules, (), Unweighted())
        refuse(question, request.sensitivity)
        blank = Sensitivity("", question.method, 0, 0, 0.0, 0, portions_of(question))
        self._search(blank, _not_yet).refuse()

    def choose(self, splits: Splits, reference: ReferenceLogits, selection: Selection, quantizer: Quantizer) -> Chosen:
        """Measured on *select*, whose logits are the `reference`.

        Raises BudgetTooSmallError when no plan is within the bytes.
        """
        request, recipe = self._request, self._request.recipe
        search = self._search(
            self._sensitivity(splits, quantizer),
            lambda job: selection.measure(job, reference, f"try {len(selection.points) + 1}"),
        )
        effort = Effort(
            evaluations=request.bounds.evaluations,
            expired=self._expired,
            spread=math.sqrt(len(splits.select) / len(splits.certify)),
        )
        calibration = recipe.calibration
        stronger = recipe.algorithm is None and not calibration.data_free and calibration.imatrix is None
        outcome = search.run(effort, stronger, self._progress.say)
        if outcome.best is None:
            raise AnyQuantError(outcome.reason)  # not with a first measurement, which is always made
        reason = f"On the select text: {outcome.reason}"
        return Chosen(search.job(outcome.best.choice), reason, outcome.frontier)

    def _search(self, found: Sensitivity, measure: Callable[[Job], Found]) -> Search:
        request, recipe, architecture = self._request, self._request.recipe, self._model.architecture
        space, base = space_of(found, recipe, architecture), replace(recipe, rules=recipe.pinned, pins={})
        return Search(space, base, request.contract, architecture, self._job, measure)

    def _sensitivity(self, splits: Splits, quantizer: Quantizer) -> Sensitivity:
        request, recipe = self._request, self._request.recipe
        question = Question(
            model=self._model,
            target=self._rules,
            documents=[document.tokens for document in splits.select],
            statistics=quantizer.importance(self._job(replace(recipe, preset=request.target.default_preset))),
            dtype=recipe.calibration.dtype,
        )
        with self._watch.stage("sensitivity"):
            known = recall(question, request.sensitivity, self._progress)
            self._say_cost(splits, question.draws if known is None else 0)
            folder = request.out.absolute().parent
            return known or ask(question, folder, request.threads, self._progress, request.sensitivity)

    def _job(self, recipe: Recipe) -> Job:
        return make_job(self._model, self._rules, recipe, not recipe.calibration.data_free)

    def _expired(self) -> bool:
        seconds = self._request.bounds.seconds
        return seconds is not None and self._watch.clock() - self._began > seconds

    def _say_cost(self, splits: Splits, draws: int) -> None:
        """What the search will take, from what the reference logits of *select* took. No draws: the pass is spared."""
        bounds, tokens = self._request.bounds, token_count(splits.select)
        once = self._watch.seconds.get("reference")  # None where the logits were there already
        each = "" if once is None else f", of {once:.0f} s each"
        asked = f"one sensitivity pass (about {2 + 2 * draws} runs over {tokens:,} tokens{each}), then "
        text = (
            f"search: {asked if draws else ''}at most {bounds.evaluations} artifacts made and measured on "
            f"{tokens:,} tokens, and one certified"
        )
        self._progress.say(text + (f"; at most {bounds.seconds / 60:.3g} minutes" if bounds.seconds else ""))
