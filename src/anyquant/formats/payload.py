"""What a plan weighs without a format: every Linear at the exact bytes of its grid, nothing around it.

For a model that is planned before its target can hold it. Nothing is written from it.
"""

from dataclasses import dataclass

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import DTYPES
from anyquant.core.grid import Grid
from anyquant.core.plan import Layout, Part, Place, Plan, TargetFile, Unit
from anyquant.formats.state import StateRules, carried_dtype
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture


@dataclass(frozen=True)
class PayloadRules(StateRules):
    """Holds whatever a grid holds, as the neutral state does, but counts bytes as they would be packed.

    `name` is that of the target.
    """

    def layout(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> Layout:
        """One part per Linear and carried tensor, end to end in one nameless file."""
        parts: list[Part] = []
        units: list[Unit] = []
        offset = 0
        for linear in architecture.linears:
            grid = find_grid(plan.decisions[linear.name].grid)
            corrections = plan.decisions[linear.name].corrections
            bits = grid.bits(linear.shape) + sum(correction.bits(linear.shape) for correction in corrections)
            nbytes = -(-bits // 8)
            parts.append(Part(linear.name, grid.name, linear.shape, offset, nbytes))
            units.append(Unit(linear.name, (linear.name,), (), grid.name, (linear.name,), corrections=corrections))
            offset += nbytes
        for item in architecture.carried:
            dtype = carried_dtype(plan, checkpoint, item.name, item.tensor)
            parts.append(Part(item.name, dtype, (item.length,), offset, DTYPES[dtype].size * item.length))
            units.append(Unit(item.name, (), (item.name,), "", (item.name,)))
            offset += parts[-1].nbytes
        return Layout((TargetFile("", b"", tuple(parts), offset),), tuple(units))

    def slices(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int) -> list[Place]:
        """Where these rows lie when rows follow each other; what all rows share goes with the first of them."""
        grid, columns = find_grid(unit.grid), architecture.by_name[linear].view.columns
        start, stop = (self._bytes(unit, grid, (row, columns)) for row in (first_row, first_row + rows))
        return [Place(linear, start, stop - start)]

    def _bytes(self, unit: Unit, grid: Grid, shape: tuple[int, int]) -> int:
        if not shape[0]:
            return 0
        return -(-(grid.bits(shape) + sum(correction.bits(shape) for correction in unit.corrections)) // 8)
