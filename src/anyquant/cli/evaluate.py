"""anyquant evaluate: measure an artifact against the original."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from anyquant.cli.options import TEXT_HELP, adapter, kv_cache
from anyquant.cli.progress import TerminalProgress
from anyquant.cli.tables import print_measures, print_reproduction
from anyquant.core.errors import ContractFailedError, UsageError

# flags that say how to measure, which a certificate says itself
_ITS_OWN = ("text_field", "tokens", "context", "kv_cache")


@click.command("evaluate", short_help="Measure an artifact against the original.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--against", required=True, metavar="MODEL", help="The original checkpoint.")
@click.option(
    "--certificate/--no-certificate",
    default=None,
    help="Measure as the certificate of ARTIFACT says, and compare (default: when it has one and no text is named).",
)
@click.option("--text", type=click.Path(), metavar="PATH", help=f"{TEXT_HELP} (default: built-in text).")
@click.option("--text-field", metavar="NAME", help="Field of its records to take (default: text).")
@click.option(
    "--tokens", type=click.IntRange(2), metavar="N", help="Stop with the document that reaches N tokens (default: all)."
)
@click.option("--context", type=click.IntRange(32), metavar="N", help="Tokens of a document (default: 512).")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Cores to use (default: all).")
@adapter
@kv_cache
@click.option("--json", "as_json", is_flag=True, help="Print everything, each document too, as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(artifact: Path, against: str, certificate: bool | None, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Run ARTIFACT in its own runtime and compare its logits with the original's: KL, same top token, perplexity.

    An artifact that carries a certificate is measured on the text that it was certified on, and exits 3 when the
    figures are not those of the certificate. Name a text, or give --no-certificate, to measure on another one.
    """
    from anyquant import api
    from anyquant.pipeline.artifacts import reproducible, uncompared

    given = [name for name in _ITS_OWN if flags[name] is not None]
    if certificate and given:
        raise UsageError(f"--certificate says itself how it was measured; leave out --{given[0].replace('_', '-')}")
    if certificate is None:
        certificate = not given and flags["text"] is None and reproducible(artifact)
    if certificate:
        _reproduce(artifact, against, flags, as_json, quiet)
        return
    for warning in uncompared(artifact):
        click.echo(f"anyquant: {warning}", err=True)
    with TerminalProgress(quiet) as progress:
        measures = api.evaluate(
            artifact,
            against=against,
            text=flags["text"],
            text_field=flags["text_field"] or api.Calibration().field,
            tokens=flags["tokens"],
            context=flags["context"] or api.Calibration().context,
            threads=flags["threads"],
            kv_cache=flags["kv_cache"],
            adapter=flags["adapter"],
            progress=progress,
        )
    if as_json:
        _print_json(asdict(measures))
    else:
        print_measures(measures)


def _reproduce(artifact: Path, against: str, flags: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Exits 3 when the certificate is not reproduced."""
    from anyquant import api

    with TerminalProgress(quiet) as progress:
        found = api.reproduce(
            artifact,
            against=against,
            text=flags["text"],
            threads=flags["threads"],
            adapter=flags["adapter"],
            progress=progress,
        )
    if as_json:
        facts = {"reproduced": found.reproduced, "differences": found.differences, "unchecked": found.unchecked}
        facts["certificate"] = found.certificate.plain()
        _print_json({**({} if found.measures is None else asdict(found.measures)), **facts})
    else:
        print_reproduction(found)
    if not found.reproduced:
        raise SystemExit(ContractFailedError.exit_code)


def _print_json(facts: dict[str, Any]) -> None:
    from anyquant.pipeline.report import plain

    click.echo(json.dumps(plain(facts), indent=1))
