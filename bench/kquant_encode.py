"""Encoding speed and error of the K-quants against ggml's encoder, per CPU second of one thread, in the same run.

    python bench/kquant_encode.py [--rows 512] [--columns 2048] [--repeats 7]

CPU time, not wall time: other work on the machine does not count. Ours and ggml's turns alternate and the best of each
is taken. Weights come in as float32, parameters and codes go out unpacked (ours) or packed (ggml's). The error ratio is
on ggml's own objective; "plain" is the ratio of squared errors times importance.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from anyquant.grids import grid
from support.ggml import stock_decode, stock_encode

Array = npt.NDArray[np.float32]
GOALS = {"q2_k": (8, 8), "q3_k": (4, 8), "q4_k": (8, 8), "q5_k": (8, 8), "q6_k": (8, 8)}
GOALS |= dict.fromkeys(("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s"), (1, 1))


def seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def instruction_set() -> str:
    features = llvmlite.binding.get_host_cpu_features()
    best = next((name for name in ("avx512f", "avx2", "sse4.2", "neon") if features.get(name)), "baseline")
    return f"{llvmlite.binding.get_host_cpu_name()}, {best}"


def loss(by: Array, weights: Array, decoded: Array) -> float:
    return float((by.astype(np.float64) * (weights.astype(np.float64) - decoded) ** 2).sum())


def measure(name: str, weights: Array, importance: Array | None, repeats: int) -> None:
    ours, kind = grid(name), name.upper()
    cold = seconds(lambda: ours.quantize(weights[:1], importance))
    fast, slow = [], []
    for _ in range(repeats):
        fast.append(seconds(lambda: ours.quantize(weights, importance)))
        slow.append(seconds(lambda: stock_encode(kind, weights, importance)))
    params, codes = ours.quantize(weights, importance)
    decoded, stock = ours.decode(codes, params), stock_decode(kind, stock_encode(kind, weights, importance))
    by = ours.weighting(weights, importance)
    plain = np.broadcast_to(np.float32(1) if importance is None else importance, weights.shape)
    million, goal = weights.size / 1e6, GOALS[name][importance is not None]
    steered = "no" if importance is None else "yes"
    print(
        f"{name:5} {steered:3} {million / min(fast):9.0f} {million / min(slow):9.1f} "
        f"{min(slow) / min(fast):6.1f}x ({goal}x) {loss(by, weights, decoded) / loss(by, weights, stock):8.4f} "
        f"{loss(plain, weights, decoded) / loss(plain, weights, stock):8.4f} {cold:8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    weights = (generator.standard_normal((arguments.rows, arguments.columns)) * 0.02).astype(np.float32)
    importance = np.exp(generator.standard_normal(arguments.columns)).astype(np.float32)
    print(f"{arguments.rows} x {arguments.columns} gaussian weights, one thread, {instruction_set()}")
    print("grid  imp  ours Mw/s ggml Mw/s   ratio (goal)   error    plain  first call s")
    for name in GOALS:
        for steering in (None, importance):
            measure(name, weights, steering, arguments.repeats)


if __name__ == "__main__":
    main()
