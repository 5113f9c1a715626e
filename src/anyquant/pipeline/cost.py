"""What a job will take, told before it starts: bytes exactly, memory and time as estimates."""

from dataclasses import dataclass

from anyquant.grids import grid as find_grid
from anyquant.pipeline.blocks import BLOCK_WEIGHTS
from anyquant.pipeline.planner import Job

# million weights per second and core, read + quantize + pack + write + verify, on the slower side of what
# `make bench` prints; only an order of magnitude is claimed
RATES = {"kquant": 55.0, "legacy": 70.0, "integer": 50.0, "floating": 150.0}
BASE_MEMORY = 160_000_000  # interpreter, numpy, numba and their caches
TORCH_MEMORY = 450_000_000  # torch and transformers loaded
BYTES_PER_BLOCK_WEIGHT = 40  # source, float32, codes, temporaries of one block in flight
MULTIPLY_RATE = 20e9  # float32 operations per second and core


@dataclass(frozen=True)
class Cost:
    """`memory` in bytes at the peak, `seconds` for quantizing and verifying; both estimates. `disk` is exact."""

    disk: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Planned:
    """A job before it starts. `refusal`: why the target cannot hold it, or ""; its layout is then the bare payload."""

    job: Job
    cost: Cost
    refusal: str


def estimate(job: Job, threads: int, calibration_tokens: int) -> Cost:
    """The cost of a job on `threads` cores; `calibration_tokens` is 0 for a data-free run."""
    seconds = 0.0
    for linear in job.architecture.linears:
        family = find_grid(job.plan.decisions[linear.name].grid).family
        seconds += linear.view.rows * linear.view.columns / 1e6 / RATES.get(family, 20.0) / threads
    memory = BASE_MEMORY + 2 * threads * BLOCK_WEIGHTS * BYTES_PER_BLOCK_WEIGHT
    if calibration_tokens:
        hidden = job.architecture.dimensions.hidden
        largest = max((_block_weights(job, index) for index in range(job.architecture.dimensions.blocks)), default=0)
        memory += TORCH_MEMORY + 2 * 4 * largest + 8 * calibration_tokens * hidden
        seconds += 2 * job.weights * calibration_tokens / MULTIPLY_RATE / threads
    return Cost(job.layout.nbytes, memory, seconds)


def _block_weights(job: Job, block: int) -> int:
    return sum(linear.view.rows * linear.view.columns for linear in job.architecture.linears if linear.block == block)
