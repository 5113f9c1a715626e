"""Report: what was asked, what was done to every byte, and what was measured. JSON, Markdown and one HTML page."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any

from anyquant.core.extras import require
from anyquant.core.ledger import Ledger
from anyquant.evaluation.limits import QUALITIES
from anyquant.evaluation.verdict import LimitResult
from anyquant.pipeline.deployment import Deployment
from anyquant.pipeline.picture import Point, error_map, human_bytes, kl_form, size_and_loss

SCHEMA = 1
ORIGINAL, DECODED = "original", "source as decoded"  # what an artifact is measured against


@dataclass(frozen=True)
class Loss:
    """Measured against the original on one split of the text: a value with its 95 % interval each.

    `mean_kl` in nats per token, `same_top` and `perplexity_increase` as fractions.
    """

    split: str
    documents: int
    tokens: int
    mean_kl: tuple[float, float, float]
    kl_99_9: float
    same_top: tuple[float, float, float]
    perplexity: float
    reference_perplexity: float
    perplexity_increase: tuple[float, float, float]


@dataclass(frozen=True)
class Conversion:
    """The runtime's logits against `transformers` running the weights decoded from the artifact's own bytes.

    Where the runtime rounds activations, `mean_kl` is that of the artifact's float32 twin, and `arithmetic` what the
    rounding adds: the mean KL of the artifact itself.
    """

    documents: int
    tokens: int
    mean_kl: float
    limit: float
    tokens_equal: bool
    arithmetic: float | None = None

    def with_limit(self, limit: float) -> "Conversion":
        """The same, judged against `limit`."""
        return replace(self, limit=limit)


@dataclass(frozen=True)
class Report:
    """Everything a person or a machine may ask about an artifact. Plain data.

    `chain` is what was done to the matrices, as one writes it. `notes` say matrix by matrix what was decided on the way
    or did not go as usual. `deployment` is how to run it. `limits` are those of the contract, each with its
    evidence. `proof` says whether a runtime confirmed what the bytes mean, or only their schema. `frontier`: (bytes,
    mean KL) that a search expects of the best mixtures of other sizes. `reference`: what it was measured against.
    """

    anyquant: str
    model: str
    family: str
    target: str
    label: str
    chain: str
    artifact: str
    nbytes: int
    source_bytes: int
    weights: int
    status: str
    sentences: tuple[str, ...]
    contract: Mapping[str, Any]
    loss: Loss | None
    conversion: Conversion | None
    speed: Mapping[str, float]
    points: tuple[Point, ...]
    ledger: Ledger
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    hashes: Mapping[str, str]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    peak_memory: int
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    deployment: Deployment | None = None
    limits: tuple[LimitResult, ...] = ()
    proof: str = ""
    frontier: tuple[tuple[int, float], ...] = ()
    reference: str = ORIGINAL

    @property
    def bits_per_weight(self) -> float:
        """Bits of the artifact's files per weight of the model's Linears, as `--max-size 4.5bpw` counts them."""
        return 8 * self.nbytes / self.weights

    @property
    def mean_kl(self) -> float | None:
        """Measured mean KL in nats per token on the *certify* text, None when nothing was measured."""
        return None if self.loss is None else self.loss.mean_kl[0]

    @property
    def limit(self) -> float | None:
        value = self.contract.get("max_kl")
        return None if value is None else float(value)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"schema": SCHEMA, "bits_per_weight": round(self.bits_per_weight, 4), **asdict(self)}

    def grids(self) -> list[tuple[str, int, int, int]]:
        """(grid, tensors, source bytes, target bytes) over the ledger, largest first."""
        table: dict[str, list[int]] = {}
        for line in self.ledger.lines:
            row = table.setdefault(line.applied, [0, 0, 0])
            row[0] += 1
            row[1] += line.source_bytes
            row[2] += line.target_bytes
        return sorted(((name, *row) for name, row in table.items()), key=lambda row: -row[3])  # type: ignore[misc]

    def pictures(self) -> Mapping[str, str]:
        """SVG by name; empty strings where there is nothing to draw."""
        cells = [
            (int(line.name.split(".")[1]), line.role, line.error, line.applied)
            for line in self.ledger.lines
            if line.error is not None and line.name.startswith("blocks.") and ".experts." not in line.name
        ]
        picture = size_and_loss(self.points, self.limit, QUALITIES, self.source_bytes, self.frontier)
        return {"size": picture, "errors": error_map(cells)}


@cache
def _environment() -> Any:
    """Templates escape everything by default: names inside a checkpoint are not ours."""
    jinja2 = require("jinja2")
    folder = files("anyquant.pipeline") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = human_bytes
    return environment


def template(name: str) -> Any:
    """A page's template; it may include others of the folder."""
    return _environment().get_template(name)


