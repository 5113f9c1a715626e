"""What a job will take, told before it starts: bytes exactly, memory and time as estimates."""

from dataclasses import dataclass

from anyquant.algorithms import ALGORITHMS
from anyquant.grids import grid as find_grid
from anyquant.pipeline.blocks import BLOCK_WEIGHTS
from anyquant.pipeline.matrix import output_needed, statistics_needed
from anyquant.pipeline.planner import Job
from anyquant.pipeline.staged import is_staged

# million weights per second and core, read + quantize + pack + write + verify, on the slower side of what
# `make bench` prints; only an order of magnitude is claimed
RATES = {
    "kquant": 55.0,
    "legacy": 70.0,
    "integer": 50.0,
    "affine": 30.0,
    "floating": 150.0,
    "fp8": 50.0,
    "iquant": 4.0,
    "codebook": 4.0,
}
GRADIENT_PASSES = 4.0  # forward, forward again, back, and the second moments
BASE_MEMORY = 160_000_000  # interpreter, numpy, numba and their caches
TORCH_MEMORY = 450_000_000  # torch and transformers loaded
BYTES_PER_BLOCK_WEIGHT = 40  # source, float32, codes, temporaries of one block in flight
MULTIPLY_RATE = 50e9  # float32 operations per second and core
FEEDBACK_RATE = 3e6  # weights per second and core of error feedback with one sweep of refinement
PASSES = (
    3.5  # of a block through its calibration text in a staged run, its Hessians included; twice with the float model
)


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
        seconds += linear.weights / 1e6 / RATES.get(family, 20.0) / threads
    memory = BASE_MEMORY + 2 * threads * BLOCK_WEIGHTS * BYTES_PER_BLOCK_WEIGHT
    if calibration_tokens:
        staged = is_staged(job)
        decisions = list(job.plan.decisions.values())
        both = staged and "cross" in statistics_needed(decisions)
        passes = (PASSES * (1 + both) if staged else 1.0) + GRADIENT_PASSES * output_needed(decisions)
        hidden = job.architecture.dimensions.hidden
        largest = max((_block_weights(job, index) for index in range(job.architecture.dimensions.blocks)), default=0)
        memory += TORCH_MEMORY + 2 * 4 * largest + 8 * calibration_tokens * hidden * (1 + both)
        seconds += 2 * job.weights * calibration_tokens * passes / MULTIPLY_RATE / threads
        if staged:
            # a Hessian and what is factorised of it, in float64
            memory += 32 * max(linear.view.columns for linear in job.architecture.linears) ** 2
            seconds += job.weights / FEEDBACK_RATE / threads + _tuning(job, calibration_tokens) / threads
    return Cost(job.layout.nbytes, memory, seconds)


def _tuning(job: Job, calibration_tokens: int) -> float:
    """Seconds of one core for blocks that are tuned: forward and backward through a batch, every iteration."""
    context, total = job.recipe.calibration.context, 0.0
    for linear in job.architecture.linears:
        options = job.plan.decisions[linear.name].options
        if ALGORITHMS.get(job.plan.decisions[linear.name].algorithm).tune is not None:
            tokens = min(calibration_tokens, context * int(options["batch"])) * int(options["iterations"])
            total += 6 * linear.weights * tokens / MULTIPLY_RATE
    return total


def _block_weights(job: Job, block: int) -> int:
    return sum(linear.weights for linear in job.architecture.linears if linear.block == block)
