"""From one quantized form to another with the codes that there are: unpacked, put on the target's grid, packed.

exact        the same numbers
rescaled     the same codes; scales rounded to the type in which the target stores them
re-rounded   rounded again, from the decoded numbers: where no grid of the target holds the codes
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from threading import Lock

import numpy as np

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.errors import UnsupportedError
from anyquant.core.linear import Linear, Role
from anyquant.core.qtensor import QTensor
from anyquant.core.quantized import QuantizedCheckpoint
from anyquant.formats.base import Rules
from anyquant.grids import grid as find_grid
from anyquant.grids import names as grid_names
from anyquant.grids.recode import recoded
from anyquant.pipeline.blocks import BLOCK_WEIGHTS, Block
from anyquant.pipeline.choice import Wanted, rules_of
from anyquant.pipeline.planner import Job, Model
from anyquant.pipeline.recipe import Recipe, Rule
from anyquant.pipeline.rows import Direct, Unweighted

EXACT, RESCALED, ROUNDED = KINDS = ("exact", "rescaled", "re-rounded")
PROBE = 16  # rows on which grids are tried
FLOAT = "bf16"  # holds eight bits of any size; of more, embeddings and heads that a target keeps in float have no use


def stored_rows(source: Checkpoint, linear: Linear, first: int, rows: int) -> QTensor | None:
    """Rows of a Linear as they are quantized in the source; None where it holds them in float."""
    tensor = linear.view.tensor
    if not isinstance(source, QuantizedCheckpoint) or tensor not in source.names() or source.grid_of(tensor) is None:
        return None
    start = linear.view.start + first
    return source.quantized_rows(tensor, start, start + rows)


def transcoding(model: Model, target: Rules, recipe: Recipe) -> Recipe:
    """The recipe with a rule for every quantized matrix: the grid that it names, or that of the target that holds the
    codes best; where none does, the one nearest in bits.

    Raises UnsupportedError when the source is not quantized.
    """
    wanted = {}
    for linear in model.architecture.linears:
        rows = stored_rows(model.source, linear, 0, min(PROBE, linear.shape[0]))
        if rows is None:
            continue
        grid = recipe.grid or best_grid(model.source, rows, linear, target) or nearest_grid(rows, linear, target)
        wanted[linear.name] = Wanted(grid)
    if not wanted:
        raise UnsupportedError(f"{model.source.location}: nothing in it is quantized; use make")
    rules = rules_of(model.architecture, _together(wanted, target.ties(model.architecture)))
    return replace(recipe, grid=None, rules=(*rules, *_edges(recipe, model.architecture.linears)))


def _edges(recipe: Recipe, linears: Sequence[Linear]) -> Iterator[Rule]:
    """--embedding and --head go before what was found."""
    for role, grid in ((Role.EMBEDDING, recipe.embedding), (Role.HEAD, recipe.head)):
        if grid is not None and any(linear.role is role for linear in linears):
            yield Rule(role=role.value, grid=grid)


def _together(wanted: Mapping[str, Wanted], ties: Mapping[str, str]) -> Mapping[str, Wanted]:
    """Linears that the target stores as one tensor share the grid of the one that takes most bits."""
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(ties.get(name, name), []).append(name)

    def width(name: str) -> float:
        return find_grid(wanted[name].grid).bits((256, 4096))

    return {name: wanted[max(names, key=width)] for names in groups.values() for name in names}


def best_grid(source: Checkpoint, rows: QTensor, linear: Linear, target: Rules) -> str | None:
    """The grid of the target that holds all codes of a Linear: its own; else the one of fewest bits that holds the
    same numbers; else the one that comes nearest on `rows`, its first. None where none has a place for the codes."""
    if target.holds(rows.grid.name):
        return rows.grid.name
    values, found = rows.decode(), []
    for name in grid_names():
        if not target.holds(name) or find_grid(name).refuses(linear.shape) is not None:
            continue
        moved = recoded(rows, find_grid(name))
        if moved is not None:
            error = float(np.square(moved.decode() - values, dtype=np.float64).sum())
            found.append((error, find_grid(name).bits(linear.shape), name))
    nearest = None
    for _, _, name in sorted(found):
        kind = _kind(source, linear, name)
        if kind == EXACT:
            return name
        nearest = nearest or (name if kind else None)
    return nearest


def nearest_grid(rows: QTensor, linear: Linear, target: Rules) -> str:
    """Of the grids that a search for the target chooses from, the one whose bits are nearest to those of the source;
    bfloat16 for a matrix that the target keeps in float."""
    bits = rows.grid.bits(linear.shape)
    grids = [grid for grid in map(find_grid, target.candidates(linear)) if grid.refuses(linear.shape) is None]
    return min(grids, key=lambda grid: abs(grid.bits(linear.shape) - bits)).name if grids else FLOAT


def _kind(source: Checkpoint, linear: Linear, grid: str) -> str:
    """What becomes of a whole Linear on a grid, in blocks of rows; "" where codes have no place."""
    step = max(1, BLOCK_WEIGHTS // linear.shape[1] // 128) * 128
    kind = EXACT
    for first in range(0, linear.shape[0], step):
        rows = stored_rows(source, linear, first, min(step, linear.shape[0] - first))
        moved = None if rows is None else recoded(rows, find_grid(grid))
        if rows is None or moved is None:
            return ""
        if kind == EXACT and not np.array_equal(moved.decode(), rows.decode()):
            kind = RESCALED
    return kind


class Transcoded:
    """The rows of a job, from the codes of its source. `kinds` grows with them: Linear name to what was done."""

    def __init__(self, job: Job) -> None:
        self._job, self._direct, self._lock = job, Direct(job, Unweighted()), Lock()
        self.kinds: dict[str, str] = {}

    def rows(self, block: Block) -> QTensor:
        """Those of a block."""
        stored = stored_rows(self._job.source, block.linear, block.first, block.rows)
        if stored is None:
            return self._direct.rows(block)
        moved = recoded(stored, find_grid(self._job.plan.decisions[block.linear.name].grid))
        if moved is None:
            self._note(block, ROUNDED)
            return self._direct.rows(block)
        self._note(block, EXACT if np.array_equal(moved.decode(), stored.decode()) else RESCALED)
        return moved

    def _note(self, block: Block, kind: str) -> None:
        with self._lock:
            worst = max(self.kinds.get(block.linear.name, EXACT), kind, key=KINDS.index)
            self.kinds[block.linear.name] = worst
