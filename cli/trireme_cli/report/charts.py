"""Figures of a page: lines as inline SVG that stretches, all text as HTML beside it.

An SVG with text in it is either too small on a phone or too large on a wall. Here the drawing alone stretches, with
strokes that keep their width, and labels are laid over it by percentages in the reader's own font size. Nothing is
loaded from anywhere, and every figure says in words what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 1000.0, 300.0
"""Units of the drawing; it stretches to whatever room there is."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line; a gap in it is None."""

    name: str
    points: Sequence[Point | None]
    style: str = "main"
    """A class of the style sheet: main | faint."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at x."""

    x: float
    label: str
    title: str
    style: str = "restart"


@dataclass(frozen=True)
class Figure:
    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    y_from_zero: bool = False
    x_text: Callable[[float], str] = field(default=lambda value: number(value))
    summary: str = ""
    """What the figure shows, in a sentence; read aloud to those who do not see it, and printed below it."""


def figure(one: Figure) -> str:
    points = [point for line in one.lines for point in line.points if point is not None]
    if not points:
        return f'<p class="missing">{escape(one.title)}: no figures yet.</p>'
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_ticks = ticks(min(xs), max(xs), 5)
    y_ticks = ticks(0.0 if one.y_from_zero else min(ys), max(ys), 4)
    x_low, x_high = min(min(xs), max(xs) - 1e-9), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], max(y_ticks[-1], max(ys))

    def across(x: float) -> float:
        return (x - x_low) / (x_high - x_low)

    def down(y: float) -> float:
        return 1.0 - (y - y_low) / (y_high - y_low)

    drawn = [f'<line class="grid" x1="0" x2="{WIDTH:g}" y1="{down(y) * HEIGHT:.1f}" y2="{down(y) * HEIGHT:.1f}"/>'
             for y in y_ticks]  # fmt: skip
    for mark in one.marks:
        at = across(mark.x) * WIDTH
        drawn.append(
            f'<line class="mark {mark.style}" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{HEIGHT:g}">'
            f"<title>{escape(mark.title)}</title></line>"
        )
    for line in one.lines:
        path = _path(line.points, lambda p: (across(p[0]) * WIDTH, down(p[1]) * HEIGHT))
        drawn.append(f'<path class="line {line.style}" d="{path}"><title>{escape(line.name)}</title></path>')
    labels = [f'<span class="y" style="top:{100 * down(y):.2f}%">{escape(number(y))}</span>' for y in y_ticks]
    labels += [
        f'<span class="x" style="left:{100 * across(x):.2f}%">{escape(one.x_text(x))}</span>'
        for x in x_ticks
        if x_low <= x <= x_high
    ]
    shown_until = -1.0
    for mark in sorted(one.marks, key=lambda m: m.x):
        place = across(mark.x)
        if place - shown_until >= 0.05:  # labels of restarts that are close together would cover one another
            shown_until = place
            labels.append(f'<span class="at" style="left:{100 * place:.2f}%">{escape(mark.label)}</span>')
    legend = "".join(
        f'<span><i class="key {line.style}"></i>{escape(line.name)}</span>' for line in one.lines if len(one.lines) > 1
    )
    drawing = (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none" aria-hidden="true">{"".join(drawn)}</svg>'
    )
    spoken = escape(f"{one.title}. {one.summary}", quote=True)
    return (
        f'<figure><figcaption><b>{escape(one.title)}</b> <span class="axes">{escape(one.y_name)} against '
        f'{escape(one.x_name)}</span></figcaption><div class="plot" role="img" aria-label="{spoken}">{drawing}'
        f'{"".join(labels)}</div><p class="legend">{legend}<span>{escape(one.summary)}</span></p></figure>'
    )


def _path(points: Sequence[Point | None], place: Callable[[Point], Point]) -> str:
    parts, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        x, y = place(point)
        parts.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    if len(parts) == 1:
        parts.append("h0.01")  # a single point is seen by its round cap
    return "".join(parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that enclose low and high, about so many."""
    if high <= low:
        low, high = low - abs(low) * 0.1 - 0.5, high + abs(high) * 0.1 + 0.5
    step = 10 ** math.floor(math.log10((high - low) / about))
    for factor in (1, 2, 2.5, 5, 10):
        if (high - low) / (step * factor) <= about:
            step *= factor
            break
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 1,200 as 1.2k, 3e9 as 3G."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def stacked(parts: dict[str, float], whole: float, title: str) -> str:
    """One bar: shares of `whole` by state. Its colours are those of the style sheet."""
    said = ", ".join(f"{state} {value:.1f} s" for state, value in parts.items())
    pieces = "".join(
        f'<span class="s-{escape(state)}" style="width:{100 * value / whole:.3f}%" '
        f'title="{escape(state)} {value:.1f} s"></span>'
        for state, value in parts.items()
        if whole > 0 and value > 0
    )
    return f'<div class="bar" role="img" aria-label="{escape(f"{title}: {said}", quote=True)}">{pieces}</div>'


def timeline(bars: Sequence[tuple[str, float, dict[str, float]]]) -> str:
    """(name, begin, seconds by state) on one axis of time, a line each."""
    if not bars:
        return ""
    first = min(begin for _, begin, _ in bars)
    last = max(begin + sum(parts.values()) for _, begin, parts in bars)
    whole = max(last - first, 1e-9)
    lines = []
    for name, begin, parts in bars:
        length = sum(parts.values())
        left, width = 100 * (begin - first) / whole, max(100 * length / whole, 0.3)
        lines.append(
            f'<div class="when"><span class="who">{escape(name)}</span><div class="track"><div class="piece" '
            f'style="left:{left:.3f}%;width:{width:.3f}%">{stacked(parts, length, f"attempt {name}")}</div></div></div>'
        )
    return f'<div class="timeline">{"".join(lines)}</div>'
