"""Charts as SVG: bars towards a limit, curves along a run, intervals by layer."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from .page import tag

__all__ = ["Bar", "Curve", "Interval", "bars", "curves", "intervals", "share_of"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which are told apart without seeing all colours; used again from the seventh on."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 260, 70, 20, 24, 36
ROW = 26
LABELS, WORDS = 190, 200
"""Width of the names before bars, and of the words after them."""

FURTHEST = 6.0
"""Decades that a bar is drawn beyond its limit: an error that is not finite is larger than any axis."""

LEAST = 1e-16
"""What 0 is drawn at on a logarithmic axis: float64 tells no smaller error from it."""


@dataclass(frozen=True)
class Bar:
    """A figure, as a share of what is allowed."""

    name: str
    share: float
    """1 is the limit."""
    words: str
    """The figure and its limit."""
    good: bool


def share_of(error: float, limit: float) -> float:
    """An error as a share of its limit, which may be 0."""
    return error / limit if limit else float(error > 0) * 10**FURTHEST


@dataclass(frozen=True)
class Curve:
    """Values at 1, 2, 3, …"""

    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Interval:
    """What an input may be."""

    name: str
    low: float
    high: float


def bars(found: Sequence[Bar]) -> Element:
    """A row for each figure, on one logarithmic axis on which all limits lie at one place."""
    places = [math.log10(max(bar.share, LEAST)) for bar in found]
    low, high = min(-1, math.floor(min(places))), max(1, math.ceil(min(max(places), FURTHEST)))
    plot, height = WIDTH - LABELS - RIGHT, ROW * len(found) + TOP + BOTTOM

    def x(decade: float) -> float:
        return LABELS + plot * (min(decade, high) - low) / (high - low)

    drawn: list[Element] = []
    for decade in range(low, high + 1, -(-(high - low) // 10)):
        drawn += _gridline(x(decade), TOP, height - BOTTOM, _times(decade))
    for row, (bar, place) in enumerate(zip(found, places, strict=True)):
        y, kind = TOP + ROW * row, "good" if bar.good else "bad"
        length = max(x(place) - LABELS, 2)
        drawn.append(tag("text", bar.name, x=0, y=y + 17))
        drawn.append(tag("rect", x=LABELS, y=y + 4, width=length, height=ROW - 8, rx=2, class_=kind))
        end = LABELS + length
        if end + WORDS < WIDTH:
            drawn.append(tag("text", bar.words, x=end + 6, y=y + 17))
        else:
            drawn.append(tag("text", bar.words, x=end - 6, y=y + 17, text_anchor="end", class_="on"))
    edge = x(0)
    drawn.append(tag("line", x1=edge, x2=edge, y1=TOP - 6, y2=height - BOTTOM, class_="limit"))
    drawn.append(tag("text", "limit", x=edge, y=TOP - 10, text_anchor="middle"))
    return _picture(height, "Figures as shares of their limits, on a logarithmic axis", drawn)


def _times(decade: int) -> str:
    return f"{10.0**decade:g}×" if abs(decade) < 3 else f"1e{decade}×"


def _gridline(x: float, top: float, bottom: float, words: str) -> list[Element]:
    line = tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")
    return [line, tag("text", words, x=x, y=bottom + 18, text_anchor="middle", class_="dim")]


def curves(
    found: Sequence[Curve],
    title: str,
    *,
    logarithmic: bool,
    across: str,
    marks: Sequence[tuple[float, str]] = (),
    limit: float | None = None,
) -> Element:
    """Curves of one quantity.

    Args:
        found: at least one, of at least one value.
        title: what is drawn.
        logarithmic: whether the axis of values is.
        across: what the other axis counts.
        marks: places on that axis where something begins, and what.
        limit: what the values are held against.
    """
    values = [value for curve in found for value in curve.values] + ([] if limit is None else [limit])
    scale: Callable[[float], float] = _decades if logarithmic else float
    low, high = _ends([scale(value) for value in values], logarithmic)
    last = max(max(len(curve.values) for curve in found), 2)

    def x(place: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place - 1) / (last - 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(value) - low) / (high - low)

    drawn = list(_values_axis(low, high, logarithmic, y))
    for place in sorted({round(1 + (last - 1) * k / 8) for k in range(9)}):
        drawn.append(tag("text", str(place), x=x(place), y=HEIGHT - 18, text_anchor="middle", class_="dim"))
    drawn.append(tag("text", across, x=WIDTH / 2, y=HEIGHT - 3, text_anchor="middle", class_="dim"))
    for begin, words in marks:
        drawn.append(tag("line", x1=x(begin), x2=x(begin), y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        drawn.append(tag("text", words, x=x(begin) + 4, y=TOP + 10, class_="dim"))
    if limit is not None:
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(limit), y2=y(limit), class_="limit"))
        drawn.append(tag("text", "limit", x=WIDTH - RIGHT, y=y(limit) - 4, text_anchor="end"))
    for number, curve in enumerate(found):
        drawn += _curve(curve, COLOURS[number % len(COLOURS)], x, y)
    picture = _picture(HEIGHT, title, [tag("text", title, x=0, y=12), *drawn])
    return tag("div", picture, *_legend(found))


def _legend(found: Sequence[Curve]) -> Iterator[Element]:
    """Names of the curves, where there are several and each has a colour of its own."""
    if 1 < len(found) <= len(COLOURS):
        for colour, curve in zip(COLOURS, found, strict=False):
            yield tag("div", tag("span", "● ", style=f"color: {colour}"), curve.name, class_="note")


def _decades(value: float) -> float:
    return math.log10(max(value, LEAST))


def _ends(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if logarithmic:
        return math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    room = max(0.1 * (high - low), 0.5)
    return low - room, high + room


def _values_axis(low: float, high: float, logarithmic: bool, y: Callable[[float], float]) -> Iterator[Element]:
    count = min(5, round(high - low)) if logarithmic else 4
    for k in range(count + 1):
        place = low + (high - low) * k / count
        value = 10.0 ** round(place) if logarithmic else place
        words = f"{value:.0e}" if logarithmic else f"{value:.1f}"
        yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="grid")
        yield tag("text", words, x=LEFT - 8, y=y(value) + 4, text_anchor="end", class_="dim")


def _curve(curve: Curve, colour: str, x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[Element]:
    points = [(x(place), y(value)) for place, value in enumerate(curve.values, 1)]
    line = " ".join(f"{across:.1f},{up:.1f}" for across, up in points)
    yield tag("polyline", points=line, fill="none", stroke=colour, stroke_width=1.5)
    for (across, up), value in zip(points, curve.values, strict=True):
        told = tag("title", f"{curve.name}: {value:.3g}")
        yield tag("circle", told, cx=across, cy=up, r=3, fill=colour)


def intervals(found: Sequence[Interval], title: str) -> Element:
    """A vertical line for each interval, from its low to its high end, on an axis of log(1 + |x|) both ways."""
    greatest = max(max(abs(interval.low), abs(interval.high)) for interval in found)
    height = 180.0
    middle, half = (TOP + height - 12) / 2, (height - 12 - TOP) / 2

    def y(value: float) -> float:
        return middle - half * math.copysign(math.log1p(abs(value)) / math.log1p(greatest), value)

    step = (WIDTH - LEFT - RIGHT) / len(found)
    drawn = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=middle, y2=middle, class_="grid")]
    for value in (-greatest, 0.0, greatest):
        drawn.append(tag("text", f"{value:.3g}", x=LEFT - 8, y=y(value) + 4, text_anchor="end", class_="dim"))
    for number, interval in enumerate(found):
        top, told = y(interval.high), f"{interval.name}: {interval.low:.4g} … {interval.high:.4g}"
        size = max(y(interval.low) - top, 1)
        across = LEFT + step * number
        box = {"x": across, "y": top, "width": max(step - 1, 0.5), "height": size}
        drawn.append(tag("rect", tag("title", told), fill=COLOURS[0], **box))
    return _picture(height, title, [tag("text", title, x=0, y=12), *drawn])


def _picture(height: float, title: str, drawn: Sequence[Element]) -> Element:
    return tag("svg", *drawn, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=title)
