"""anyquant plan: the dry run."""

import json
from dataclasses import asdict
from typing import Any

import click

from anyquant.cli.options import recipe_of, what_to_do, which_text
from anyquant.cli.tables import print_plan
from anyquant.core.errors import UnsupportedError


@click.command("plan", short_help="Dry run: grids, exact bytes, memory, time.")
@click.argument("model")
@what_to_do
@which_text
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(model: str, as_json: bool, **flags: Any) -> None:
    """Decide everything for MODEL and write nothing.

    Bytes are exact, memory and time are estimates. What make would refuse at its start is refused here, with its exit
    code; a sound plan that the target cannot hold yet is printed first, with the bytes of its tensors alone.
    """
    from anyquant import api
    from anyquant.pipeline.accounts import make_ledger

    planned = api.plan(
        model, target=flags["target"], adapter=flags["adapter"], recipe=recipe_of(flags), threads=flags["threads"]
    )
    job = planned.job
    ledger = make_ledger(job)
    if as_json:
        facts = {"label": job.plan.label, "format": job.format.name, "bytes": job.layout.nbytes}
        facts |= {"refusal": planned.refusal, **asdict(planned.cost), **asdict(ledger)}
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        print_plan(planned, ledger)
    if planned.refusal:
        raise UnsupportedError(planned.refusal)
