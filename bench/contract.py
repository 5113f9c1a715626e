"""The contract against llama.cpp's own mixtures: less loss at the same bytes, fewer bytes at the same loss.

    python bench/stock.py MODEL --text TEXT > stock.jsonl
    python bench/contract.py MODEL --text TEXT --stock stock.jsonl [--sizes Q4_K_M,Q3_K_M,Q2_K] [--losses Q5_K_M]
        [--budget MINUTES] [--sensitivity FILE]

For each mixture of `stock.jsonl`, `anyquant make --max-size` with the bytes of its file, or `--max-kl` with its loss;
with `--budget` each search ends after so many minutes. Both are judged in llama.cpp on the *certify* text. For a loss,
ours stays below by what its certificate needs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyquant as aq
from anyquant.cli.progress import TerminalProgress

CERTIFICATE = 800  # bytes of the header that hold a certificate, which a stock file has not


def stock_bytes(stock: dict[str, Any]) -> int:
    """Of the file as llama.cpp would write it; ours carries its certificate within as many."""
    size: int = stock["bytes"] - CERTIFICATE
    return size


def line(kind: str, stock: dict[str, Any], report: aq.Report) -> dict[str, Any]:
    """One comparison."""
    kl = report.loss.mean_kl if report.loss is not None else (float("nan"),) * 3
    return {
        "at the same": kind,
        "preset": stock["preset"],
        "stock_bytes": stock_bytes(stock),
        "stock_kl": stock["certify"],
        "bytes": report.nbytes,
        "kl": kl[0],
        "kl_interval": kl[1:],
        "status": report.status,
        "kl_ratio": kl[0] / stock["certify"],
        "bytes_ratio": report.nbytes / stock_bytes(stock),
        "measured_on_select": sum(not point.chosen for point in report.points),
        "seconds": report.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--stock", type=Path, required=True)
    parser.add_argument("--sizes", default="Q4_K_M,Q3_K_M,Q2_K")
    parser.add_argument("--losses", default="Q5_K_M")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--sensitivity", type=Path, help="used by all searches, made by the first if it is not there")
    given = parser.parse_args()
    rows = {row["preset"]: row for row in map(json.loads, given.stock.read_text().splitlines())}
    with tempfile.TemporaryDirectory() as temporary, TerminalProgress(False) as progress:
        folder = Path(temporary)
        for kind, names in (("bytes", given.sizes), ("loss", given.losses)):
            for name in filter(None, names.split(",")):
                stock = rows[name]
                limit = {"max_size": stock_bytes(stock)} if kind == "bytes" else {"max_kl": stock["certify"]}
                report = aq.make(
                    given.model,
                    target="llama.cpp",
                    contract=aq.Contract(**limit),
                    text=given.text,
                    budget=given.budget,
                    sensitivity=given.sensitivity or folder / "sensitivity.json",
                    out=folder / name,
                    progress=progress,
                )
                print(json.dumps(line(kind, stock, report)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