def render_html(report: Report) -> str:
    """One page, nothing loaded from anywhere."""
    provenance = {
        name: getattr(report, name) for name in ("contract", "recipe", "data", "versions", "hashes", "anyquant")
    }
    page: str = template("report.html").render(
        report=report,
        pictures=report.pictures(),
        rows=summary_rows(report),
        deployment=() if report.deployment is None else deployment_rows(report.deployment),
        provenance=json.dumps(plain(provenance), indent=1, ensure_ascii=False),
    )
    return encodable(page)


def markdown_text(text: object) -> str:
    """Text that Markdown shows as it is: names inside a checkpoint may look like tags, links and table borders."""
    flat = " ".join(str(text).splitlines()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`\[\]])", r"\\\1", flat)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Its lines."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" for _ in head) + "|",
        *("| " + " | ".join(markdown_text(cell) for cell in row) + " |" for row in rows),
    ]


def _interval(value: tuple[float, float, float], scale: float = 1.0, form: str = ".5f") -> str:
    """A value with its interval, times `scale`."""
    middle, low, high = (format(v * scale, form) for v in value)
    return f"{middle} ({low} to {high})"


def _options_of(recipe: Mapping[str, Any]) -> str:
    """The options and activations that a recipe names."""
    given = ", ".join(f"{name}={value}" for name, value in (recipe.get("options") or {}).items())
    activations = recipe.get("activations")
    return f"{given and f' ({given})'}{(activations and f'; activations rounded to {activations}') or ''}"


def summary_rows(report: Report) -> list[tuple[str, str]]:
    """The figures a person reads first, in words."""
    saved = 1 - report.nbytes / report.source_bytes
    change = f"{abs(saved):.0%} {'smaller' if saved > 0 else 'larger'}" if abs(saved) >= 0.005 else "as large as before"
    rows = [
        ("verdict", report.status),
        ("artifact", report.artifact or "the whole folder"),
        ("algorithm", report.chain + _options_of(report.recipe)),
        ("size", f"{report.nbytes:,} bytes, {report.bits_per_weight:.2f} bits per weight, {change}"),
    ]
    if report.loss is not None:
        loss = report.loss
        change = _interval(loss.perplexity_increase, 100, "+.2f")
        text = report.data.get("text", "")
        rows += [
            ("judged on", f"{loss.documents} documents, {loss.tokens:,} tokens of {text}; in brackets 95 % intervals"),
            ("mean KL", f"{_interval(loss.mean_kl, form=kl_form(loss.mean_kl[0]))} nats"),
            ("99.9 % KL", f"{loss.kl_99_9:.4f} nats"),
            ("same top token", _interval(loss.same_top, 100, ".2f") + " %"),
            (
                "perplexity",
                f"{loss.perplexity:.3f}, {report.reference} {loss.reference_perplexity:.3f}, {change} %",
            ),
        ]
    if report.proof:
        rows.append(("proof", report.proof))
    if report.conversion is not None:
        check = report.conversion
        ids = "token ids equal" if check.tokens_equal else "TOKEN IDS DIFFER"
        rows.append(("conversion error", f"{check.mean_kl:.1e} nats (limit {check.limit:g}), {ids}"))
        if check.arithmetic is not None:
            rows.append(("rounded activations", f"{check.arithmetic:.1e} nats, the runtime's own arithmetic"))
    if report.speed:
        rows.append(("speed", ", ".join(f"{name} {value:.0f} tokens/s" for name, value in report.speed.items())))
    share = "" if report.loss is None else ", measuring included"
    rows.append(("peak memory", f"{human_bytes(report.peak_memory)}{share}"))
    rows.append(("time", ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())))
    return rows


def deployment_rows(advice: Deployment) -> list[tuple[str, str]]:
    """What belongs to the command, in words."""
    rows = [("context", f"{advice.context:,} tokens, as the model was made for; give less to save memory")]
    if advice.kv_cache:
        whole = human_bytes(advice.kv_bytes_per_token * advice.context)
        cost = f"{advice.kv_bytes_per_token:,} bytes per token, {whole} for the whole context"
        rows.append(("key-value cache", f"{advice.kv_cache}, with which the artifact was judged: {cost}"))
    return rows


def render_markdown(report: Report) -> str:
    """The report as a page for a repository or a model card."""
    lines = [f"# {markdown_text(report.label)} for {markdown_text(report.target)}: {report.status}", ""]
    lines += [f"- {markdown_text(sentence)}" for sentence in report.sentences]
    lines += [f"- warning: {markdown_text(warning)}" for warning in report.warnings]
    lines += ["", *markdown_table(("", ""), summary_rows(report))]
    if report.points:
        lines += ["", "## Measured on the way", ""]
        lines += markdown_table(
            ("what", "bytes", "mean KL", "95 % interval", "text", "made of"),
            [(p.label, f"{p.nbytes:,}", *p.shown, p.text, p.detail) for p in report.points],
        )
    if report.limits:
        lines += ["", "## Limits", "", "Bounds are one-sided, each right with 95 % confidence.", ""]
        lines += markdown_table(
            ("limit", "at", "measured", "lower bound", "upper bound", "verdict"),
            [
                (
                    one.name,
                    *(f"{value:.6g}" for value in (one.limit, one.value, one.lower, one.upper)),
                    one.status.value,
                )
                for one in report.limits
            ],
        )
    if report.deployment is not None:
        lines += ["", "## Deployment", "", "Inside the output folder:", "", f"    {report.deployment.command}"]
        lines += ["", *markdown_table(("", ""), deployment_rows(report.deployment))]
    lines += ["", "## Where the bytes went", ""]
    lines += markdown_table(
        ("grid", "tensors", "source bytes", "artifact bytes"),
        [(name, count, f"{a:,}", f"{b:,}") for name, count, a, b in report.grids()],
    )
    lines += ["", "## Ledger", ""]
    lines += markdown_table(
        ("tensor", "source", "asked for", "applied", "algorithm", "bytes", "relative error", "why"),
        [
            (
                line.name,
                f"{line.source} ({line.source_dtype})",
                line.requested,
                line.applied,
                line.algorithm,
                f"{line.target_bytes:,}",
                "" if line.error is None else f"{line.error:.2e}",
                line.reason,
            )
            for line in report.ledger.lines
        ],
    )
    lines += [
        f"- unused: {markdown_text(name)} ({nbytes:,} bytes): {markdown_text(why)}"
        for name, nbytes, why in report.ledger.unused
    ]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {markdown_text(note)}" for note in report.notes)]
    return encodable("\n".join(lines) + "\n")


def render_json(report: Report) -> str:
    """As `strict_json`."""
    return strict_json(report.as_dict())


def strict_json(document: Mapping[str, Any]) -> str:
    """A document as JSON: a figure that is not finite is null."""
    return encodable(json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Nested data as strict JSON holds it: null for figures that are not finite."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encodable(text: str) -> str:
    """File names that are not Unicode reach Python as lone surrogates, which UTF-8 does not hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
