"""The neutral quantized state as a target of planning: its exact bytes, and where each Linear lies.

The files themselves are written by `store.state`, whose entries are named by content, which is known only when the
statistics are: in a layout they carry the name of their Linear instead.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from anyquant.core.checkpoint import Checkpoint
from anyquant.core.dtypes import DTYPES
from anyquant.core.errors import UsageError
from anyquant.core.linear import Linear, Role
from anyquant.core.plan import Layout, Part, Place, Plan, TargetFile, Unit
from anyquant.formats.base import COMPANIONS
from anyquant.grids import grid as find_grid
from anyquant.models.architecture import Architecture
from anyquant.runtimes.kv_cache import cannot_tell
from anyquant.store.safetensors_layout import write_safetensors_header
from anyquant.store.state_entry import SHARED, entry_header

CARRIED = "carried.safetensors"
CANDIDATES = tuple(f"int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8))


@dataclass(frozen=True)
class StateRules:
    name: str = "state"
    default_carried: str = ""
    entry: str = ""

    def part_names(self, architecture: Architecture) -> Mapping[str, str]:
        return {linear.name: f"{linear.name}/codes" for linear in architecture.linears}

    def preset(self, preset: str, architecture: Architecture, importance: bool) -> Mapping[str, tuple[str, str]]:
        """Raises UsageError: mixtures belong to a target."""
        raise UsageError(f"--preset {preset} is a mixture of a target; name it with --for, or give --grid")

    def activations(self, preset: str) -> str | None:
        return None

    def default_grid(self, linear: Linear, architecture: Architecture, grid: str, source: str) -> tuple[str, str]:
        return source, "outside the blocks: kept as stored"

    def own_grid(self, grid: str) -> str:
        return grid

    def fallback(self, grid: str, linear: Linear) -> str | None:
        return None

    def holds(self, grid: str) -> bool:
        """Whatever a grid holds."""
        return True

    def candidates(self, linear: Linear) -> tuple[str, ...]:
        """Groups of 64 integers of every width: what most formats have in one form or another."""
        return () if linear.block is None or linear.role is Role.ROUTER else CANDIDATES

    def ties(self, architecture: Architecture) -> Mapping[str, str]:
        return {}

    def refuses(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> list[str]:
        """The state holds whatever a grid holds."""
        return [] if plan.kv_cache is None else [cannot_tell(plan.kv_cache)]

    def layout(self, architecture: Architecture, plan: Plan, checkpoint: Checkpoint) -> Layout:
        """One file per Linear, one for what is carried in float, and the small files of the source."""
        files, units = [], []
        for linear in architecture.linears:
            grid = find_grid(plan.decisions[linear.name].grid)
            corrections = plan.decisions[linear.name].corrections
            header, tensors, offsets = entry_header(grid, linear.shape, corrections)
            parts = tuple(
                Part(f"{linear.name}/{name}", dtype, shape, offset, _nbytes(dtype, shape))
                for (name, dtype, shape), offset in zip(tensors, offsets, strict=True)
            )
            size = len(header) + sum(part.nbytes for part in parts)
            files.append(TargetFile(f"entries/{linear.name}", header, parts, size))
            names = tuple(part.name for part in parts)
            units.append(Unit(linear.name, (linear.name,), (), grid.name, names, corrections=corrections))
        carried = [
            (item.name, carried_dtype(plan, checkpoint, item.name, item.tensor), (item.length,))
            for item in architecture.carried
        ]
        if carried:
            header, offsets = write_safetensors_header(carried)
            parts = tuple(
                Part(name, dtype, shape, offset, _nbytes(dtype, shape))
                for (name, dtype, shape), offset in zip(carried, offsets, strict=True)
            )
            files.append(TargetFile(CARRIED, header, parts, len(header) + sum(part.nbytes for part in parts)))
            units += [Unit(name, (), (name,), "", (name,)) for name, _, _ in carried]
        for name in ("config.json", *COMPANIONS):
            content = checkpoint.text_file(name)
            if content is not None and name == "config.json" and json.loads(content) != checkpoint.config:
                content = json.dumps(checkpoint.config, indent=2, ensure_ascii=False).encode()  # a transform changed it
            if content is not None:
                files.append(TargetFile(name, content, (), len(content)))
        return Layout(tuple(files), tuple(units))

    def slices(self, unit: Unit, architecture: Architecture, linear: str, first_row: int, rows: int) -> list[Place]:
        """Rows of the codes, of every parameter and of every correction; what belongs to all rows goes with row 0."""
        grid, shape = find_grid(unit.grid), architecture.by_name[linear].shape
        owners = {parameter.name: parameter.slice(first_row, rows) for parameter in grid.parameters}
        found = []
        for name, dtype, stored in entry_header(grid, shape, unit.corrections)[1]:
            row = _nbytes(dtype, stored[1:])
            whole = name.endswith(SHARED) or (name in owners and stored[0] == 1 and shape[0] != 1)
            lines = slice(0, stored[0]) if whole else owners.get(name, slice(first_row, first_row + rows))
            if not whole or first_row == 0:
                found.append(Place(f"{linear}/{name}", lines.start * row, (lines.stop - lines.start) * row))
        return found


def carried_dtype(plan: Plan, checkpoint: Checkpoint, name: str, tensor: str) -> str:
    """The dtype in which a carried tensor is stored: the source's unless the plan names one."""
    return plan.carried[name] or checkpoint.spec(tensor).dtype


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype].size * math.prod(shape)


RULES = StateRules()
