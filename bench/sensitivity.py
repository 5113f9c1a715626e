"""How well sensitivities predict what whole plans lose: rank correlation over random plans.

    python bench/sensitivity.py [MODEL] [--text FILE] [--plans 30] [--methods gradient,forward]

In each plan every part of the model takes one of llama.cpp's candidates at random; with --levels one of four
neighbours, around a level that is random in each plan. Its KL is measured on documents of the *select* text by running
the decoded weights in `transformers`.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from anyquant import api
from anyquant.contract.allocate import Choice
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.progress import Silent
from anyquant.evaluation.kl import divergence, log_softmax
from anyquant.formats import rules
from anyquant.grids import grid as find_grid
from anyquant.pipeline.prepare import prepare
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.sensitivity import Question, Sensitivity, sensitivities
from anyquant.pipeline.statistics import gather
from anyquant.pipeline.targets import target
from anyquant.pipeline.texts import load_splits, source_tokenizer
from anyquant.runtimes.transformers import DecodedCheckpoint, TransformersRuntime
from anyquant.store.open import open_checkpoint


def random_plans(found: Sensitivity, count: int, levels: bool) -> list[Choice]:
    random = np.random.default_rng(1)
    plans = []
    for _ in range(count):
        share, plan = random.random(), {}
        for portion in found.portions:
            grids = [cell.grid for cell in portion.cells if cell.grid != portion.stored]
            first = round(share * (len(grids) - 4)) if levels else 0
            several = grids[first : first + 4] if levels else grids
            plan[portion.name] = several[random.integers(len(several))]
        plans.append(plan)
    return plans


def measure(question: Question, plans: list[Choice], documents: int) -> list[float]:
    """The mean KL of each plan on the first documents."""
    model, architecture = question.model, question.model.architecture
    texts = question.documents[:documents]
    before = list(map(log_softmax, TransformersRuntime(model.checkpoint, architecture).logits(texts)))

    @cache
    def decoded(name: str, grid: str) -> Float32:
        linear = architecture.by_name[name]
        weights = read_view(model.checkpoint, linear.view, 0, linear.shape[0])
        params, codes = find_grid(grid).quantize(weights, question.statistics.importance(linear))
        return find_grid(grid).decode(codes, params)

    losses = []
    for plan in plans:
        changed = DecodedCheckpoint(model.checkpoint, architecture, lambda name, plan=plan: decoded(name, plan[name]))  # type: ignore[misc]
        after = TransformersRuntime(changed, architecture, model.source.config).logits(texts)
        found = [divergence(one, log_softmax(other)) for one, other in zip(before, after, strict=True)]
        losses.append(float(np.concatenate(found).mean()))
    return losses


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's."""
    first, second = (np.argsort(np.argsort(values)) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", default=None)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--documents", type=int, default=16, help="of the select text, to measure on")
    parser.add_argument("--levels", action="store_true")
    parser.add_argument("--draws", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default="gradient,forward")
    options = parser.parse_args()
    checkpoint = open_checkpoint(api.model_path(options.model))
    model, calibration = prepare(checkpoint, Recipe()), Calibration(text=options.text, tokens=options.tokens)
    splits = load_splits(source_tokenizer(checkpoint), model.architecture, calibration)
    statistics = gather(checkpoint, model.architecture, calibration, splits.calibrate, Silent())
    documents = [document.tokens for document in splits.select]
    question = Question(model, rules(target("llama.cpp").format), documents, statistics)
    if options.draws is not None:
        question = replace(question, draws=options.draws)
    measured: list[float] = []
    plans: list[Choice] = []
    for method in options.methods.split(","):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = sensitivities(replace(question, method=method), Path(folder), options.threads, Silent())
        seconds = time.monotonic() - began
        plans = plans or random_plans(found, options.plans, options.levels)
        measured = measured or measure(question, plans, options.documents)
        predicted = [found.loss(plan) for plan in plans]
        ratio = np.log(np.divide(predicted, measured))
        print(
            f"{options.model} {method}: {found.forwards:g} forwards of {len(documents)} documents, {seconds:.0f} s; "
            f"{len(plans)} plans of KL {min(measured):.4f} to {max(measured):.4f}: "
            f"rank correlation {rank_correlation(predicted, measured):.3f}, predicted / measured "
            f"{np.exp(ratio.mean()):.3f}, spread {ratio.std():.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
