"""How often a contract passes whose limit is exactly the true loss: it should be 5 %, and must not be more than 7 %.

    anyquant evaluate OUT --against MODEL --text TEXT --json > measured.json
    python bench/honesty.py measured.json [--documents 85,40,30] [--draws 1000]

The documents that were measured are taken for the whole population, so its true mean is known and is made the limit.
Sets of documents are drawn from it, and each is judged as `anyquant make` judges.
"""

import argparse
import json
from pathlib import Path

import numpy as np

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--documents", default="85,40,30")
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


if __name__ == "__main__":
    main()
