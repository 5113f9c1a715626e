"""What a person reads on the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from anyquant.cli.terminal import one_line
from anyquant.core.ledger import Ledger
from anyquant.evaluation.bootstrap import ENOUGH_DOCUMENTS
from anyquant.evaluation.measures import Measures
from anyquant.formats.certificate import KEY, OBJECT
from anyquant.pipeline.artifacts import Contents
from anyquant.pipeline.certificate import Reproduction
from anyquant.pipeline.comparison import SHORT, Comparison, judged_on
from anyquant.pipeline.cost import Planned
from anyquant.pipeline.picture import human_bytes, kl_form
from anyquant.pipeline.planner import chain_of
from anyquant.pipeline.report import Report, summary_rows

STYLES = {
    "pass": "bold green",
    "fail": "bold red",
    "inconclusive": "bold yellow",
    "measured": "bold",
    "unmeasured": "dim",
}


def _console() -> Console:
    return Console(highlight=False)


def _text(value: str, style: str = "") -> Text:
    """Plain text: no markup, nothing that a terminal obeys."""
    return Text(one_line(value), style)


def _pairs(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(_text(name), _text(value))
    return table


def print_report(report: Report, out: Path) -> None:
    console = _console()
    headline = Text.assemble((f"{report.label} for {report.target}: ", "bold"), (report.status, STYLES[report.status]))
    console.print(headline)
    for sentence in report.sentences:
        console.print(_text(sentence))
    console.print(_pairs(summary_rows(report)[1:]))
    if len(report.points) > 1:
        console.print(_points(report))
    console.print(_text(f"{out / report.artifact}   report: {out / 'report.html'}", style="dim"))


def print_comparison(comparison: Comparison, out: Path) -> None:
    """A line for each target."""
    console = _console()
    title = f"{comparison.first.model} for {len(comparison.reports)} targets: "
    console.print(Text.assemble((one_line(title), "bold"), (comparison.status, STYLES[comparison.status])))
    for sentence in (*comparison.sentences, judged_on(comparison)):
        if sentence:
            console.print(_text(sentence))
    table = Table(box=None, header_style="dim")
    for name in SHORT:
        table.add_column(name, justify="left" if name in ("target", "verdict") else "right", no_wrap=True)
    for target, status, *cells in (row[: len(SHORT)] for row in comparison.rows()):
        table.add_row(_text(target), _text(status, STYLES[status]), *map(_text, cells))
    console.print(table)
    for target, report in comparison.reports.items():
        for sentence in report.sentences if report.status in ("fail", "inconclusive") else ():
            console.print(_text(f"{target}: {sentence}"))
        for warning in report.warnings:
            console.print(_text(f"{target}: warning: {warning}", "yellow"))
    places = [f"{out / target / report.artifact}" for target, report in comparison.reports.items()]
    console.print(_text(f"{'  '.join(places)}   report: {out / 'report.html'}", "dim"))


def _points(report: Report) -> Table:
    table = Table(title="measured on the way", title_justify="left", title_style="dim", box=None, header_style="dim")
    table.add_column("what")
    for name in ("bytes", "mean KL", "95 % interval"):
        table.add_column(name, justify="right")
    table.add_column("text")
    for point in report.points:
        style = "bold" if point.chosen else ""
        table.add_row(point.label, f"{point.nbytes:,}", *point.shown, point.text, style=style)
    return table


def print_plan(planned: Planned, ledger: Ledger) -> None:
    console = _console()
    job, cost = planned.job, planned.cost
    table = Table(box=None, header_style="dim")
    table.add_column("tensor", no_wrap=True)
    table.add_column("source", no_wrap=True)
    table.add_column("grid", no_wrap=True)
    several = len({line.algorithm for line in ledger.lines if line.algorithm != "carried"}) > 1
    if several:
        table.add_column("algorithm")
    table.add_column("bytes", justify="right")
    table.add_column("why")
    for line in ledger.lines:
        chain = [_text(line.algorithm)] if several else []
        table.add_row(line.name, line.source_dtype, line.applied, *chain, f"{line.target_bytes:,}", _text(line.reason))
    for name, nbytes, why in ledger.unused:
        table.add_row(_text(name), "", "unused", *[""] * several, f"{nbytes:,}", _text(why))
    console.print(table)
    source = sum(line.source_bytes for line in ledger.lines)
    exactly = "exactly" if not planned.refusal else "of tensors exactly, without what the format adds"
    console.print(
        _pairs(
            [
                ("plan", f"{job.plan.label} as {job.format.name}"),
                ("algorithm", chain_of(job)),
                *([("activations", job.recipe.activations)] if job.recipe.activations else []),
                ("size", f"{cost.disk:,} bytes {exactly} ({human_bytes(cost.disk)}); source {human_bytes(source)}"),
                ("bits per weight", f"{8 * cost.disk / job.weights:.3f}"),
                ("memory", f"about {human_bytes(cost.memory)} at the peak"),
                ("time", f"about {cost.seconds:.0f} s to calibrate, quantize and verify, without measuring"),
            ]
        )
    )


def print_contents(contents: Contents, tensors: bool) -> None:
    console = _console()
    rows = [
        ("path", contents.location),
        ("kind", contents.kind),
        ("family", contents.family + (f" (not a source for make: {contents.problem})" if contents.problem else "")),
        ("weights", f"{contents.weights:,}"),
        ("bytes", f"{contents.nbytes:,} ({human_bytes(contents.nbytes)})"),
    ]
    if contents.tied is not None:
        rows.append(("head", "tied to the embedding" if contents.tied else "of its own"))
    if contents.certificate is not None:
        rows.append(("certificate", contents.certificate.sentence()))
    console.print(_pairs(rows))
    table = Table(box=None, header_style="dim")
    for name in ("type", "tensors", "bytes"):
        table.add_column(name, justify="left" if name == "type" else "right")
    for name, count, nbytes in contents.types():
        table.add_row(name, str(count), f"{nbytes:,}")
    console.print(table)
    if tensors:
        _print_tensors(console, contents)
    else:
        _print_metadata(console, contents)


def _print_tensors(console: Console, contents: Contents) -> None:
    table = Table(box=None, header_style="dim")
    for name in ("tensor", "type", "shape", "bytes"):
        table.add_column(name, no_wrap=True, justify="right" if name == "bytes" else "left")
    for tensor in contents.tensors:
        table.add_row(_text(tensor.name), tensor.dtype, " x ".join(map(str, tensor.shape)), f"{tensor.nbytes:,}")
    console.print(table)


def _print_metadata(console: Console, contents: Contents) -> None:
    rows = []
    for key, value in contents.metadata.items():
        if contents.certificate is not None and (key == OBJECT or key.startswith(KEY)):
            continue  # said above
        short = isinstance(value, str | int | float | bool) or value is None
        text = " ".join(str(value).split()) if short else f"{len(value)} values" if hasattr(value, "__len__") else "?"
        rows.append((key, text if len(text) <= 80 else text[:77] + "..."))
    console.print(_pairs(rows))


def _range(low: float, high: float, form: str) -> str:
    """A 95 % interval in brackets; nothing where one document allows none."""
    return f" ({format(low, form)} to {format(high, form)})" if low == low and high == high else ""


def print_reproduction(found: Reproduction) -> None:
    """The measures, then whether they are those of the certificate."""
    if found.measures is not None:
        print_measures(found.measures)
    console = _console()
    console.print(_pairs([("certificate", found.certificate.sentence())]))
    for what in found.unchecked:
        console.print(_text(f"not compared: {what}", "dim"))
    if found.reproduced:
        console.print(_text("reproduced: the certificate says what was measured again", STYLES["pass"]))
        return
    console.print(_text("not reproduced:", STYLES["fail"]))
    for difference in found.differences:
        console.print(_text(f"  {difference}"))


def print_measures(measures: Measures) -> None:
    kl, top, ratio = measures.mean_kl, measures.same_top, measures.ppl_ratio
    tail = "" if measures.kl_99_9_certified else " (too few tokens to certify)"
    change = _range(ratio.interval[0] - 1, ratio.interval[1] - 1, "+.2%")
    noun = "document" if measures.documents == 1 else "documents"
    form = kl_form(kl.value)
    rows = [
        ("text", f"{measures.documents} {noun}, {measures.tokens:,} tokens"),
        ("mean KL", f"{kl.value:{form}} nats{_range(*kl.interval, form)}"),
        ("99.9 % KL", f"{measures.kl_99_9:.4f} nats{tail}"),
        ("same top token", f"{top.value:.2%}{_range(*top.interval, '.2%')}"),
        ("perplexity", f"{measures.ppl_candidate:.3f}, original {measures.ppl_reference:.3f}"),
        ("increase", f"{ratio.value - 1:+.2%}{change}"),
    ]
    if measures.nonfinite:
        rows.append(("not finite", f"{measures.nonfinite} positions, first in {measures.nonfinite_document}"))
    console = _console()
    console.print(_pairs(rows))
    console.print(_text("In brackets: 95 % intervals, from the spread between documents."))
    if measures.nonfinite:
        console.print(_text("Values that are not finite: no verdict may rest on this."))
    elif not measures.conclusive:
        console.print(_text(f"Fewer than {ENOUGH_DOCUMENTS} documents: no verdict may rest on this."))
