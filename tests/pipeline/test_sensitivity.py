"""Sensitivities against what plans really lose, and the exact bytes of what they choose from."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from anyquant import api
from anyquant.contract.allocate import Choice
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.errors import BadInputError, UnsupportedError, UsageError
from anyquant.core.progress import Silent
from anyquant.evaluation.kl import divergence, log_softmax
from anyquant.formats import rules
from anyquant.grids import grid as find_grid
from anyquant.pipeline import sensitivity as module
from anyquant.pipeline.choice import Wanted, rules_of
from anyquant.pipeline.heat import heat_map, most_sensitive, page, shown_grid
from anyquant.pipeline.planner import make_job
from anyquant.pipeline.prepare import prepare
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.rows import Unweighted
from anyquant.pipeline.sensitivity import Question, Sensitivity, portions_of, sensitivities
from anyquant.pipeline.statistics import gather
from anyquant.pipeline.texts import load_splits, source_tokenizer
from anyquant.runtimes.transformers import DecodedCheckpoint, TransformersRuntime
from anyquant.store.open import open_checkpoint
from support.checkpoints import make_checkpoint

CANDIDATES = ("q2_k", "q3_k", "q4_k", "q6_k")


@pytest.fixture(scope="module")
def demo() -> Question:
    """A few documents of the default text, with the importance that make would use."""
    checkpoint = open_checkpoint(api.model_path(api.DEMO))
    model = prepare(checkpoint, Recipe())
    splits = load_splits(source_tokenizer(checkpoint), model.architecture, Calibration(context=128))
    statistics = gather(checkpoint, model.architecture, Calibration(), splits.calibrate[:8], Silent())
    documents = [document.tokens for document in splits.select[:8]]
    return Question(model, rules("gguf"), documents, statistics, CANDIDATES, draws=4)


def measuring(question: Question) -> Callable[[Choice], float]:
    """The mean KL of a plan on the documents, by running the decoded weights in transformers."""
    model, architecture = question.model, question.model.architecture
    before = list(map(log_softmax, TransformersRuntime(model.checkpoint, architecture).logits(question.documents)))

    @cache
    def decoded(name: str, grid: str) -> Float32:
        linear = architecture.by_name[name]
        weights = read_view(model.checkpoint, linear.view, 0, linear.shape[0])
        params, codes = find_grid(grid).quantize(weights, question.statistics.importance(linear))
        return find_grid(grid).decode(codes, params)

    def measure(choice: Choice) -> float:
        changed = DecodedCheckpoint(model.checkpoint, architecture, lambda name: decoded(name, choice[name]))
        after = TransformersRuntime(changed, architecture, model.source.config).logits(question.documents)
        found = [divergence(one, log_softmax(other)) for one, other in zip(before, after, strict=True)]
        return float(np.concatenate(found).mean())

    return measure


def random_plans(found: Sensitivity, count: int) -> list[Choice]:
    random = np.random.default_rng(0)
    return [{one.name: one.cells[random.integers(len(one.cells))].grid for one in found.portions} for _ in range(count)]


def rank_correlation(one: list[float], other: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_predictions_rank_random_plans_as_measuring_does(demo: Question, tmp_path: Path) -> None:
    found = {
        method: sensitivities(replace(demo, method=method), tmp_path, 1, Silent()) for method in ("gradient", "forward")
    }
    plans, measure = random_plans(found["gradient"], 15), measuring(demo)
    measured = [measure(plan) for plan in plans]
    for method, answer in found.items():
        predicted = [answer.loss(plan) for plan in plans]
        assert rank_correlation(predicted, measured) >= 0.8, method
        assert 0.7 < np.exp(np.mean(np.log(np.divide(predicted, measured)))) < 1.4
        assert 0 < answer.forwards <= 20
    # of a single part, fine enough for second order, and within what its standard error allows
    fine = {one.name: "bf16" for one in found["gradient"].portions}
    for name in ("blocks.1.attn_v", "blocks.4.ffn_down"):
        cell = found["gradient"].by_name[name].cell("q3_k")
        assert abs(cell.loss - measure({**fine, name: "q3_k"})) < 3 * cell.error


def test_bytes_are_exact_and_rules_say_the_choice(demo: Question, tmp_path: Path) -> None:
    portions = portions_of(demo)
    found = Sensitivity("", "gradient", 1, 1, 1.0, 0, portions)
    totals = set()
    for plan in random_plans(found, 3):
        wanted = {name: Wanted(plan[one.name]) for one in found.portions for name in one.linears}
        rules_found = rules_of(demo.model.architecture, wanted)
        job = make_job(demo.model, demo.target, Recipe(rules=rules_found), True)
        totals.add(job.layout.nbytes - sum(found.by_name[name].cell(grid).nbytes for name, grid in plan.items()))
        assert {name: job.plan.decisions[name].grid for name in plan} == plan
    assert len(totals) == 1
    assert [len(group.candidates) for group in found.groups] == [5] * len(portions)


def test_saved_and_used_again_for_the_same_question_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question, saved = tiny(tmp_path / "model", "llama"), tmp_path / "saved.json"
    first = sensitivities(question, tmp_path, 1, Silent(), saved)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "saved.json"}
    with monkeypatch.context() as patch:
        patch.setattr(module, "inner_products", None)
        assert sensitivities(question, tmp_path, 1, Silent(), saved) == first
    other = sensitivities(replace(question, documents=[[1, 2, 3]]), tmp_path, 1, Silent(), saved)
    assert other.identity != first.identity and module.load(saved) == other
    saved.write_text(json.dumps({"version": 1, "identity": ""}))
    with pytest.raises(BadInputError, match=r"saved\.json"):
        sensitivities(question, tmp_path, 1, Silent(), saved)


def tiny(folder: Path, family: str, target: str = "gguf", **more: tuple[str, ...]) -> Question:
    checkpoint = open_checkpoint(make_checkpoint(folder, family))
    model = prepare(checkpoint, Recipe())
    documents = [[int(token) for token in np.random.default_rng(n).integers(0, 300, n)] for n in (9, 20, 20)]
    return Question(model, rules(target), documents, Unweighted(), more.get("candidates", ("q4_k", "q8_0")), draws=1)


def test_linears_of_one_tensor_are_one_part(tmp_path: Path) -> None:
    found = sensitivities(tiny(tmp_path / "model", "phi3"), tmp_path, 1, Silent())
    fused = [one for one in found.portions if len(one.linears) == 3]
    assert [one.role for one in fused] == ["attn_q+attn_k+attn_v"] * 2
    assert all(cell.loss > 0 for one in fused for cell in one.cells if cell.grid != one.stored)


def test_experts(tmp_path: Path) -> None:
    question = tiny(tmp_path / "model", "qwen3_moe")
    for method in ("gradient", "forward"):
        found = sensitivities(replace(question, method=method, documents=[[5, 6]]), tmp_path, 1, Silent())
        experts = [one for one in found.portions if one.expert is not None]
        assert len(experts) == 2 * 4 * 3
        assert all(one.cell(grid).loss > 0 for one in experts for grid in ("q4_k", "q8_0"))
        coarse, fine = (sum(one.cell(grid).loss for one in experts) for grid in ("q4_k", "q8_0"))
        assert coarse > 10 * fine
        assert not any(one.role == "router" for one in found.portions)
        if method == "gradient":  # two tokens with two of four experts each
            assert 0 < len(found.unseen) < len(experts)


@pytest.mark.parametrize(
    ("target", "candidates", "error", "said"),
    [
        ("gguf", ("q4_x",), UsageError, "q4_x"),
        ("gguf", ("int4-g128",), UnsupportedError, "int4-g128"),
        ("compressed-tensors", ("int4-g128", "int8-g128"), None, ""),
        ("state", ("mxfp4",), None, ""),
    ],
)
def test_what_cannot_be_asked(
    target: str, candidates: tuple[str, ...], error: type[Exception] | None, said: str, tmp_path: Path
) -> None:
    question = tiny(tmp_path / "model", "llama", target, candidates=candidates)
    if error is None:
        roles = {one.role for one in portions_of(question)}
        assert not roles & {"embedding", "head"} and len(roles) >= 4
        return
    with pytest.raises(error, match=said):
        portions_of(question)
    with pytest.raises(UsageError, match="backward"):
        sensitivities(replace(question, method="backward"), tmp_path, 1, Silent())


def test_pictures(tmp_path: Path) -> None:
    found = sensitivities(tiny(tmp_path / "model", "llama"), tmp_path, 1, Silent())
    assert shown_grid(found) == "q4_k"
    assert heat_map(found, "q4_k").count("<rect") == 2 * 7 + 2
    assert "<script" not in page(found, "<script>", "q4_k")
    worst = most_sensitive(found, "q4_k", 3)
    assert worst[0].cell("q4_k").loss == max(one.cell("q4_k").loss for one in found.portions)
