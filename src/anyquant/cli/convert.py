"""anyquant convert: one quantized form into another."""

from pathlib import Path
from typing import Any

import click

from anyquant.calibrate.sources import LEAST_CONTEXT
from anyquant.cli.make import STATUS_CODES
from anyquant.cli.options import TEXT_HELP
from anyquant.cli.progress import TerminalProgress
from anyquant.cli.tables import print_report
from anyquant.pipeline.recipe import LEAST_TOKENS


@click.command("convert", short_help="One quantized form into another.")
@click.argument("source")
@click.option(
    "--for", "--to", "target", required=True, metavar="FORMAT", help="A target or a format, e.g. llama.cpp, vllm, gptq."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Output folder; must not exist.")
@click.option("--like", metavar="PATH", help="Of a GGUF file: the folder of the model that it was made from.")
@click.option("--grid", metavar="GRID", help="For all quantized matrices (default: what holds their codes).")
@click.option("--embedding", metavar="GRID", help="Grid of the embedding (default: as it is).")
@click.option("--head", metavar="GRID", help="Grid of the output head (default: as it is).")
@click.option("--text", type=click.Path(), metavar="PATH", help=f"{TEXT_HELP}: to measure on (default: built-in text).")
@click.option(
    "--tokens", type=click.IntRange(LEAST_TOKENS), metavar="N", help="Tokens of --text to read (default 65536)."
)
@click.option("--context", type=click.IntRange(LEAST_CONTEXT), metavar="N", help="Tokens of a document (default 512).")
@click.option("--data-free", is_flag=True, help="Read no text: written and verified, and nothing is measured.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores to use (default: all).")
@click.option("--force", is_flag=True, help="Replace an output that AnyQuant made.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(source: str, target: str, out: Path, force: bool, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Write SOURCE, a quantized Hugging Face folder or GGUF file, in another format, and prove it in its runtime.

    Codes are taken over where a grid of the format holds them: the ledger says of every matrix exact, rescaled (the
    same codes, scales rounded to the type that the format stores) or re-rounded, to --grid or the grid nearest in bits.
    What was made is compared with SOURCE as decoded.

    \b
    anyquant convert AWQ_FOLDER --for llama.cpp -o OUT
    anyquant convert model.gguf --like MODEL --for vllm -o OUT
    anyquant convert NF4_FOLDER --for gguf --grid q4_k -o OUT
    """
    from anyquant import api
    from anyquant.pipeline.report import render_json

    with TerminalProgress(quiet) as progress:
        report = api.convert(source, target=target, out=out, overwrite=force, progress=progress, **flags)
    if as_json:
        click.echo(render_json(report), nl=False)
    else:
        print_report(report, out)
    raise SystemExit(STATUS_CODES[report.status])
