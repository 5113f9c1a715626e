"""What was made of one model for several targets, side by side: JSON, Markdown and one HTML page."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from anyquant.evaluation.limits import QUALITIES
from anyquant.pipeline.picture import Point, kl_form, size_and_loss
from anyquant.pipeline.report import (
    SCHEMA,
    Report,
    encodable,
    markdown_table,
    markdown_text,
    strict_json,
    template,
)

WORST_FIRST = ("fail", "inconclusive", "unmeasured", "measured", "pass")
SHORT = ("target", "verdict", "bytes", "bits/weight", "mean KL", "95 % interval")
HEAD = (*SHORT, "same top token", "perplexity", "conversion error", "proof")


@dataclass(frozen=True)
class Comparison:
    """Reports by target, in the order in which the targets were named. `sentences`: what was found of them together.

    Each report has its artifact in the folder of its target.
    """

    reports: Mapping[str, Report]
    sentences: tuple[str, ...] = ()

    @property
    def first(self) -> Report:
        """For what they have in common: model, text, contract."""
        return next(iter(self.reports.values()))

    @property
    def status(self) -> str:
        """The worst of all."""
        return min((report.status for report in self.reports.values()), key=WORST_FIRST.index)

    def rows(self) -> list[tuple[str, ...]]:
        """A row per target, as `HEAD` says; its beginning is what `SHORT` says."""
        return [_row(target, report) for target, report in self.reports.items()]

    def points(self) -> list[Point]:
        """Of the delivered artifacts, named by target."""
        return [
            replace(point, label=target)
            for target, report in self.reports.items()
            for point in report.points
            if point.chosen
        ]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; all else is in the reports of the targets."""
        return {
            "schema": SCHEMA,
            "model": self.first.model,
            "status": self.status,
            "sentences": list(self.sentences),
            "contract": dict(self.first.contract),
            "data": dict(self.first.data),
            "targets": {target: _facts(target, report) for target, report in self.reports.items()},
        }


def _facts(target: str, report: Report) -> dict[str, Any]:
    """What the report of a target is compared by."""
    loss = report.loss
    return {
        "report": f"{target}/report.json",
        "artifact": f"{target}/{report.artifact}".rstrip("/"),
        "label": report.label,
        "status": report.status,
        "nbytes": report.nbytes,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "mean_kl": None if loss is None else loss.mean_kl,
        "same_top": None if loss is None else loss.same_top,
        "perplexity": None if loss is None else loss.perplexity,
        "conversion_error": None if report.conversion is None else report.conversion.mean_kl,
        "proof": report.proof,
    }


def _row(target: str, report: Report) -> tuple[str, ...]:
    loss, conversion = report.loss, report.conversion
    measured = ("not measured", "", "", "")
    if loss is not None:
        form = kl_form(loss.mean_kl[0])
        value, low, high = (format(one, form) for one in loss.mean_kl)
        measured = (value, f"{low} to {high}", f"{loss.same_top[0]:.2%}", f"{loss.perplexity:.3f}")
    return (
        target,
        report.status,
        f"{report.nbytes:,}",
        f"{report.bits_per_weight:.2f}",
        *measured,
        "" if conversion is None else f"{conversion.mean_kl:.1e}",
        re.split("[:,]", report.proof)[0],
    )


def judged_on(comparison: Comparison) -> str:
    """The text that all were judged on, in words; "" where nothing was measured."""
    loss, text = comparison.first.loss, comparison.first.data.get("text", "")
    return "" if loss is None else f"Judged on {loss.documents} documents, {loss.tokens:,} tokens of {text}."


def render_comparison(comparison: Comparison) -> Mapping[str, str]:
    """Content by file name."""
    return {
        "report.json": strict_json(comparison.as_dict()),
        "report.md": _markdown(comparison),
        "report.html": _page(comparison),
    }


def _markdown(comparison: Comparison) -> str:
    targets = ", ".join(comparison.reports)
    lines = [f"# {markdown_text(comparison.first.model)} for {markdown_text(targets)}: {comparison.status}", ""]
    lines += [f"- {markdown_text(sentence)}" for sentence in (*comparison.sentences, judged_on(comparison)) if sentence]
    lines += ["", *markdown_table(HEAD, comparison.rows()), ""]
    lines += [f"- {target}: [report]({target}/report.md)" for target in comparison.reports]
    return encodable("\n".join(lines) + "\n")


def _page(comparison: Comparison) -> str:
    first = comparison.first
    picture = size_and_loss(comparison.points(), first.limit, QUALITIES, first.source_bytes)
    page: str = template("comparison.html").render(
        comparison=comparison, head=HEAD, picture=picture, judged=judged_on(comparison)
    )
    return encodable(page)
