"""Mean KL of algorithms on grids, every pair on the same tokens.

    python bench/algorithms.py MODEL --calibrate TEXT --certify TEXT [--grids int4-g128,...] [--algorithms "rtn;gptq"]

Texts are cut into windows without special tokens: the first 128 of 256 tokens of the one calibrate, those after them
(24 of 512) select, the first 40 of 512 tokens of the other certify. All matrices of the blocks are quantized, embedding
and head stay as they are, and `transformers` runs the decoded weights in float32. One JSON line per pair; seconds are
those of calibrating and quantizing. Without a text to certify nothing is judged. The algorithm "ggml" is llama.cpp's
own encoder, on its grids. `bench/peers` does the same with other libraries.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import anyquant.algorithms.kernels.columns  # noqa: F401 - so that no run pays for loading compiled code
from anyquant import api
from anyquant.calibrate.stream import collect
from anyquant.calibrate.text import Document
from anyquant.core.arithmetic import DTYPES
from anyquant.core.checkpoint import Checkpoint, read_view
from anyquant.core.dtypes import Float32
from anyquant.core.progress import Silent
from anyquant.evaluation.measures import Measures
from anyquant.formats import rules
from anyquant.models.architecture import Architecture
from anyquant.models.detect import detect
from anyquant.pipeline.blocks import blocks
from anyquant.pipeline.measure import ReferenceLogits, compare
from anyquant.pipeline.planner import make_job
from anyquant.pipeline.prepare import prepare
from anyquant.pipeline.quantized import Quantized, Quantizer
from anyquant.pipeline.recipe import Calibration, Recipe
from anyquant.pipeline.staged import Room
from anyquant.pipeline.texts import source_tokenizer
from anyquant.runtimes.transformers import DecodedCheckpoint, TransformersRuntime

GRIDS = "int4-g128,int3-g128,int2-g64,q4_k,q3_k,q2_k,iq3_s,mxfp4,nvfp4"
ALGORITHMS = "rtn;hqq;awq;gptq;autoround;rotate -> gptq"


@dataclass(frozen=True)
class Bench:
    """What all pairs share."""

    checkpoint: Checkpoint
    calibrate: Sequence[Document]
    references: Mapping[str, ReferenceLogits]
    folder: Path
    dtype: str

    def measure(self, chain: str, grid: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """One line of the table."""
        recipe = Recipe(grid=grid, algorithm=chain, options=options, calibration=Calibration(dtype=self.dtype))
        job = make_job(prepare(self.checkpoint, recipe), rules("state"), recipe, True)
        began, cpu = time.monotonic(), time.process_time()
        with Quantizer(self.calibrate, Room(None, self.folder / "out"), {}, Silent()) as quantizer:
            quantized = quantizer.quantized(job)
            weights = decoded(quantized)
            line: dict[str, Any] = {"grid": grid, "algorithm": chain, "options": dict(options), "dtype": self.dtype}
            line["seconds"] = round(time.monotonic() - began, 1)
            line["cpu_seconds"] = round(time.process_time() - cpu, 1)
            for name, reference in self.references.items():
                measures = judge(quantized.job.checkpoint, quantized.job.architecture, weights, reference)
                line[name] = round(measures.mean_kl.value, 6)
                line[f"{name}_interval"] = [round(end, 6) for end in measures.mean_kl.interval]
            quantizer.remove()
        line["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return line


def windows(ids: Sequence[int], length: int, count: int, start: int = 0) -> list[Document]:
    """`count` windows of `length` tokens, from token `start` on."""
    cut = [tuple(ids[at : at + length]) for at in range(start, start + length * count, length)]
    return [Document(f"window {n}", tokens, f"window {n}") for n, tokens in enumerate(cut) if len(tokens) == length]


def decoded(quantized: Quantized) -> dict[str, Float32]:
    """The decoded matrices by Linear name."""
    found: dict[str, list[Float32]] = {}
    for block in blocks(quantized.job):
        found.setdefault(block.linear.name, []).append(quantized.rows.rows(block).decode())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def judge(
    checkpoint: Checkpoint, architecture: Architecture, weights: Mapping[str, Float32], reference: ReferenceLogits
) -> Measures:
    """The decoded weights against the original, in `transformers`."""
    runtime = TransformersRuntime(DecodedCheckpoint(checkpoint, architecture, weights.__getitem__), architecture)
    return compare(runtime.logits([one.tokens for one in reference.documents]), reference, Silent(), "")


def by_ggml(bench: Bench, grid: str) -> dict[str, Any]:
    """One line of the table for llama.cpp's own encoder, with the importance that its imatrix has of the same text."""
    from support.ggml import stock_decode, stock_encode

    architecture = detect(bench.checkpoint)
    began = time.process_time()
    statistics = collect(bench.checkpoint, architecture, [one.tokens for one in bench.calibrate])
    weights = {}
    for linear in architecture.linears:
        values = read_view(bench.checkpoint, linear.view, 0, linear.shape[0])
        if linear.block is not None:
            values = stock_decode(grid.upper(), stock_encode(grid.upper(), values, statistics.importance(linear)))
        weights[linear.name] = values
    line: dict[str, Any] = {"grid": grid, "algorithm": "ggml", "cpu_seconds": round(time.process_time() - began, 1)}
    for name, reference in bench.references.items():
        measures = judge(bench.checkpoint, architecture, weights, reference)
        line[name] = round(measures.mean_kl.value, 6)
        line[f"{name}_interval"] = [round(end, 6) for end in measures.mean_kl.interval]
    return line


def options_of(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as TOML reads it."""
    return {name: tomllib.loads(f"x = {value}")["x"] for name, _, value in (one.partition("=") for one in given)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", required=True, type=Path)
    parser.add_argument("--certify", type=Path)
    parser.add_argument("--grids", default=GRIDS)
    parser.add_argument("--algorithms", default=ALGORITHMS, help="chains, separated by ;")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE as TOML, for every chain")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the blocks while calibrating")
    parser.add_argument("--shape", default="128x256", help="windows x tokens of calibration")
    parser.add_argument("--out", type=Path, help="file to which the lines are appended")
    given = parser.parse_args()
    checkpoint = api.source_of(api.model_path(given.model))
    tokenizer = source_tokenizer(checkpoint)
    ids = tokenizer.encode(given.calibrate.read_text(encoding="utf-8"))
    count, length = map(int, given.shape.split("x"))
    texts = {}
    if given.certify is not None:
        held_out = tokenizer.encode(given.certify.read_text(encoding="utf-8"))
        texts = {"select": windows(ids, 512, 24, 128 * 256), "certify": windows(held_out, 512, 40)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runtime = TransformersRuntime(checkpoint, detect(checkpoint))
        references = {name: ReferenceLogits(runtime, part, folder, Silent()) for name, part in texts.items()}
        bench = Bench(checkpoint, windows(ids, length, count), references, folder, given.dtype)
        for grid in given.grids.split(","):
            for chain in given.algorithms.split(";"):
                if chain.strip() == "ggml":
                    line = json.dumps(by_ggml(bench, grid))
                else:
                    line = json.dumps(bench.measure(chain.strip(), grid, options_of(given.option)))
                print(line, flush=True)
                if given.out is not None:
                    with given.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    main()
