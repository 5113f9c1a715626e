"""Pictures: valid SVG, everything inside its frame, and more is drawn as more."""

import math
import re
from xml.etree import ElementTree

import pytest

from anyquant.pipeline.picture import HEIGHT, WIDTH, Point, error_map, frontier, human_bytes, size_and_loss

HOSTILE = '</title><script>alert("x")</script>&'
LEVELS = {"lossless": 0.0014, "compact": 0.03}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - our own text


def circles(svg: str) -> list[tuple[float, float, str]]:
    return [
        (float(mark.attrib["cx"]), float(mark.attrib["cy"]), mark.attrib["class"])
        for mark in parsed(svg).iter("circle")
    ]


def point(label: str, nbytes: int, kl: float, chosen: bool = False) -> Point:
    return Point(label, nbytes, kl, kl * 0.9, kl * 1.1, chosen)


def test_larger_is_further_right_and_worse_is_higher() -> None:
    points = [point("Q2_K", 10**6, 0.5), point("Q4_K", 2 * 10**6, 0.05), point("Q8_0", 4 * 10**6, 0.0005, True)]
    svg = size_and_loss(points, 0.011, LEVELS, 16 * 10**6)
    (x2, y2, _), (x4, y4, _), (x8, y8, kind) = circles(svg)
    assert x2 < x4 < x8
    assert y2 < y4 < y8  # y runs downwards
    assert kind == "chosen"
    # x is linear from nothing, y logarithmic: equal factors, equal steps
    assert (x8 - x4) == pytest.approx(2 * (x4 - x2), abs=0.3)
    assert (y8 - y4) == pytest.approx(2 * (y4 - y2), abs=0.3)
    assert "limit 0.011" in svg
    assert all(name in svg for name in ("lossless", "compact", "Q2_K", "original"))


def expected_of(svg: str) -> list[tuple[float, float]]:
    (line,) = [mark for mark in parsed(svg).iter("polyline") if mark.attrib["class"] == "expected"]
    return [(float(x), float(y)) for x, y in (place.split(",") for place in line.attrib["points"].split())]


def test_what_is_expected_of_other_sizes_is_a_line_that_the_points_can_be_seen_against() -> None:
    """All points have one size, as with a limit on it; what lies around shows whether they are above or below."""
    expected = [(size, 2.0 ** (-size / 10**5)) for size in range(5 * 10**5, 2 * 10**6, 10**4)]
    points = [point(f"try {index}", 10**6, kl) for index, kl in enumerate((2**-9.5, 2**-10, 2**-10.5))]
    svg = size_and_loss([*points, point("mixture", 10**6, 2**-10, True)], None, LEVELS, 10**7, expected)
    line = expected_of(svg)
    assert len(line) > 50 and line == sorted(line)
    assert line[-1][0] - line[0][0] > 0.9 * (WIDTH - 102)
    (above_x, above, _), (_, on, _), (_, below, _), _ = circles(svg)
    here = min(line, key=lambda place: abs(place[0] - above_x))
    assert above < on < below and here[1] == pytest.approx(on, abs=2.5)
    assert all(20 <= y <= HEIGHT - 52 for _, y in line)


def test_a_line_outside_the_frame_is_not_drawn() -> None:
    points = [point("a", 10**6, 0.1), point("b", 2 * 10**6, 0.05, True)]
    for expected in ([(10**8, 0.1), (10**9, 0.05)], [(10**6, 1e-9), (2 * 10**6, 1e-10)], [(10**6, 0.1)], []):
        svg = size_and_loss(points, 0.1, LEVELS, 10**7, expected)
        assert not [mark for mark in parsed(svg).iter("polyline") if mark.attrib["class"] == "expected"]


@pytest.mark.parametrize(
    ("points", "limit"),
    [
        ([point("one", 5, 1e-9, True)], None),
        ([point("one", 10**12, 7.0, True)], 0.0),
        ([point("zero", 10**6, 0.0), point("more", 10**6, 0.1, True)], 1e-6),
        ([Point("below", 10**6, -1e-12, -1e-9, 1e-9, False), point("more", 10**7, 0.1, True)], 0.2),
        ([Point("unknown interval", 10**6, 0.1, math.nan, math.nan, True)], None),
        ([Point("unknown", 10**6, math.nan, math.nan, math.nan, True), point("more", 10**7, 0.1)], None),
        ([Point("endless", 10**6, math.inf, math.inf, math.inf, True), point("more", 10**7, 0.1)], None),
    ],
)
def test_odd_values_stay_inside_the_frame(points: list[Point], limit: float | None) -> None:
    svg = size_and_loss(points, limit, LEVELS, 10**7)
    assert "nan" not in re.sub(r"<title>.*?</title>", "", svg)
    assert "inf" not in re.sub(r"<title>.*?</title>", "", svg)
    for mark in parsed(svg).iter():
        for key in ("x", "x1", "x2", "cx"):
            assert -1 <= float(mark.attrib.get(key, 0)) <= WIDTH + 60
        for key in ("y", "y1", "y2", "cy"):
            assert -20 <= float(mark.attrib.get(key, 0)) <= HEIGHT + 1


def test_nothing_to_draw() -> None:
    assert size_and_loss([], None, LEVELS, 1) == ""
    assert size_and_loss([point("zero", 5, 0.0)], 0.1, LEVELS, 1) == ""
    assert error_map([]) == ""


def test_names_are_text() -> None:
    for svg in (
        size_and_loss([point(HOSTILE, 10, 0.1, True)], None, {HOSTILE: 0.1}, 20),
        error_map([(0, HOSTILE, 0.1, HOSTILE)]),
    ):
        assert not list(parsed(svg).iter("script"))
        assert HOSTILE in "".join(parsed(svg).itertext())


def test_the_error_map_darkens_with_the_error() -> None:
    cells = [
        (0, "attn_q", 1e-3, "q4_k"),
        (1, "attn_q", 1e-2, "q3_k"),
        (0, "head", 0.0, "f32"),
        (7, "head", 1e-1, "q2_k"),
    ]
    found = [float(mark.attrib["fill-opacity"]) for mark in parsed(error_map(cells)).iter("rect")]
    assert found[2] == 0
    assert 0 < found[0] < found[1] < found[3] <= 1
    # all errors alike, or none: no division by zero
    assert len(list(parsed(error_map([(0, "a", 0.5, "g"), (1, "a", 0.5, "g")])).iter("rect"))) == 2
    assert len(list(parsed(error_map([(0, "a", 0.0, "g")])).iter("rect"))) == 1


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (14_100_000, "14.1 MB"), (2e13, "20 TB")]
)
def test_bytes_for_people(nbytes: float, text: str) -> None:
    assert human_bytes(nbytes) == text


def test_the_frontier_has_what_nothing_else_beats() -> None:
    points = [point("a", 4, 0.1), point("b", 5, 0.2), point("c", 6, 0.05), point("d", 6, 0.06), point("e", 3, 0.3)]
    assert [one.label for one in frontier(points)] == ["e", "a", "c"]
    svg = size_and_loss(points, None, LEVELS, 100)
    near = [point(str(index), 10**6 + index, 0.1) for index in range(5)]
    shown = [
        m.text for m in parsed(size_and_loss(near, None, LEVELS, 100)).iter("text") if m.get("class") == "label point"
    ]
    assert len(shown) == 1, "labels do not lie on each other"
    assert "original" not in svg, "a search is shown from near"
