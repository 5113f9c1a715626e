"""Error of our encoders against ggml's encoder on ggml's own objective, for every matrix of a model.

    python bench/encoder_error.py [MODEL] [GRID ...]

Prints the worst matrix and the sum over the model of ours / ggml, without importance and with the importance collected
on the default text. The rule: at most 1.0005 for any matrix, at most 1.0000 for the sum.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from anyquant import api
from anyquant.core.checkpoint import read_view
from anyquant.core.dtypes import Float32
from anyquant.core.grid import Grid
from anyquant.core.linear import Linear
from anyquant.core.progress import Silent
from anyquant.grids import grid as find_grid
from anyquant.models.detect import detect
from anyquant.pipeline.recipe import Calibration
from anyquant.pipeline.statistics import gather
from anyquant.pipeline.texts import load_splits, source_tokenizer
from anyquant.store.open import open_checkpoint
from support.ggml import stock_decode, stock_encode

GRIDS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
GRIDS += ("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s")


def errors(grid: Grid, weights: Float32, importance: Float32 | None) -> tuple[float, float]:
    """(ours, ggml's) weighted squared error."""
    steer = grid.weighting(weights, importance).astype(np.float64)
    params, codes = grid.quantize(weights, importance)
    ours = grid.decode(codes, params)
    stock = stock_decode(grid.name.upper(), stock_encode(grid.name.upper(), weights, importance))
    return float((steer * (weights - ours) ** 2).sum()), float((steer * (weights - stock) ** 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("grids", nargs="*", default=GRIDS)
    arguments = parser.parse_args()
    model = arguments.model
    checkpoint = open_checkpoint(api.model_path(model))
    architecture = detect(checkpoint)
    calibration = Calibration()
    splits = load_splits(source_tokenizer(checkpoint), architecture, calibration)
    statistics = gather(checkpoint, architecture, calibration, splits.calibrate, Silent())

    def steering(linear: Linear, given: bool) -> Float32 | None:
        return statistics.importance(linear) if given else None

    print(f"{model}: {len(architecture.linears)} matrices")
    print(f"{'grid':<6}{'importance':>11}{'worst':>9}{'sum':>9}  worst matrix")
    for name in arguments.grids:
        for given in (False, True):
            found = {}
            for linear in architecture.linears:
                weights = read_view(checkpoint, linear.view, 0, linear.view.rows)
                found[linear.name] = errors(find_grid(name), weights, steering(linear, given))
            ratios = {linear: ours / stock for linear, (ours, stock) in found.items()}
            worst = max(ratios, key=lambda linear: ratios[linear])
            total = sum(ours for ours, _ in found.values()) / sum(stock for _, stock in found.values())
            print(f"{name:<6}{'yes' if given else 'no':>11}{ratios[worst]:>9.4f}{total:>9.4f}  {worst}", flush=True)


if __name__ == "__main__":
    main()
