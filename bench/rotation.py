"""What a learned rotation gains as more matrices share it, on Gaussian weights, which have no outliers to spread.

    python bench/rotation.py [--blocks 3,6,12] [--grids int4-g128,nvfp4] [--width 256] [--steps 300]

One line per number of blocks and grid: the error of rounding under the learned R1 as a part of that under a Hadamard
matrix, and CPU seconds. A block has the seven matrices of a Llama with half as many key-value heads and a feed-forward
part three times as wide; the rotation is that of the residual stream, which all of them share.
"""

import argparse
import time

import numpy as np

from anyquant.core.linear import Linear, Role, View
from anyquant.core.progress import Silent
from anyquant.grids import grid as find_grid
from anyquant.transforms.learn import Problem, Turned, learn
from anyquant.transforms.operations import random_rotation
from anyquant.transforms.rotate import STREAM_RATE


def block(index: int, width: int, rng: np.random.Generator) -> list[Turned]:
    """The matrices of a block: q, k, v, output, gate, up, down."""
    shapes = {
        Role.ATTN_Q: (width, width),
        Role.ATTN_K: (width // 2, width),
        Role.ATTN_V: (width // 2, width),
        Role.ATTN_OUTPUT: (width, width),
        Role.FFN_GATE: (3 * width, width),
        Role.FFN_UP: (3 * width, width),
        Role.FFN_DOWN: (width, 3 * width),
    }
    turned = []
    for role, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        view = View(f"{index}.{role}", 0, *shape)
        linear = Linear(view.tensor, role, view, index, "", "")
        writes = role in (Role.ATTN_OUTPUT, Role.FFN_DOWN)
        turned.append(Turned(linear, writes, lambda start, stop, values=values: values[start:stop]))
    return turned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="3,6,12,24,48")
    parser.add_argument("--grids", default="int4-g128,nvfp4")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    for blocks in map(int, given.blocks.split(",")):
        rng = np.random.default_rng(0)
        turned = [one for index in range(blocks) for one in block(index, given.width, rng)]
        for name in given.grids.split(","):
            start = random_rotation(given.width, given.width, 0)
            began = time.process_time()
            found = learn(Problem(start, turned, find_grid(name), given.steps, STREAM_RATE, (0, 0)), Silent())
            print(f"{blocks:3} blocks  {name:10} {found.ratio:.3f}  {time.process_time() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
