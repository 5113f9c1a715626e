"""A user's own metric: how it is named, called, refused and judged."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from anyquant.contract import metrics
from anyquant.contract.metrics import Metric, baseline, compare, load_metrics, scores
from anyquant.core.errors import UsageError
from anyquant.core.registry import Registry
from anyquant.evaluation.drops import Drop, Scores, drop_of, share_bound
from anyquant.evaluation.limits import Contract, DropLimit
from anyquant.evaluation.verdict import Status, judge
from support.plugin import install

CODE = """
import json, math
calls = []
def accuracy(session, split): return [float(session == "original")] * 40
def one(session, split): return 0.5
def changing(session, split): calls.append(0); return [len(calls) * 1.0] * 40
def broken(session, split): raise RuntimeError("no such prompt")
def infinite(session, split): return [1.0, math.inf]
def nested(session, split): return [[1.0], [2.0]]
def empty(session, split): return []
def nothing(session, split): pass
def lazy(session, split): return (x for x in (1.0, 2.0))
def leaves(session, split): raise SystemExit(3)
table = {}
"""


@pytest.fixture
def metric(tmp_path: Path) -> Callable[[str], Metric]:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return lambda function: load_metrics([DropLimit(f"{path}:{function}:higher", 0.01)])[0]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("mine.py:accuracy=0.1", "saying which direction is better"),
        ("mine.py:accuracy:better=0.1", "saying which direction is better"),
        ("accuracy=0.1", "saying which direction is better"),
        (":higher=0.1", "saying which direction is better"),
        ("accuracy::higher=0.1", "saying which direction is better"),
        ("mine.py:higher=0.1", "saying which direction is better"),
        ("mine.py:accuracy:higher", "expected METRIC=X"),
        ("mine.py:accuracy:higher=a lot", "expected METRIC=X"),
        ("mine.py:accuracy:higher=nan", "expected METRIC=X"),
        ("mine.py:accuracy:higher=-0.1", "not negative"),
        ("mine.py:accuracy:higher=inf%", "finite"),
    ],
)
def test_a_metric_says_all_that_is_needed(text: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        DropLimit.parse(text)


def test_a_limit_is_read_as_it_is_written() -> None:
    for text in ("a.py:f:higher=0.01", "a.b:f:lower=0.3%", "lm-eval.mmlu:higher=1%", "C:/x=y/a.py:f:higher=2%"):
        limit = DropLimit.parse(text)
        assert f"{limit.metric}={limit.text}" == text
    contract = Contract(max_kl=0.1, max_size=5, max_drop=(DropLimit.parse("a:f:higher=1%"),))
    assert Contract.from_dict(contract.as_dict()) == contract
    with pytest.raises(UsageError, match="twice"):
        Contract(max_drop=(DropLimit("a:f:higher", 1.0), DropLimit("a:f:higher", 2.0)))


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ("no_such_module:f:higher", "cannot import no_such_module.*a file is named with its ending"),
        ("math:no_such:higher", "has no no_such"),
        ("math:pi:higher", "not a function"),
        ("nowhere.py:f:higher", "there is no file"),
    ],
)
def test_what_is_not_there_is_refused(spec: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        load_metrics([DropLimit(spec, 0.1)])


def test_an_evaluator_of_a_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"mine-accuracy": "accuracy", "broken": "no_such", "number": "PI"}
    code = "PI = 3\ndef accuracy(session, split):\n    return [1.0, len(split)]\n"
    install(tmp_path, "third_party", metrics.EVALUATORS.group, points, code)
    monkeypatch.setattr(metrics, "EVALUATORS", Registry("evaluator", {}, metrics.EVALUATORS.group))
    with pytest.raises(UsageError, match=r"no evaluator 'mine-accuracy' is installed; known: none; .*module:function"):
        load_metrics([DropLimit("mine-accuracy:higher", 0.1)])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(metrics, "EVALUATORS", Registry("evaluator", {}, metrics.EVALUATORS.group))
    found, same = load_metrics([DropLimit("mine-accuracy:higher", 0.1), DropLimit("third_party:accuracy:higher", 0.1)])
    assert found.function is same.function
    assert scores(found, None, "certify").values.tolist() == [1.0, 7.0]
    for name, wrong in (
        ("mine", "known: broken, mine-accuracy, number; .*module:function:higher"),
        ("broken", "cannot load the evaluator broken: AttributeError"),
        ("number", "int, not a function"),
    ):
        with pytest.raises(UsageError, match=wrong):
            load_metrics([DropLimit(f"{name}:lower", 0.1)])


def test_a_file_that_does_not_run_says_where(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("x = 1\nx / 0\n")
    with pytest.raises(UsageError, match=r"ZeroDivisionError: division by zero \(bad.py, line 2\)"):
        load_metrics([DropLimit(f"{tmp_path}/bad.py:f:higher", 0.1)])


def test_a_file_is_run_once_and_errors_inside_libraries_name_its_line(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        "import json\nfound = []\ndef f(session, split): found.append(1); return 1\n"
        "def g(session, split):\n    return len(found)\ndef h(session, split):\n    return json.loads('no')\n"
    )
    limits = [DropLimit(f"{tmp_path}/two.py:{name}:higher", 0.1) for name in "fgh"]
    first, second, third = load_metrics(limits)
    scores(first, None, "select")
    assert scores(second, None, "select").mean == 1
    with pytest.raises(UsageError, match=r"JSONDecodeError: .*\(two.py, line 7\)"):
        scores(third, None, "select")


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("broken", r"RuntimeError: no such prompt \(mine.py, line 7\)"),
        ("infinite", "gave inf on certify, item 1"),
        ("nested", r"scores of shape \(2, 1\)"),
        ("empty", "gave nothing"),
        ("nothing", "returned NoneType"),
        ("leaves", "SystemExit"),
        ("changing", "not deterministic"),
    ],
)
def test_a_metric_that_gives_no_evidence_is_refused(metric: Callable[[str], Metric], function: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        baseline(metric(function), "original", "certify")


def test_scores_may_come_one_by_one(metric: Callable[[str], Metric]) -> None:
    found = scores(metric("lazy"), None, "select")
    assert (found.values.tolist(), found.single) == ([1.0, 2.0], False)
    assert scores(metric("one"), None, "select").single


def test_a_metric_that_fails_on_the_artifact_leaves_the_limit_open(metric: Callable[[str], Metric]) -> None:
    drop = compare(metric("broken"), scored([1.0] * 40), "artifact", "certify")
    assert "no such prompt" in drop.hindrance
    assert judged(drop).status is Status.INCONCLUSIVE
    drop = compare(metric("accuracy"), baseline(metric("accuracy"), "original", "certify"), "artifact", "certify")
    assert (drop.baseline, drop.candidate, drop.value) == (1.0, 0.0, 1.0)
    assert judged(drop).status is Status.FAIL


def scored(values: Any) -> Scores:
    return Scores(np.asarray(values, dtype=np.float64), False)


def judged(drop: Drop) -> Any:
    return judge(None, Contract(max_drop=(drop.limit,)), drops=[drop]).limits[0]


def test_direction_and_sign_of_the_baseline() -> None:
    """The same change, 2 % of the size of the baseline for the worse, in all four quadrants."""
    noise = np.random.default_rng(0).normal(0, 1e-3, 60)
    for direction, worse in (("higher", -1.0), ("lower", 1.0)):
        for level in (10.0, -10.0):
            before = scored(np.full(60, level))
            after = scored(level + worse * 0.2 + noise)
            absolute = DropLimit(f"m:f:{direction}", 0.3)
            drop = drop_of(absolute, before, after)
            assert drop.value == pytest.approx(0.2, abs=1e-3)
            assert judged(drop).status is Status.PASS
            relative = drop_of(DropLimit(f"m:f:{direction}", 0.03, relative=True), before, after)
            assert relative.value == pytest.approx(0.02, abs=1e-4)
            assert judged(relative).status is Status.PASS
            tight = drop_of(DropLimit(f"m:f:{direction}", 0.01, relative=True), before, after)
            assert judged(tight).status is Status.FAIL
            better = drop_of(absolute, before, scored(level - worse * 5 + noise))
            assert better.value < 0 and judged(better).status is Status.PASS


def test_the_spread_of_a_relative_baseline_counts() -> None:
    """The drop is exactly 10 % of every item: nothing about the ratio is uncertain, much about the difference is."""
    before = np.random.default_rng(1).exponential(1.0, 50)
    drop = drop_of(DropLimit("m:f:higher", 0.1001, relative=True), scored(before), scored(0.9 * before))
    assert drop.value == pytest.approx(0.1)
    assert judged(drop).status is Status.PASS
    absolute = drop_of(DropLimit("m:f:higher", 0.1001 * before.mean()), scored(before), scored(0.9 * before))
    assert judged(absolute).status is Status.INCONCLUSIVE


def test_bounds_hold_as_often_as_they_say() -> None:
    """True drop at the limit: at most about 5 % of the experiments may pass (relative, noisy baseline)."""
    random = np.random.default_rng(2)
    passed = 0
    for _ in range(100):
        before = random.normal(1.0, 0.3, 60)
        after = before - random.normal(0.05, 0.1, 60)
        drop = drop_of(DropLimit("m:f:higher", 0.05, relative=True), scored(before), scored(after))
        passed += drop.upper <= 0.05
    assert passed <= 100 * 0.05 + 3 * math.sqrt(100 * 0.05 * 0.95)


def test_what_no_item_showed_may_still_happen() -> None:
    """Right or wrong, 40 items, and none changed: an error of 5 % would look so about once in eight."""
    same = scored([1.0] * 40)
    drop = drop_of(DropLimit("m:f:higher", 0.05), same, same)
    assert drop.value == 0 and drop.upper == pytest.approx(1 - 0.05 ** (1 / 40), rel=1e-6)
    assert judged(drop).status is Status.INCONCLUSIVE
    assert judged(drop_of(DropLimit("m:f:higher", 0.08), same, same)).status is Status.PASS
    for count, items in ((0, 30), (3, 200), (9, 40)):
        oracle = scipy.stats.binomtest(count, items).proportion_ci(0.9, "exact").high
        assert share_bound(count, items) == pytest.approx(oracle, rel=1e-6)
    random, passed = np.random.default_rng(3), 0
    for _ in range(100):
        after = scored((random.random(60) > 0.03).astype(float))
        passed += drop_of(DropLimit("m:f:higher", 0.03), scored([1.0] * 60), after).upper <= 0.03
    assert passed <= 100 * 0.11  # 3 % of experiments on average; by resampling alone 16 %


def test_what_allows_no_bound_is_inconclusive() -> None:
    limit = DropLimit("m:f:higher", 0.5)
    single = Scores(np.array([0.5]), True)
    few = drop_of(limit, scored([1.0] * 29), scored([1.0] * 29))
    for drop, reason in (
        (drop_of(limit, single, single), "one number, which has no bound"),
        (few, "29 items are too few"),
        (drop_of(limit, scored([1.0] * 40), scored([1.0] * 41)), "the original has 40 scores, the artifact 41 scores"),
        (drop_of(limit, single, scored([1.0] * 40)), "the original has one number"),
    ):
        result = judged(drop)
        assert result.status is Status.INCONCLUSIVE and reason in result.sentence
    assert judge(None, Contract(max_drop=(limit,))).status is Status.INCONCLUSIVE
    with pytest.raises(UsageError, match="no percentage"):
        drop_of(DropLimit("m:f:higher", 0.1, relative=True), scored([0.0] * 40), scored([0.0] * 40))


def test_one_small_drop_is_no_better_evidence_than_none() -> None:
    limit = DropLimit("m:f:higher", 0.01)
    before = np.linspace(0.0, 1.0, 60)
    after = before.copy()
    after[30] -= 1e-4
    none, one = (drop_of(limit, Scores(before, False), Scores(each, False)).upper for each in (before, after))
    assert one >= none > 0.04


def test_a_metric_may_keep_one_buffer_for_its_scores(tmp_path: Path) -> None:
    """What the original scored stays, whatever the metric puts into its array afterwards."""
    (tmp_path / "own.py").write_text(
        "import numpy\nBUFFER = numpy.zeros(40)\n"
        "def kept(session, split):\n    BUFFER[:] = 1.0 if session == 'original' else 0.0\n    return BUFFER\n"
        "def drifting(session, split):\n    BUFFER[:] += 1.0\n    return BUFFER\n"
    )
    kept, drifting = (
        load_metrics([DropLimit(f"{tmp_path}/own.py:{name}:higher", 0.05)])[0] for name in ("kept", "drifting")
    )
    drop = compare(kept, baseline(kept, "original", "certify"), "artifact", "certify")
    assert (drop.baseline, drop.candidate, drop.value) == (1.0, 0.0, 1.0)
    with pytest.raises(UsageError, match="not deterministic"):
        baseline(drifting, "original", "certify")
