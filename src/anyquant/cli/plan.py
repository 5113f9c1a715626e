"""anyquant plan: the dry run."""

import json
from dataclasses import asdict
from typing import Any

import click

from anyquant.cli.options import recipe_of, what_to_do, which_text
from anyquant.cli.tables import print_plan


@click.command("plan", short_help="Dry run: grids, exact bytes, memory, time.")
@click.argument("model")
@what_to_do
@which_text
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(model: str, as_json: bool, **flags: Any) -> None:
    """Decide everything for MODEL and write nothing.

    Bytes are exact, memory and time are estimates. What make would refuse at its start is refused here.
    """
    from anyquant import api
    from anyquant.pipeline.accounts import make_ledger

    job, cost = api.plan(
        model,
        target=flags["target"],
        recipe=recipe_of(flags),
        data_free=flags["data_free"],
        threads=flags["threads"],
    )
    ledger = make_ledger(job)
    if as_json:
        click.echo(
            json.dumps(
                {"label": job.plan.label, "bytes": job.layout.nbytes, **asdict(cost), **asdict(ledger)}, indent=1
            )
        )
    else:
        print_plan(job, cost, ledger)
