"""How often a contract passes whose limit is exactly the true loss: it should be 5 %, and must not be more than 7 %.
And how often a choice that a search just accepts is certified: it should be 90 %.

    anyquant evaluate OUT --against MODEL --text TEXT --json > measured.json
    python bench/honesty.py measured.json [--documents 85,40,30] [--select 8,14,20,43] [--draws 1000]

The documents that were measured are taken for the whole population, so its true mean is known. Sets of documents are
drawn from it, and each is judged as `anyquant make` judges: with the true mean for a limit; and one to select on, with
the limit at which the search just accepts it, and one to certify on.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from anyquant.contract.measured import at_most
from anyquant.evaluation.bootstrap import estimate


def false_passes(totals: np.ndarray, counts: np.ndarray, documents: int, draws: int) -> int:
    """Of `draws` sets of `documents`, how many have an upper bound within the population's own mean."""
    limit = totals.sum() / counts.sum()
    random = np.random.default_rng(0)
    passed = 0
    for draw in range(draws):
        drawn = random.integers(len(totals), size=documents)
        passed += estimate(totals[drawn], counts[drawn], seed=draw).upper <= limit
    return passed


def certified(totals: np.ndarray, counts: np.ndarray, select: int, certify: int, draws: int) -> int:
    """Of `draws` choices that leave exactly the room that a search asks for, how many are certified."""
    random = np.random.default_rng(1)
    passed = 0
    for draw in range(draws):
        first, second = (random.integers(len(totals), size=size) for size in (select, certify))
        chosen = at_most("", estimate(totals[first], counts[first], seed=draw), math.nan)
        limit = chosen.cautious(math.sqrt(select / certify))
        passed += estimate(totals[second], counts[second], seed=draw).upper <= limit
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--documents", default="85,40,30")
    parser.add_argument("--select", default="8,14,20,43")
    parser.add_argument("--draws", type=int, default=1000)
    given = parser.parse_args()
    rows = json.loads(given.measured.read_text())["per_document"]
    measures = {
        "mean KL": np.array([row["kl"] for row in rows]),
        "perplexity increase": np.array([row["nll_candidate"] - row["nll_reference"] for row in rows]),
        "same top token": np.array([row["tokens"] - row["same_top"] for row in rows]),
    }
    for name, totals in measures.items():
        key = "targets" if name == "perplexity increase" else "tokens"
        counts = np.array([row[key] for row in rows], dtype=float)
        for documents in map(int, given.documents.split(",")):
            passed = false_passes(totals, counts, documents, given.draws)
            line = {"measure": name, "population": len(rows), "documents": documents}
            print(json.dumps({**line, "false_passes": passed / given.draws}), flush=True)
        for select in map(int, given.select.split(",")):
            for certify in (30, 85):
                passed = certified(totals, counts, select, certify, given.draws)
                line = {"measure": name, "population": len(rows), "select": select, "certify": certify}
                print(json.dumps({**line, "certified": passed / given.draws}), flush=True)


if __name__ == "__main__":
    main()
