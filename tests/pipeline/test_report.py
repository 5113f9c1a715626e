"""Reports: stable JSON, one page that loads nothing, and names from strangers that stay names."""

import json
import math
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from anyquant.core.ledger import Ledger, Line
from anyquant.evaluation.verdict import LimitResult, Status
from anyquant.pipeline.picture import Point
from anyquant.pipeline.report import Conversion, Loss, Report, render_html, render_json, render_markdown

HOSTILE = "a|b`<img src=http://evil.example/x.png onerror=alert(1)>\n![y](http://evil.example/y.png)&amp;\u2028|"
NOT_UNICODE = "model\udcff"


def line(name: str, source: str, error: float | None) -> Line:
    return Line(name, "attn_q", source, "F32", 400, "q4_k", "q8_0", "rtn", "blk.0", 106, "because", error)


REPORT = Report(
    chain="rtn",
    anyquant="0.1.0",
    model="mine",
    family="llama",
    target="llama.cpp",
    label="Q4_K_M",
    artifact="model.gguf",
    nbytes=250,
    source_bytes=800,
    weights=200,
    status="pass",
    sentences=("mean KL is at most 0.01",),
    contract={"max_kl": 0.011},
    loss=Loss("certify", 33, 4000, (0.005, 0.004, 0.006), 0.2, (0.97, 0.96, 0.98), 9.1, 9.0, (0.011, 0.008, 0.014)),
    conversion=Conversion(3, 700, 1e-9, 1e-4, True),
    speed={"prompt": 100.0, "generation": 20.0},
    points=(Point("Q2_K", 100, 0.5, 0.4, 0.6, False), Point("Q4_K_M", 250, 0.005, 0.004, 0.006, True)),
    ledger=Ledger((line("blocks.0.attn_q", "w", 0.01), line("blocks.1.attn_q", "v", 0.02)), (("u", 8, "unused"),)),
    recipe={"version": 1, "preset": "Q4_K_M"},
    data={"text": "mine.txt"},
    hashes={"model.gguf": "00"},
    versions={"numpy": "2"},
    seconds={"quantize": 1.5},
    peak_memory=10**8,
    warnings=("a warning",),
)

BAD = replace(
    REPORT,
    model=HOSTILE,
    family=HOSTILE,
    label=HOSTILE,
    warnings=(HOSTILE,),
    sentences=(HOSTILE,),
    hashes={HOSTILE: "00"},
    ledger=Ledger((line("blocks.0.attn_q", HOSTILE, 0.01),), ((HOSTILE, 8, HOSTILE),)),
)

# what a program may rely on: change SCHEMA when one of these goes away
KEYS = [
    "schema",
    "bits_per_weight",
    "anyquant",
    "model",
    "family",
    "target",
    "proof",
    "label",
    "artifact",
    "chain",
    "notes",
    "nbytes",
    "source_bytes",
    "reference",
    "weights",
    "status",
    "sentences",
    "contract",
    "loss",
    "conversion",
    "speed",
    "points",
    "frontier",
    "ledger",
    "recipe",
    "data",
    "hashes",
    "versions",
    "seconds",
    "peak_memory",
    "warnings",
    "deployment",
    "limits",
]
LINE = [
    "name",
    "role",
    "source",
    "source_dtype",
    "source_bytes",
    "requested",
    "applied",
    "algorithm",
    "target",
    "target_bytes",
    "reason",
    "error",
]


def strict(text: str) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    loaded: dict[str, object] = json.loads(text, parse_constant=refuse)
    return loaded


def test_the_json_schema() -> None:
    loaded = json.loads(render_json(REPORT))
    assert loaded["schema"] == 1
    assert sorted(loaded) == sorted(KEYS)
    assert sorted(loaded["ledger"]["lines"][0]) == sorted(LINE)
    assert loaded["bits_per_weight"] == pytest.approx(8 * REPORT.nbytes / 200)
    assert loaded["loss"]["mean_kl"] == [0.005, 0.004, 0.006]
    assert render_json(REPORT) == render_json(replace(REPORT))


def test_each_limit_stands_with_its_evidence() -> None:
    limit = LimitResult("max_kl", 0.02, 0.0123, math.nan, 0.0135, Status.PASS, "mean KL 0.0123, fine.")
    report = replace(REPORT, limits=(limit,))
    found = strict(render_json(report))["limits"]
    assert found == [{**asdict(limit), "lower": None, "status": "pass"}]
    assert "| max_kl | 0.02 | 0.0123 | nan | 0.0135 | pass |" in render_markdown(report)


def test_json_is_strict_whatever_was_measured() -> None:
    loss = replace(REPORT.loss or pytest.fail(), mean_kl=(math.nan, math.nan, math.inf))
    loaded = strict(render_json(replace(REPORT, loss=loss)))
    assert loaded["loss"]["mean_kl"] == [None, None, None]  # type: ignore[index]
    render_markdown(replace(REPORT, loss=loss))
    render_html(replace(REPORT, loss=loss))


def test_names_that_are_not_unicode_can_be_written() -> None:
    bad = replace(REPORT, model=NOT_UNICODE, warnings=(NOT_UNICODE,))
    for render in (render_json, render_markdown, render_html):
        assert b"udcff" in render(bad).encode()


def test_a_report_without_measures() -> None:
    bare = replace(REPORT, loss=None, conversion=None, speed={}, points=(), status="unmeasured", data={})
    assert strict(render_json(bare))["loss"] is None
    assert "unmeasured" in render_markdown(bare)
    assert "Size and loss" not in render_html(bare)


class Page(HTMLParser):
    """Everything that a browser would load or run, all tags, and the text."""

    LOADING = ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.seen = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [
            f"{tag} {key}={value}"
            for key, value in attrs
            if (key in self.LOADING or key.startswith("on")) and not (key == "href" and (value or "").startswith("#"))
        ]

    def handle_data(self, data: str) -> None:
        self.seen += data


@pytest.mark.parametrize("report", [REPORT, BAD], ids=["plain", "hostile"])
def test_the_page_loads_and_runs_nothing(report: Report) -> None:
    page = render_html(report)
    found = Page(page)
    assert found.loads == []
    assert not found.tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert not re.search(r"url\(|@import", style)
    assert report.model in found.seen
    assert len(re.findall(r"<svg", page)) == 2


def cells(row: str) -> int:
    """Borders of a Markdown table row: bars that are not escaped."""
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", row))


@pytest.mark.parametrize("report", [REPORT, BAD], ids=["plain", "hostile"])
def test_markdown_tables_keep_their_columns(report: Report) -> None:
    text = render_markdown(report)
    assert "<img" not in text
    assert not re.search(r"(?<!\\)\[y\]", text)
    assert "\u2028" not in text
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(blocks) == 4
    for rows in blocks:
        assert len({cells(row) for row in rows}) == 1
        assert set(rows[1]) == {"|", "-"}
    assert len(blocks[-1]) == 2 + len(report.ledger.lines)
