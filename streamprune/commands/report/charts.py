"""Charts: axes, and marks in SVG coordinates.

``page.html.j2`` writes them as SVG. Its style sheet sets colours and fonts by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 30, 44
DECADES = 9
"""Largest number of decades that a logarithmic axis shows below its highest value."""

Label = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """One axis of a chart."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    """Values with a tick mark, and their labels."""
    log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value on the axis, from 0 to 1; values outside are clamped to the ends."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))


def linear(label: str, high: float, text: Label = "{:g}".format) -> Axis:
    """Create an axis from 0 with about five ticks at round values; `text` formats a tick's label."""
    high = high or 1.0
    power = 10.0 ** math.floor(math.log10(high / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= high / 4 * (1 - 1e-9))
    ticks = [(k * step, text(k * step)) for k in range(math.ceil(high / step - 1e-9) + 1)]
    return Axis(label, 0.0, ticks[-1][0], ticks)


def share(label: str) -> Axis:
    """Create an axis from 0 to 100 %."""
    return Axis(label, 0.0, 1.0, [(k / 4, f"{25 * k}%") for k in range(5)])


def logarithmic(label: str, values: Iterable[float], text: Label = "{:g}".format) -> Axis:
    """Create a logarithmic axis around the positive values.

    Ticks are at powers of ten or, if at most two of them are in range, at 1, 2 and 5 times powers of ten.
    """
    positive = [value for value in values if value > 0]
    most = max(positive, default=1.0)
    least = max(min(positive, default=most / 10), most / 10**DECADES)
    bottom, top = math.floor(math.log10(least)), math.ceil(math.log10(most))
    marks = [factor * 10.0**k for k in range(bottom, top + 1) for factor in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= least * (1 + 1e-9))
    high = min(mark for mark in marks if mark >= most * (1 - 1e-9) and mark > low)
    powers = [10.0**k for k in range(bottom, top + 1) if low <= 10.0**k <= high]
    shown = powers[:: math.ceil(len(powers) / 5)] if len(powers) > 2 else [m for m in marks if low <= m <= high]
    return Axis(label, low, high, [(mark, text(mark)) for mark in shown], log=True)


def positions(label: str, names: Iterable[object]) -> Axis:
    """Create an axis with one position per name, at 0, 1, 2, ...; at most ten are labelled."""
    ticks = [(float(k), str(name)) for k, name in enumerate(names)]
    return Axis(label, -0.5, len(ticks) - 0.5, ticks[:: math.ceil(len(ticks) / 10)])


@dataclass(frozen=True)
class Mark:
    """An SVG element with a tooltip."""

    tag: str
    attributes: dict[str, str | None]
    tooltip: str


@dataclass
class Chart:
    """A chart with its title, legend and caption. Marks are drawn in the order of the calls."""

    title: str
    x: Axis
    y: Axis
    summary: str
    """Description for screen readers."""
    caption: str = ""
    legend: list[tuple[str, str]] = field(default_factory=list)
    """CSS class and text of each entry."""
    marks: list[Mark] = field(default_factory=list)
    hovers: list[Mark] = field(default_factory=list)
    """Invisible marks above the others."""

    def across(self, value: float) -> float:
        """Return the SVG x coordinate of a value."""
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        """Return the SVG y coordinate of a value."""
        return HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)

    def bar(self, at: float, low: float, high: float, css: str, width: float = 0.72) -> None:
        """Draw a bar from `low` to `high` at a position of a `positions` axis."""
        self.marks.append(self._bar(at, low, high, css, width))

    def hover(self, at: float, tooltip: str) -> None:
        """Give a position a tooltip over the height of the chart."""
        self.hovers.append(self._bar(at, self.y.low, self.y.high, "hover", 1.0, tooltip))

    def line(
        self, points: Iterable[tuple[float, float]], css: str, tooltip: str = "", style: str | None = None
    ) -> None:
        """Draw a line through points in order."""
        path = " ".join(f"{self.across(x):.1f},{self.up(y):.1f}" for x, y in points)
        self.marks.append(Mark("polyline", {"class": f"line {css}", "style": style, "points": path}, tooltip))

    def level(self, y: float, css: str, tooltip: str = "") -> None:
        self.line([(self.x.low, y), (self.x.high, y)], css, tooltip)

    def dot(self, x: float, y: float, css: str, tooltip: str, style: str | None = None, radius: float = 3.5) -> None:
        place = {"cx": f"{self.across(x):.1f}", "cy": f"{self.up(y):.1f}", "r": f"{radius:g}"}
        self.marks.append(Mark("circle", {"class": f"dot {css}", "style": style, **place}, tooltip))

    def _bar(self, at: float, low: float, high: float, css: str, width: float, tooltip: str = "") -> Mark:
        left, right = self.across(at - width / 2), self.across(at + width / 2)
        top, bottom = self.up(high), self.up(low)
        box = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        return Mark("rect", {"class": css, **{name: f"{value:.1f}" for name, value in box.items()}}, tooltip)
