"""anyquant sensitivity: which parts of a model must be kept fine."""

import json
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anyquant.cli.options import TEXT_HELP
from anyquant.cli.progress import TerminalProgress
from anyquant.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    from anyquant.pipeline.sensitivity import Sensitivity

SHADES = " ░▒▓█"
MOST_COLUMNS = 16  # blocks in a row of the terminal; of more, the worst of neighbours is shown


@click.command("sensitivity", short_help="What each part of a model loses on each grid.")
@click.argument("model")
@click.option("--for", "target", metavar="TARGET", help="Whose grids are candidates: llama.cpp, vllm, mlx and others.")
@click.option("--candidates", metavar="A,B,C", help="The grids to consider (default: those of the target).")
@click.option(
    "--method",
    type=click.Choice(["gradient", "forward"]),
    default="gradient",
    help="forward needs less memory and tells less.",
)
@click.option("--show", metavar="GRID", help="The grid of the map (default: one of some four bits).")
@click.option("--text", type=click.Path(), metavar="PATH", help=f"{TEXT_HELP} (default: built-in text).")
@click.option("--tokens", type=click.IntRange(256), metavar="N", help="Most calibration tokens (default 65536).")
@click.option("--context", type=click.IntRange(32), metavar="N", help="Tokens of a document (default 512).")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Keep the result, or use what is there.")
@click.option("--html", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Draw a page; replaces FILE.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores to use (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(model: str, as_json: bool, quiet: bool, html: Path | None, show: str | None, **flags: Any) -> None:
    """Estimate what each part of MODEL loses on each grid: KL divergence from the original, in nats per token.

    \b
    anyquant sensitivity PATH --for llama.cpp --save sensitivity.json
    anyquant sensitivity PATH --for llama.cpp --text mine.txt -o sensitivity.html
    """
    from anyquant import api
    from anyquant.pipeline.heat import page, shown_grid
    from anyquant.store.system import writing

    names = flags.pop("candidates")
    candidates = () if names is None else tuple(name.strip() for name in names.split(",") if name.strip())
    if names is not None and not candidates:
        raise UsageError("--candidates names no grid; write e.g. q3_k,q4_k,q6_k")
    if html is not None and not html.parent.is_dir():
        raise OutputError(f"{html}: there is no folder {html.parent}; make it first")
    with TerminalProgress(quiet) as progress:
        found = api.sensitivity(model, candidates=candidates, show=show, progress=progress, **flags)
    grid = shown_grid(found) if show is None else show
    if html is not None:
        with writing(html):
            html.write_text(page(found, Path(model).name or model, grid), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1, ensure_ascii=False))
    else:
        print_sensitivity(found, grid)


def print_sensitivity(found: "Sensitivity", grid: str) -> None:
    """The map in shades, and the parts that lose most."""
    from rich.console import Console
    from rich.table import Table

    from anyquant.pipeline.heat import cost_of, most_sensitive, rows_of, shades
    from anyquant.pipeline.picture import human_bytes

    console = Console(highlight=False)
    console.print(cost_of(found), style="dim")
    columns, rows = rows_of(found, grid)
    depth = iter(shades([loss for row in rows for loss in row.losses]))
    step = -(-len(columns) // MOST_COLUMNS)
    console.print(f"\nloss on {grid}, blocks {columns[0]} to the right; darker is more", style="bold")
    for row in rows:
        own = [next(depth) for _ in row.losses]
        merged = [max(own[start : start + step]) for start in range(0, len(own), step)]
        total = sum(loss for loss in row.losses if loss is not None)
        marks = "".join(2 * SHADES[ceil(shade * (len(SHADES) - 1))] for shade in merged)
        console.print(f"{row.role:>12}  {marks}  {total:.5f}", markup=False)
    table = Table(box=None, header_style="dim", title=f"most sensitive on {grid}", title_justify="left")
    table.add_column("part", no_wrap=True)
    for name in ("nats per token", "standard error", "bytes"):
        table.add_column(name, justify="right")
    for portion in most_sensitive(found, grid):
        cell = portion.cell(grid)
        table.add_row(portion.name, f"{cell.loss:.2e}", f"{cell.error:.1e}", human_bytes(cell.nbytes))
    console.print(table)
