"""Pictures of a report as self-contained SVG: loss against size, and the error of every tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 20, 52
_FEW = 3  # points that are shown beside the original
_ALIKE = 0.02  # of the bytes: sizes so near are one place, of which the surroundings are shown
_AROUND = 0.15  # how much of them


@dataclass(frozen=True)
class Point:
    """One measured artifact: bytes, mean KL in nats with its interval, and whether it is the one delivered.

    `detail` is a line about what it is made of.
    """

    label: str
    nbytes: int
    kl: float
    low: float
    high: float
    chosen: bool
    detail: str = ""

    @property
    def text(self) -> str:
        """The split of the text that it was measured on."""
        return "certify" if self.chosen else "select"

    @property
    def shown(self) -> tuple[str, str]:
        """The mean KL and its interval, in words."""
        form = kl_form(self.kl)
        return format(self.kl, form), f"{self.low:{form}} to {self.high:{form}}"


def kl_form(value: float) -> str:
    """Decimals where they show something, powers of ten below."""
    return ".5f" if value >= 1e-3 else ".1e"


def human_bytes(nbytes: float) -> str:
    """Decimal units: 14.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high."""
    raw = (high - low) / count
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    first = math.ceil(low / step)
    return [index * step for index in range(first, int(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axes:
    """Bytes run linearly to the right, KL logarithmically upwards."""

    small: float
    large: float
    least: float
    most: float

    def x(self, nbytes: float) -> float:
        return LEFT + (nbytes - self.small) / (self.large - self.small) * (WIDTH - LEFT - RIGHT)

    def y(self, kl: float) -> float:
        """Values below the axis, zero among them, lie on its edge."""
        share = (math.log(max(kl, self.least)) - math.log(self.least)) / (math.log(self.most) - math.log(self.least))
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axes(
    points: Sequence[Point],
    levels: Sequence[float],
    limit: float | None,
    source: int,
    expected: Sequence[tuple[int, float]],
) -> _Axes:
    """From nothing to the original and over all levels; a search of many near one size is shown from near."""
    sizes = [point.nbytes for point in points]
    near = len(points) > _FEW or bool(expected)
    alike = max(sizes) <= min(sizes) * (1 + _ALIKE)
    room = _AROUND if expected and alike else 0.04
    small, large = ((1 - room) * min(sizes), (1 + room) * max(sizes)) if near else (0.0, max(source, *sizes) * 1.04)
    values = [v for p in points for v in (p.kl, p.low, p.high) if 0 < v < math.inf]
    values += [v for v in (limit, *(() if near else levels)) if v]
    if alike:
        values += [loss for nbytes, loss in expected if small <= nbytes <= large]
    above = 1.25 if near else 1.6
    return _Axes(small, large, min(values) / above, max(values) * above)


def _expected(axes: _Axes, expected: Sequence[tuple[int, float]]) -> str:
    """The part of a line of (bytes, KL), by bytes, that lies inside the frame; its ends are where it leaves it."""
    if len(expected) < 2:
        return ""
    nbytes, heights = zip(*((size, math.log(loss)) for size, loss in expected), strict=True)
    first, last = max(axes.small, nbytes[0]), min(axes.large, nbytes[-1])
    places = [first + (last - first) * index / 200 for index in range(201)] if first < last else []
    marks = [(place, math.exp(float(np.interp(place, nbytes, heights)))) for place in places]
    inside = [(place, kl) for place, kl in marks if axes.least <= kl <= axes.most]
    line = " ".join(f"{axes.x(place):.1f},{axes.y(kl):.1f}" for place, kl in inside)
    return f'<polyline class="expected" points="{line}"/>' if len(inside) > 1 else ""


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those to which no other is better in bytes and loss at once, the smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.nbytes, one.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def _grid(axes: _Axes) -> list[str]:
    marks = []
    for tick in _ticks(axes.small, axes.large, 6):
        x = axes.x(tick)
        marks.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        marks.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{human_bytes(tick)}</text>')
    low, high = math.floor(math.log10(axes.least)), math.ceil(math.log10(axes.most))
    for exponent in range(low, high + 1):
        for factor in (1, 2, 5) if axes.most > 10 * axes.least else (1, 1.5, 2, 3, 5, 7):
            value = factor * 10.0**exponent
            if axes.least <= value <= axes.most:
                y = axes.y(value)
                marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
                marks.append(f'<text class="tick right" x="{LEFT - 8}" y="{y + 4:.1f}">{value:g}</text>')
    return marks


def size_and_loss(
    points: Sequence[Point],
    limit: float | None,
    levels: Mapping[str, float],
    source: int,
    expected: Sequence[tuple[int, float]] = (),
) -> str:
    """An SVG of mean KL (logarithmic) against bytes, from nothing to the `source` bytes of the original.

    `levels` are named KL values drawn as thin lines, the `limit` of the contract as a dashed one, and what is expected
    of other sizes, `expected` (bytes, KL) by bytes, as a dotted one. Points with a KL of zero or below lie under the
    lowest value that the axis shows and are drawn on its edge; those that are not finite have no place.
    """
    points = [point for point in points if math.isfinite(point.kl)]
    if not any(point.kl > 0 for point in points):
        return ""
    axes = _axes(points, tuple(levels.values()), limit, source, expected)
    marks = [*_grid(axes), _expected(axes, expected)]
    for name, level in levels.items():
        if not axes.least <= level <= axes.most:
            continue
        y = axes.y(level)
        marks.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text class="level-text" x="{LEFT + 6}" y="{y - 5:.1f}">{escape(name)}</text>')
    if source <= axes.large:
        x = axes.x(source)
        marks.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        marks.append(f'<text class="level-text end" x="{x - 6:.1f}" y="{TOP + 12}">original</text>')
    if limit is not None:
        y = axes.y(limit)
        marks.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        edge = min(axes.x(source), WIDTH - RIGHT) - 6
        marks.append(f'<text class="limit-text" x="{edge:.1f}" y="{y - 6:.1f}">limit {limit:g}</text>')
    best = frontier([point for point in points if not point.chosen] or points)
    line = " ".join(f"{axes.x(p.nbytes):.1f},{axes.y(p.kl):.1f}" for p in best)
    marks.append(f'<polyline class="curve" points="{line}"/>')
    delivered = {point.label for point in points if point.chosen}
    named = _named(axes, points, delivered)
    for index, point in enumerate(points):
        marks += _mark(axes, index, point, points, index in named)
    marks.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}">size of the artifact</text>')
    marks.append(
        f'<text class="axis" transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">mean KL, nats</text>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss against size">{"".join(marks)}</svg>'


def _named(axes: _Axes, points: Sequence[Point], delivered: set[str]) -> set[int]:
    """Which points show their label: what is delivered, and others that are not too near to one that does."""
    order = sorted(range(len(points)), key=lambda index: not points[index].chosen)
    places: list[tuple[float, float]] = []
    named = set()
    for index in order:
        point = points[index]
        x, y = axes.x(point.nbytes), axes.y(point.kl)
        free = len(points) <= _FEW or all(abs(x - other) > 70 or abs(y - height) > 34 for other, height in places)
        if point.chosen or (free and point.label not in delivered):
            named.add(index)
            places.append((x, y))
    return named


def _mark(axes: _Axes, index: int, point: Point, points: Sequence[Point], named: bool) -> list[str]:
    """A point with its interval, a link to its line in the table; a label that is not `named` shows under the mouse."""
    x, y = axes.x(point.nbytes), axes.y(point.kl)
    upper, lower = (axes.y(end) if math.isfinite(end) else y for end in (point.high, point.low))
    kind = "chosen" if point.chosen else "point"
    title = f"{point.label}: {point.nbytes:,} bytes, mean KL {point.kl:.5f} ({point.low:.5f} to {point.high:.5f})"
    if point.detail:
        title += f"\n{point.detail}"
    # of neighbours, every second label goes to the left and below
    crowded = index % 2 == 0 and any(0 < axes.x(other.nbytes) - x < 70 for other in points)
    right = f'x="{x + 9:.1f}" y="{y - 8:.1f}"'
    place = f'x="{x - 9:.1f}" y="{y + 16:.1f}" text-anchor="end"' if crowded else right
    return [
        f'<a href="#point-{index + 1}">',
        f'<line class="bar {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{upper:.1f}" y2="{lower:.1f}"/>',
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{7 if point.chosen else 4.5}">',
        f"<title>{escape(title)}</title></circle>",
        f'<text class="label {kind}{"" if named else " quiet"}" {place}>{escape(point.label)}</text>',
        "</a>",
    ]


def error_map(cells: Sequence[tuple[int, str, float, str]]) -> str:
    """An SVG heat map of relative errors: (block, role, error, grid) per Linear; darker is larger."""
    if not cells:
        return ""
    roles = list(dict.fromkeys(role for _, role, _, _ in cells))
    blocks = sorted({block for block, _, _, _ in cells})
    positive = [error for _, _, error, _ in cells if error > 0] or [1.0]
    low, high = math.log(min(positive)), math.log(max(positive))
    width = min(64.0, 620.0 / len(blocks))
    marks = []
    for index, role in enumerate(roles):
        marks.append(f'<text class="tick right" x="92" y="{index * 26 + 18}">{escape(role)}</text>')
    for block, role, error, grid in cells:
        share = 0.0 if error <= 0 else 0.12 + 0.88 * (math.log(error) - low) / ((high - low) or 1.0)
        x, y = 100 + blocks.index(block) * width, roles.index(role) * 26
        marks.append(
            f'<rect class="cell" x="{x:.1f}" y="{y}" width="{width - 2:.1f}" height="24" fill-opacity="{share:.2f}">'
            f"<title>block {block} {escape(role)}: {escape(grid)}, relative error {error:.2e}</title></rect>"
        )
    bottom = len(roles) * 26
    step = max(1, len(blocks) // 12)
    for index in range(0, len(blocks), step):
        x = 100 + (index + 0.5) * width
        marks.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}">{blocks[index]}</text>')
    marks.append(f'<text class="axis" x="{100 + len(blocks) * width / 2:.1f}" y="{bottom + 36}">block</text>')
    total = 104 + len(blocks) * width
    size = f'viewBox="0 0 {total:.0f} {bottom + 44}" style="max-width: {total:.0f}px"'
    return f'<svg {size} role="img" aria-label="error map">{"".join(marks)}</svg>'
