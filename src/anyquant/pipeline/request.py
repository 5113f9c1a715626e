"""What one call of `make` asks for."""

from dataclasses import dataclass
from pathlib import Path

from anyquant.core.checkpoint import Checkpoint
from anyquant.evaluation.limits import Contract
from anyquant.pipeline.recipe import Recipe
from anyquant.pipeline.targets import Target


@dataclass(frozen=True)
class Bounds:
    """What a search may take: `seconds` in all (None: as long as it takes), `evaluations` on *select*."""

    seconds: float | None = None
    evaluations: int = 12


@dataclass(frozen=True)
class Request:
    """One call of `make`. `choose`: nothing says what to do, so the contract decides, within `bounds`.

    `memory`: bytes that activations may take while calibrating; beyond it they lie in a file. None: all there is.
    `sensitivity`: the file of what the search starts from, made if it is not there. `transcode`: the source is
    quantized, and its codes are what the artifact gets; `unmeasured`: and nothing is measured.
    """

    location: str
    checkpoint: Checkpoint
    target: Target
    recipe: Recipe
    contract: Contract
    choose: bool
    out: Path
    overwrite: bool
    threads: int
    memory: int | None = None
    bounds: Bounds = Bounds()
    sensitivity: Path | None = None
    transcode: bool = False
    unmeasured: bool = False
