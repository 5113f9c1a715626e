"""Sensitivities as a picture: layers by roles, one self-contained page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from anyquant.pipeline.picture import human_bytes
from anyquant.pipeline.sensitivity import Portion, Sensitivity

MOST = 12  # of the most sensitive parts are listed
TYPICAL = 4.5  # bits per weight: the grid nearest to it is shown

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --ink: #1b1f24; --soft: #5b6570; --paper: #fbfbf9; --card: #fff; --line: #e3e4df; --mark: #2f5d8a; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e7e9ea; --soft: #9aa4ad; --paper: #14171a; --card: #1c2024;
  --line: #30363b; --mark: #7db1e3; }} }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .25rem; }} h2 {{ font-size: 1.1rem; margin: 2.5rem 0 .75rem; }}
.soft {{ color: var(--soft); }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.25rem; }}
.card {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
td, th {{ text-align: right; padding: .32rem 0 .32rem .9rem; border-bottom: 1px solid var(--line); }}
td, th {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; padding-left: 0; }}
th {{ color: var(--soft); font-weight: 500; }}
tr:last-child > * {{ border-bottom: 0; }} details summary {{ cursor: pointer; color: var(--soft); margin-top: 1rem; }}
svg {{ width: 100%; height: auto; display: block; }} svg text {{ fill: var(--soft); font-size: 12px; }}
.tick, .axis {{ text-anchor: middle; }} .tick.right {{ text-anchor: end; }} .cell {{ fill: var(--mark); }}
</style></head>
<body><main>
<h1>Sensitivity of {title}</h1>
<p class="soft">{cost}</p>
<h2>What {grid} costs: nats per token, darker is more</h2>
<div class="card">{picture}</div>
<h2>Most sensitive at {grid}</h2>
<div class="card">{most}</div>
{others}
</main></body></html>
"""


@dataclass(frozen=True)
class Row:
    """A role over the blocks: the losses by block, None where it has no such part. Experts of a block are summed."""

    role: str
    losses: tuple[float | None, ...]


def shown_grid(found: Sensitivity) -> str:
    """The candidate of some four bits, which most parts have."""
    bits: dict[str, list[float]] = {}
    for portion in found.portions:
        for cell in portion.cells:
            if cell.grid != portion.stored:
                bits.setdefault(cell.grid, []).append(8 * cell.nbytes / portion.weights)
    common = max(map(len, bits.values()))
    known = {grid: sum(own) / len(own) for grid, own in bits.items() if 2 * len(own) >= common}
    return min(known, key=lambda grid: abs(known[grid] - TYPICAL))


def rows_of(found: Sensitivity, grid: str) -> tuple[tuple[int | None, ...], tuple[Row, ...]]:
    """The blocks, None for what lies outside of them, and the roles."""
    blocks = sorted({one.block for one in found.portions if one.block is not None})
    columns: tuple[int | None, ...] = (*blocks, *((None,) if any(one.block is None for one in found.portions) else ()))
    sums: dict[tuple[str, int | None], float] = {}
    for portion in found.portions:
        loss = _loss(portion, grid)
        if loss is not None:
            sums[portion.role, portion.block] = sums.get((portion.role, portion.block), 0.0) + loss
    roles = dict.fromkeys(portion.role for portion in found.portions)
    return columns, tuple(Row(role, tuple(sums.get((role, block)) for block in columns)) for role in roles)


def most_sensitive(found: Sensitivity, grid: str, count: int = MOST) -> list[Portion]:
    """The parts that lose most on `grid`, the worst first."""
    able = [portion for portion in found.portions if _loss(portion, grid) is not None]
    return sorted(able, key=lambda portion: -portion.cell(grid).loss)[:count]


def shades(losses: Sequence[float | None]) -> list[float]:
    """0 to 1 by the logarithm, over three decades at most; 0 for None and what loses nothing."""
    positive = [loss for loss in losses if loss is not None and loss > 0] or [1.0]
    high = math.log(max(positive))
    low = max(math.log(min(positive)), high - math.log(1000))
    return [
        0.0 if loss is None or loss <= 0 else 0.1 + 0.9 * max(0.0, (math.log(loss) - low) / ((high - low) or 1.0))
        for loss in losses
    ]


def heat_map(found: Sensitivity, grid: str) -> str:
    """An SVG of the losses on `grid`: blocks to the right, roles downwards."""
    columns, rows = rows_of(found, grid)
    depth = iter(shades([loss for row in rows for loss in row.losses]))
    width, left = min(64.0, 620.0 / len(columns)), 16 + 7 * max(len(row.role) for row in rows)
    marks = []
    for index, row in enumerate(rows):
        y = index * 26
        marks.append(f'<text class="tick right" x="{left - 8}" y="{y + 18}">{escape(row.role)}</text>')
        for place, loss in enumerate(row.losses):
            shade, where = next(depth), "outside" if columns[place] is None else f"block {columns[place]}"
            if loss is None:
                continue
            marks.append(
                f'<rect class="cell" x="{left + place * width:.1f}" y="{y}" width="{width - 2:.1f}" height="24" '
                f'fill-opacity="{shade:.2f}"><title>{where}, {escape(row.role)}: {loss:.2e} nats</title></rect>'
            )
    bottom, step = len(rows) * 26, max(1, len(columns) // 12)
    for place in range(0, len(columns), step):
        label = "" if columns[place] is None else columns[place]
        marks.append(f'<text class="tick" x="{left + (place + 0.5) * width:.1f}" y="{bottom + 16}">{label}</text>')
    marks.append(f'<text class="axis" x="{left + len(columns) * width / 2:.1f}" y="{bottom + 36}">block</text>')
    total = left + 4 + len(columns) * width
    size = f'viewBox="0 0 {total:.0f} {bottom + 44}" style="max-width: {total:.0f}px"'
    return f'<svg {size} role="img" aria-label="sensitivity of layers and roles">{"".join(marks)}</svg>'


def cost_of(found: Sensitivity) -> str:
    """One sentence on where the figures come from."""
    way = "gradients" if found.method == "gradient" else "passes forward alone"
    documents = "1 document" if found.documents == 1 else f"{found.documents} documents"
    return (
        f"Estimated by {way} on {documents} ({found.tokens:,} tokens), at the cost of {found.forwards:g} passes of the "
        "select text through the model."
    )


def page(found: Sensitivity, title: str, grid: str) -> str:
    """A self-contained page; the maps of all other grids are folded away."""
    others = [
        f"<details><summary>{escape(other)}</summary>{heat_map(found, other)}</details>"
        for other in found.grids
        if other != grid and most_sensitive(found, other)
    ]
    return _PAGE.format(
        title=escape(title),
        cost=escape(cost_of(found)),
        grid=escape(grid),
        picture=heat_map(found, grid),
        most=_table(found, grid),
        others="\n".join(others),
    )


def _table(found: Sensitivity, grid: str) -> str:
    lines = ["<tr><th>part</th><th>nats per token</th><th>standard error</th><th>size</th></tr>"]
    for portion in most_sensitive(found, grid):
        cell = portion.cell(grid)
        lines.append(
            f"<tr><td>{escape(portion.name)}</td><td>{cell.loss:.2e}</td><td>{cell.error:.1e}</td>"
            f"<td>{human_bytes(cell.nbytes)}</td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _loss(portion: Portion, grid: str) -> float | None:
    return next((cell.loss for cell in portion.cells if cell.grid == grid and grid != portion.stored), None)
