"""Speed and memory of teacher and hybrid over the context length. Each is None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from dtr.reporting.formats import byte_size, count, dig, is_number
from dtr.reporting.plot import Axis, Plot, Point, Size, axis_over, both_sizes


def speed_chart(report: dict) -> Markup | None:
    """Tokens per second of cached decoding against the context length, one sequence at a time."""
    lines = [
        [
            (row["context_tokens"], row["decode_tokens_per_second"])
            for row in dig(report, f"speed.{which}") or []
            if is_number(row.get("decode_tokens_per_second"))
        ]
        for which in ("teacher", "m_opt")
    ]
    return _two_lines("speed", "Decoding speed", "tokens/s", *lines, name=lambda value: f"{count(value)} tokens/s")


def memory_chart(report: dict) -> Markup | None:
    """Bytes of the cache of one sequence against the context length."""
    rows = [row for row in report.get("memory") or [] if is_number(row.get("teacher")) and is_number(row.get("m_opt"))]
    teacher, hybrid = ([(row["context_tokens"], row[which] / 1e6) for row in rows] for which in ("teacher", "m_opt"))
    return _two_lines("memory", "Cache of one sequence", "MB", teacher, hybrid, name=lambda mb: byte_size(mb * 1e6))


def _two_lines(
    key: str, title: str, unit: str, teacher: Sequence[Point], hybrid: Sequence[Point], *, name: Callable[[float], str]
) -> Markup | None:
    if len(teacher) < 2 or len(hybrid) < 2:
        return None
    x = Axis(label="context (tokens)", low=0, high=max(point[0] for point in (*teacher, *hybrid)))
    y = axis_over(f"{title.lower()} ({unit})", [0.0, *(point[1] for point in (*teacher, *hybrid))])
    at, last = teacher[-1]
    description = (
        f"{title} at {count(at)} tokens of context: teacher {name(last)}, hybrid {name(hybrid[-1][1])}. "
        "All values are in the table."
    )

    def draw(size: Size) -> Plot:
        plot = Plot(size, key=key, title=title, description=description, x=x, y=y)
        for points, line, dot, who in (
            (teacher, "teacher", "before", "teacher"),
            (hybrid, "val", "val", "hybrid"),
        ):
            plot.line(points, line)
            for point in points:
                plot.dot(point, dot, f"{who} at {count(point[0])} tokens: {name(point[1])}", radius=3)
        return plot

    return both_sizes(draw)
