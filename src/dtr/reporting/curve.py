"""The search curve as plain points: what the page and the comparison draw."""

from __future__ import annotations

from dataclasses import dataclass

from dtr.reporting.formats import dig, is_number


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A hybrid with this many layers replaced."""

    num_replaced: int
    value: float
    stderr: float
    """0 where it was not measured."""
    layer: int | None = None
    """The layer that was replaced last; None for the teacher."""
    accepted: bool = True


def validation_curve(report: dict) -> list[CurvePoint]:
    """The teacher and every step of the search, on validation."""
    points = [_point(0, dig(report, "teacher.val"))]
    for step in dig(report, "search.steps") or []:
        accepted = step.get("accepted") is not False
        points.append(_point(step.get("index"), step.get("score"), layer=step.get("layer"), accepted=accepted))
    return [point for point in points if point is not None]


def test_curve(report: dict) -> list[CurvePoint]:
    """Whatever was scored on test: the teacher, M_opt, M_best and any step that carries a test score."""
    found = {0: _point(0, dig(report, "teacher.test"))}
    for step in dig(report, "search.steps") or []:
        found[step.get("index")] = _point(step.get("index"), step.get("test"), layer=step.get("layer"))
    for which in ("m_best", "m_opt"):
        num_replaced = dig(report, f"{which}.num_replaced")
        found[num_replaced] = _point(num_replaced, dig(report, f"{which}.test")) or found.get(num_replaced)
    return sorted((point for point in found.values() if point is not None), key=lambda point: point.num_replaced)


def _point(
    num_replaced: int | None, score: dict | None, *, layer: int | None = None, accepted: bool = True
) -> CurvePoint | None:
    value, stderr = dig(score, "value"), dig(score, "stderr")
    if num_replaced is None or value is None or not is_number(value):
        return None
    return CurvePoint(
        num_replaced=num_replaced,
        value=value,
        stderr=stderr if stderr is not None and is_number(stderr) else 0.0,
        layer=layer,
        accepted=accepted,
    )
