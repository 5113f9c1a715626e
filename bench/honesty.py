"""How often a contract passes whose limit is exactly the true loss: it should be 5 %, and must not be more than 7 %.
And how often a choice that a search just accepts is certified: it should be 90 %.

    anyquant evaluate OUT --against MODEL --text TEXT --json > measured.json
    python bench/honesty.py measured.json [MORE.json ...] [--documents 85,40,30] [--select 8,14,20,43] [--draws 1000]

The documents that were measured are taken for the whole population, so its true mean is known. Sets of documents are
drawn from it, and each is judged as `anyquant make` judges: with the true mean for a limit; and one to select on, with
the limit at which the search just accepts it, and one to certify on.

Of several artifacts measured on the same text, the one that looks best on the documents to select on is taken: what the
luck of the best of many tries costs. They are made as alike as the tries of a search, which share most of their loss,
by taking 0.7 of what they have in common, and have the same true mean, which is the worst case.
"""

import argparse
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from anyquant.contract.measured import at_most
from anyquant.evaluation.bootstrap import estimate

SHARED = 0.7  # of the loss of two tries
# of a document: what is summed, and what it is divided by
MEASURES: dict[str, tuple[Callable[[dict[str, Any]], float], str]] = {
    "mean KL": (lambda row: row["kl"], "tokens"),
    "perplexity increase": (lambda row: row["nll_candidate"] - row["nll_reference"], "targets"),
    "same top token": (lambda row: row["tokens"] - row["same_top"], "tokens"),
}


def false_passes(totals: np.ndarray, counts: np.ndarray, documents: int, draws: int) -> int:
    """Of `draws` sets of `documents`, how many have an upper bound within the population's own mean."""
    limit = totals.sum() / counts.sum()
    random = np.random.default_rng(0)
    passed = 0
    for draw in range(draws):
        drawn = random.integers(len(totals), size=documents)
        passed += estimate(totals[drawn], counts[drawn], seed=draw).upper <= limit
    return passed


def certified(artifacts: list[np.ndarray], counts: np.ndarray, select: int, certify: int, draws: int) -> int:
    """Of `draws` choices that leave exactly the room that a search asks for, how many are certified.

    `artifacts` are their totals by document, of equal mean; the one that asks for the lowest limit is chosen.
    """
    random = np.random.default_rng(1)
    passed = 0
    for draw in range(draws):
        first, second = (random.integers(len(counts), size=size) for size in (select, certify))
        limits = [
            at_most("", estimate(totals[first], counts[first], seed=draw), math.nan).cautious(
                math.sqrt(select / certify)
            )
            for totals in artifacts
        ]
        chosen = artifacts[int(np.argmin(limits))]
        passed += estimate(chosen[second], counts[second], seed=draw).upper <= min(limits)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="+")
    parser.add_argument("--documents", default="85,40,30")
    parser.add_argument("--select", default="8,14,20,43")
    parser.add_argument("--draws", type=int, default=1000)
    given = parser.parse_args()
    several = [json.loads(path.read_text())["per_document"] for path in given.measured]
    for name, (quantity, key) in MEASURES.items():
        counts = np.array([row[key] for row in several[0]], dtype=float)
        artifacts = [np.array([quantity(row) for row in rows]) for rows in several]
        line = {"measure": name, "population": len(counts)}
        for documents in map(int, given.documents.split(",")):
            passed = false_passes(artifacts[0], counts, documents, given.draws)
            print(json.dumps({**line, "documents": documents, "false_passes": passed / given.draws}), flush=True)
        scaled = [totals / abs(totals.sum()) for totals in artifacts]
        alike = [SHARED * sum(scaled) / len(scaled) + (1 - SHARED) * totals for totals in scaled]
        for select, certify in product(map(int, given.select.split(",")), (30, 85)):
            for count in sorted({1, len(alike)}):
                passed = certified(alike[:count], counts, select, certify, given.draws)
                found = {"select": select, "certify": certify, "best_of": count, "certified": passed / given.draws}
                print(json.dumps({**line, **found}), flush=True)


if __name__ == "__main__":
    main()
