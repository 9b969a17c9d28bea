"""A small SVG chart: axes, marks and text whose colours are CSS classes, so that one drawing suits light and dark.

Each chart is drawn twice, wide and narrow, and CSS shows the one that fits: text keeps its size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from dtr.reporting.formats import is_number

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Pixels of one drawing."""

    name: str
    width: int
    height: int
    num_ticks: int
    """Most ticks on the x axis."""


WIDE = Size(name="wide", width=760, height=340, num_ticks=12)
NARROW = Size(name="narrow", width=344, height=270, num_ticks=6)

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44


_four_digits = "{:.4g}".format


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values and how to name them."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    """Only whole numbers are named, as for layers."""
    name_tick: Callable[[float], str] = _four_digits

    def place(self, value: float) -> float:
        """Position of a value, 0 at the low end and 1 at the high end, cut off at both."""
        if self.log:
            value = math.log10(max(value, self.low))
            low, high = math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, most: int) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if 2 <= len(found) <= most:
                    return found
        # Also on a log axis that spans less than a factor of two or so.
        rough = (self.high - self.low) / most
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(s * scale for s in (1, 2, 5, 10) if s * scale >= rough)
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_over(
    label: str,
    values: Iterable[object],
    *,
    log: bool = False,
    room_below: float = 0.08,
    name_tick: Callable[[float], str] = _four_digits,
) -> Axis:
    """An axis that holds all finite values with a little room; positive ones only where it is logarithmic.

    `room_below` is a share of the range, for labels that stand on the axis.
    """
    kept = [v for v in values if is_number(v) and (v > 0 or not log)] or [0.1 if log else 0.0, 1.0]
    low, high = min(kept), max(kept)
    if log:
        span = max(high / low, 1.5)
        return Axis(label=label, low=low / span**room_below, high=high * span**0.08, log=True, name_tick=name_tick)
    span = high - low or 0.5 * abs(high) or 1.0
    return Axis(label=label, low=low - room_below * span, high=high + 0.08 * span, name_tick=name_tick)


class Plot:
    """One drawing. Marks are added in data coordinates; `cls` names the CSS class that colours them.

    `key` is unique in the page; screen readers read the title and the description in place of the drawing.
    """

    def __init__(self, size: Size, *, key: str, title: str, description: str, x: Axis, y: Axis) -> None:
        self.size, self.x, self.y = size, x, y
        title_id, desc_id = f"{key}-{size.name}-title", f"{key}-{size.name}-desc"
        self.svg = ET.Element(
            "svg",
            {
                "class": size.name,
                "viewBox": f"0 0 {size.width} {size.height}",
                "role": "img",
                "aria-labelledby": f"{title_id} {desc_id}",
            },
        )
        ET.SubElement(self.svg, "title", {"id": title_id}).text = title
        ET.SubElement(self.svg, "desc", {"id": desc_id}).text = description
        self._frame()

    def at(self, point: Point) -> Point:
        """Pixels of a point."""
        width, height = self.size.width - _LEFT - _RIGHT, self.size.height - _TOP - _BOTTOM
        return _LEFT + self.x.place(point[0]) * width, _TOP + (1 - self.y.place(point[1])) * height

    def line(self, points: Sequence[Point], cls: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
        ET.SubElement(self.svg, "polyline", {"points": path, "class": f"line {cls}"})

    def level(self, y: float, cls: str) -> None:
        """A horizontal line across the chart."""
        self.line([(self.x.low, y), (self.x.high, y)], cls)

    def band(self, lows: Sequence[Point], highs: Sequence[Point], cls: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, [*lows, *reversed(highs)]))
        ET.SubElement(self.svg, "polygon", {"points": path, "class": cls})

    def dot(self, point: Point, cls: str, note: str, *, radius: float = 3.5, square: bool = False) -> None:
        """A mark with a note that shows on hover; squares stand on a corner."""
        x, y = self.at(point)
        if square:
            r = radius * 1.25
            corners = f"{x:.1f},{y - r:.1f} {x + r:.1f},{y:.1f} {x:.1f},{y + r:.1f} {x - r:.1f},{y:.1f}"
            mark = ET.SubElement(self.svg, "polygon", {"points": corners, "class": cls})
        else:
            mark = ET.SubElement(
                self.svg, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius}", "class": cls}
            )
        if note:
            ET.SubElement(mark, "title").text = note

    def error_bar(self, point: Point, half: float, cls: str) -> None:
        self.line([(point[0], point[1] - half), (point[0], point[1] + half)], cls)

    def drop(self, point: Point) -> None:
        """A thin line from a point down to the axis."""
        self.line([point, (point[0], self.y.low)], "drop")

    def name(self, x: float, text: str, *, row: int) -> None:
        """A short label just above the x axis, in the first row from below or a later one."""
        at, bottom = self.at((x, self.y.low))
        anchor = "end" if at > 0.85 * self.size.width else "start" if at < 0.2 * self.size.width else "middle"
        self._text(at, bottom - 6 - 16 * row, text, "name", anchor)

    def _text(self, x: float, y: float, text: str, cls: str, anchor: str, **extra: str) -> None:
        options = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": cls, "text-anchor": anchor, **extra}
        ET.SubElement(self.svg, "text", options).text = text

    def _frame(self) -> None:
        bottom, right = self.size.height - _BOTTOM, self.size.width - _RIGHT
        for value in self.y.ticks(6):
            _, y = self.at((self.x.low, value))
            self._rule(y, right, "grid")
            self._text(_LEFT - 7, y + 4, self.y.name_tick(value), "tick", "end")
        for value in self.x.ticks(self.size.num_ticks):
            x, _ = self.at((value, self.y.low))
            self._text(x, bottom + 17, self.x.name_tick(value), "tick", "middle")
        self._rule(bottom, right, "base")
        self._text((_LEFT + right) / 2, self.size.height - 6, self.x.label, "label", "middle")
        middle = (_TOP + bottom) / 2
        self._text(12, middle, self.y.label, "label", "middle", transform=f"rotate(-90 12 {middle:.1f})")

    def _rule(self, y: float, right: float, cls: str) -> None:
        ends = {"x1": f"{_LEFT}", "x2": f"{right}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        ET.SubElement(self.svg, "line", {**ends, "class": cls})

    def markup(self) -> str:
        return ET.tostring(self.svg, encoding="unicode", short_empty_elements=False)


def both_sizes(draw: Callable[[Size], Plot]) -> Markup:
    """The drawing for wide and for narrow screens, safe to place in a page: ElementTree escaped every text."""
    return Markup('<div class="chart">' + draw(WIDE).markup() + draw(NARROW).markup() + "</div>")
