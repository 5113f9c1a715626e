"""anyquant evaluate: measure an artifact against the original."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from anyquant.cli.options import TEXT_HELP
from anyquant.cli.progress import TerminalProgress
from anyquant.cli.tables import print_measures


@click.command("evaluate", short_help="Measure an artifact against the original.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="MODEL", help="The original checkpoint.")
@click.option("--text", type=click.Path(), metavar="PATH", help=f"{TEXT_HELP} (default: built-in text).")
@click.option("--text-field", metavar="NAME", default="text", show_default=True, help="Field of its records to take.")
@click.option(
    "--tokens", type=click.IntRange(2), metavar="N", help="Stop with the document that reaches N tokens (default: all)."
)
@click.option(
    "--context", type=click.IntRange(32), metavar="N", default=512, show_default=True, help="Tokens of a document."
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores to use (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print everything, each document too, as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    artifact: Path,
    against: str,
    text: str | None,
    text_field: str,
    tokens: int | None,
    context: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run ARTIFACT in its own runtime and compare its logits with the original's: KL, same top token, perplexity."""
    from anyquant import api
    from anyquant.pipeline.report import plain

    with TerminalProgress(quiet) as progress:
        measures = api.evaluate(
            artifact,
            against=against,
            text=text,
            text_field=text_field,
            tokens=tokens,
            context=context,
            threads=threads,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(plain(asdict(measures)), indent=1))
    else:
        print_measures(measures)
