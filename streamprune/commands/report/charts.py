"""Draw charts as SVG text: axes, bars, lines and dots, each with a tooltip.

The page's style sheet sets colours and fonts by class. A chart states what a mark is, not how it looks. All texts are
escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 30, 44
DECADES = 9
"""Largest number of decades that a logarithmic axis shows below its highest value."""


@dataclass(frozen=True)
class Axis:
    """One axis of a chart."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    """Values with a tick mark, and their labels."""
    log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value on the axis, from 0 to 1; values outside are clamped to the ends."""
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, max(value, self.low)))
            if self.log
            else (
                self.low,
                self.high,
                value,
            )
        )
        return min(1.0, max(0.0, (value - low) / (high - low)))


def linear(label: str, high: float, say: Callable[[float], str], *, low: float = 0.0) -> Axis:
    """Create an axis with about five ticks at round values; `say` formats a value."""
    high = high if high > low else low + 1.0
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((k * step, say(k * step)) for k in range(first, last + 1))
    return Axis(label, ticks[0][0], ticks[-1][0], ticks)


def share(label: str) -> Axis:
    """Create an axis from 0 to 100 %."""
    return Axis(label, 0.0, 1.0, tuple((k / 4, f"{25 * k}%") for k in range(5)))


def logarithmic(label: str, values: Iterable[float], say: Callable[[float], str]) -> Axis:
    """Create a logarithmic axis around the positive values.

    Ticks are at powers of ten or, if at most two of them are in range, at 1, 2 and 5 times powers of ten.
    """
    positive = [value for value in values if value > 0]
    most = max(positive, default=1.0)
    least = max(min(positive, default=most / 10), most / 10**DECADES)
    # The ends are at 1, 2 or 5 times a power of ten.
    bottom, top = math.floor(math.log10(least)), math.ceil(math.log10(most))
    marks = [factor * 10.0**k for k in range(bottom, top + 1) for factor in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= least * (1 + 1e-9))
    high = min(mark for mark in marks if mark >= most * (1 - 1e-9) and mark > low)
    powers = [10.0**k for k in range(bottom, top + 1) if low <= 10.0**k <= high]
    few = powers[:: math.ceil(len(powers) / 5)] if len(powers) > 2 else [m for m in marks if low <= m <= high]
    return Axis(label, low, high, tuple((mark, say(mark)) for mark in few), log=True)


def positions(label: str, names: Sequence[str]) -> Axis:
    """Create an axis with one position per name, at 0, 1, 2, ...; label as many as fit."""
    every = max(1, math.ceil(len(names) / 10))
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 100, 10**9) if step >= every)
    ticks = tuple((float(k), names[k]) for k in range(0, len(names), every))
    return Axis(label, -0.5, max(len(names), 1) - 0.5, ticks)


@dataclass(frozen=True)
class Frame:
    """The two axes of a chart, mapped to SVG coordinates."""

    x: Axis
    y: Axis

    def across(self, value: float) -> float:
        """Return the SVG x coordinate of a value."""
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        """Return the SVG y coordinate of a value."""
        return HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)


def svg(frame: Frame, summary: str, marks: Iterable[str]) -> str:
    """Draw the whole chart; screen readers read `summary`."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}">']
    for value, said in frame.y.ticks:
        y = frame.up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(said)}</text>')
    for value, said in frame.x.ticks:
        x = frame.across(value)
        # Keep the last label inside the chart, and the first one away from the other axis.
        anchor = "end" if x > right - 8 else "start" if x < LEFT + 2 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{escape(said)}</text>')
    parts.append(f'<text class="axis" x="0" y="13">{escape(frame.y.label)}</text>')
    parts.append(f'<text class="axis" x="{right}" y="{HEIGHT - 5}" text-anchor="end">{escape(frame.x.label)}</text>')
    parts += marks
    parts.append(f'<line class="base" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/></svg>')
    return "".join(parts)


def bar(frame: Frame, at: float, low: float, high: float, kind: str, note: str = "", width: float = 0.72) -> str:
    """Draw a bar from `low` to `high` at a position of a `positions` axis."""
    left, right = frame.across(at - width / 2), frame.across(at + width / 2)
    top, bottom = frame.up(high), frame.up(low)
    return (
        f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{max(bottom - top, 0):.1f}">'
        f"{_title(note)}</rect>"
    )


def hover(frame: Frame, at: float, note: str) -> str:
    """Draw an invisible bar over the height of the chart that carries a position's tooltip."""
    return bar(frame, at, frame.y.low, frame.y.high, "hover", note, width=1.0)


def line(frame: Frame, points: Sequence[tuple[float, float]], kind: str, note: str = "", style: str = "") -> str:
    """Draw a line through points in order."""
    path = " ".join(f"{frame.across(x):.1f},{frame.up(y):.1f}" for x, y in points)
    styled = f' style="{escape(style)}"' if style else ""
    return f'<polyline class="line {kind}"{styled} points="{path}">{_title(note)}</polyline>'


def dot(frame: Frame, x: float, y: float, kind: str, note: str = "", style: str = "", radius: float = 3.5) -> str:
    """Draw a dot."""
    styled = f' style="{escape(style)}"' if style else ""
    return (
        f'<circle class="dot {kind}"{styled} cx="{frame.across(x):.1f}" cy="{frame.up(y):.1f}" r="{radius:g}">'
        f"{_title(note)}</circle>"
    )


def level(frame: Frame, y: float, kind: str, note: str = "") -> str:
    """Draw a horizontal line across the chart."""
    return line(frame, [(frame.x.low, y), (frame.x.high, y)], kind, note)


def range_mark(frame: Frame, at: float, low: float, high: float, kind: str) -> str:
    """Draw a thin vertical line from the least to the largest of several values at one position."""
    x = frame.across(at)
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.up(low):.1f}" y2="{frame.up(high):.1f}"/>'


def escape(text: object) -> str:
    """Escape a value for text and quoted attributes."""
    return html.escape(str(text), quote=True)


def _title(note: str) -> str:
    return f"<title>{escape(note)}</title>" if note else ""


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
