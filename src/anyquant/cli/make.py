"""anyquant make: the main job."""

from pathlib import Path
from typing import Any

import click

from anyquant.cli.options import bytes_of, contract_of, how_good, recipe_of, targets_of, what_to_do, which_text
from anyquant.cli.progress import TerminalProgress
from anyquant.cli.tables import print_comparison, print_report
from anyquant.core.errors import ContractFailedError, InconclusiveError

STATUS_CODES = {
    "pass": 0,
    "measured": 0,
    "unmeasured": 0,
    "fail": ContractFailedError.exit_code,
    "inconclusive": InconclusiveError.exit_code,
}


@click.command("make", short_help="Quantize, prove, publish.")
@click.argument("model")
@what_to_do
@how_good
@which_text
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Output folder; must not exist.")
@click.option("--keep-imatrix", is_flag=True, help="Put the importance into OUT as llama.cpp's imatrix.gguf.")
@click.option("--ram", metavar="SIZE", help="Memory for activations, e.g. 8GB; what is more goes to disk.")
@click.option("--force", is_flag=True, help="Replace an output that AnyQuant made.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(model: str, out: Path, force: bool, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Quantize MODEL for a target, prove it in the runtime, publish it with a report.

    MODEL is a local Hugging Face folder with safetensors, or "demo". Without --preset, --grid or --recipe, limits
    decide: the smallest mixture of grids within them is found, or the best within --max-size. Without limits, too, the
    target's default preset is made. Several targets: each in a folder of its own, compared in one report.

    \b
    anyquant make PATH --for llama.cpp --quality balanced -o OUT
    anyquant make PATH --for llama.cpp --max-size 4.0bpw --text mine.txt -o OUT
    anyquant make PATH --for llama.cpp --preset Q4_K_M --text mine.txt -o OUT
    anyquant make PATH --for vllm --grid int4-g128 -o OUT
    anyquant make PATH --for vllm,mlx,llama.cpp --quality balanced -o OUT      (OUT/vllm, OUT/mlx, OUT/llama.cpp)
    anyquant make PATH --adapter LORA --for llama.cpp --preset Q4_K_M -o OUT
    anyquant make PATH --for llama.cpp --grid q3_k --algorithm gptq -o OUT
    anyquant make PATH --grid int4-g128 --algorithm "awq -> gptq" -o STATE     (the neutral state, for later formats)
    """
    from anyquant import api
    from anyquant.pipeline.report import strict_json

    with TerminalProgress(quiet) as progress:
        report = api.make(
            model,
            out=out,
            target=targets_of(flags["target"]),
            adapter=flags["adapter"],
            quality=flags["quality"],
            contract=contract_of(flags),
            recipe=recipe_of(flags),
            overwrite=force,
            threads=flags["threads"],
            memory=bytes_of(flags["ram"]),
            budget=flags["budget"],
            sensitivity=flags["sensitivity"],
            progress=progress,
        )
    if as_json:
        click.echo(strict_json(report.as_dict()), nl=False)
    elif isinstance(report, api.Comparison):
        print_comparison(report, out)
    else:
        print_report(report, out)
    raise SystemExit(STATUS_CODES[report.status])
