"""anyquant run: let an artifact speak."""

import math
from pathlib import Path

import click

from anyquant.cli.options import kv_cache


@click.command("run", short_help="Generate text with an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Most tokens to generate.")
@click.option(
    "--temperature", type=click.FloatRange(0.0, 100.0), metavar="X", default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of the sampling.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores to use (default: all).")
@kv_cache
def command(
    artifact: Path, prompt: str, tokens: int, temperature: float, seed: int, threads: int | None, kv_cache: str | None
) -> None:
    """Continue PROMPT with ARTIFACT, in the runtime it was made for, or by its decoded weights."""
    from anyquant import api
    from anyquant.pipeline.artifacts import stands_in

    if not math.isfinite(temperature):
        raise click.BadParameter("give a number", param_hint="--temperature")
    pieces = api.run(
        artifact, prompt, tokens=tokens, temperature=temperature, seed=seed, threads=threads, kv_cache=kv_cache
    )
    first = next(pieces, "")  # the artifact is open now: an error would have come before anything is shown
    if said := stands_in(artifact):
        click.echo(f"anyquant: {said}", err=True)
    click.echo(prompt + first, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
