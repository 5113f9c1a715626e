"""anyquant inspect: what a file holds."""

import json
from dataclasses import asdict

import click

from anyquant.cli.tables import print_contents


@click.command("inspect", short_help="What a checkpoint or artifact holds.")
@click.argument("path")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(path: str, tensors: bool, as_json: bool) -> None:
    """Show the family, types, sizes and metadata of PATH: a model folder, a GGUF file or an output folder.

    Only headers are read.
    """
    from anyquant import api
    from anyquant.pipeline.report import plain

    contents = api.inspect(path)
    if as_json:
        facts = {
            "location": contents.location,
            "kind": contents.kind,
            "family": contents.family,
            "weights": contents.weights,
            "bytes": contents.nbytes,
            "problem": contents.problem,
            "certificate": None if contents.certificate is None else contents.certificate.plain(),
            "tensors": [asdict(tensor) for tensor in contents.tensors],
            "metadata": {key: value for key, value in contents.metadata.items() if _plain(value)},
        }
        click.echo(json.dumps(plain(facts), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print_contents(contents, tensors)


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool | list | dict) or value is None
