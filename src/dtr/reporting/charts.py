"""The charts of a report, from its plain records. Each returns None where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from markupsafe import Markup

from dtr.reporting.curve import CurvePoint, test_curve, validation_curve
from dtr.reporting.formats import count, dig, is_number, metric, small
from dtr.reporting.plot import Axis, Plot, Size, axis_over, both_sizes
from dtr.reporting.verdict import p_min_on_validation

# A perplexity can grow a hundredfold along the curve; a linear axis would then flatten the part that matters.
_LOG_ABOVE_RATIO = 10.0


def score_chart(report: dict) -> Markup | None:
    """Score against number of replaced layers: validation with error bars, test, teacher, P_min, M_opt and M_best."""
    points, tests = validation_curve(report), test_curve(report)
    if len(points) < 2:
        return None
    p_min, name = p_min_on_validation(report), dig(report, "task.metric") or "score"
    lower = dig(report, "teacher.val.higher_is_better") is False
    num_layers = report.get("num_layers") or max(point.num_replaced for point in points)
    ends = [p.value + sign * p.stderr for p in points for sign in (-1, 1)] + [p.value for p in tests]
    values = [point.value for point in points]
    log = lower and max(values) > _LOG_ABOVE_RATIO * min(values) > 0
    y = axis_over(f"{name} (lower is better)" if lower else name, [*ends, p_min], log=log, room_below=0.2)
    x = Axis(label="layers replaced", low=-0.4, high=num_layers + 0.4, whole=True)
    last = points[-1]
    description = (
        f"Validation {name} from {metric(points[0].value)} for the teacher to {metric(last.value)} with "
        f"{last.num_replaced} of {num_layers} layers replaced; limit {metric(p_min)}. All values are in the table."
    )

    def draw(size: Size) -> Plot:
        plot = Plot(
            size, key="score", title="Score against number of replaced layers", description=description, x=x, y=y
        )
        plot.level(points[0].value, "teacher")
        if is_number(p_min):
            plot.level(p_min, "limit")
        plot.line([(p.num_replaced, p.value) for p in points], "val")
        for p in points:
            plot.error_bar((p.num_replaced, p.value), p.stderr, "val thin")
        for p in tests:
            plot.dot(
                (p.num_replaced, p.value), "test", f"{p.num_replaced} replaced: test {metric(p.value)}", square=True
            )
        for p in points:
            plot.dot((p.num_replaced, p.value), "val" if p.accepted else "val hollow", _note(p))
        _mark_models(plot, report, points)
        return plot

    return both_sizes(draw)


def _note(point: CurvePoint) -> str:
    what = "teacher" if point.layer is None else f"{point.num_replaced} replaced, last layer {point.layer}"
    return f"{what}: validation {metric(point.value)} \u00b1 {metric(point.stderr)}"


def _mark_models(plot: Plot, report: dict, points: Sequence[CurvePoint]) -> None:
    """Ring M_opt and M_best and name them near the axis, where no other mark is."""
    opt, best = (dig(report, f"{which}.num_replaced") for which in ("m_opt", "m_best"))
    at = {point.num_replaced: (float(point.num_replaced), point.value) for point in points}
    names = [(opt, "M_opt = M_best")] if opt == best else [(opt, "M_opt"), (best, "M_best")]
    for row, (num_replaced, name) in enumerate(names):
        if num_replaced in at:
            plot.drop(at[num_replaced])
            plot.dot(at[num_replaced], "ring", "", radius=8)
            plot.name(num_replaced, name, row=row)


def nmse_chart(report: dict) -> Markup | None:
    """Error of each layer before and after distillation, on a log scale."""
    rows = [row for row in dig(report, "distill.nmse") or [] if _is_positive(row.get("after"))]
    if not rows:
        return None
    starts = [row.get("before") for row in rows]
    y = axis_over("normalised squared error", [*starts, *(row["after"] for row in rows)], log=True, name_tick=small)
    layers, kinds = [row["layer"] for row in rows], dig(report, "mixer.kinds") or []
    beside = {kind: 0.6 * (at - (len(kinds) - 1) / 2) / len(kinds) for at, kind in enumerate(kinds)}
    x = Axis(label="layer", low=min(layers) - 0.6, high=max(layers) + 0.6, whole=True)
    worst = max(rows, key=lambda row: row["after"])
    description = (
        f"Mean error over layers {small(dig(report, 'distill.mean_nmse'))} after distillation; worst is layer "
        f"{worst['layer']} with {small(worst['after'])}. All values are in the table."
    )

    def draw(size: Size) -> Plot:
        plot = Plot(size, key="nmse", title="Error of each layer", description=description, x=x, y=y)
        for row in rows:
            before, after, place = row.get("before"), row["after"], row["layer"] + beside.get(row.get("kind"), 0.0)
            name = " ".join(["layer", str(row["layer"]), *filter(None, [row.get("kind")])])
            if _is_positive(before):
                plot.line([(place, before), (place, after)], "stem")
                plot.dot((place, before), "before", f"{name} before: {small(before)}")
            plot.dot((place, after), "val", f"{name} after: {small(after)}")
        return plot

    return both_sizes(draw)


def distillation_chart(report: dict) -> Markup | None:
    """Mean error over the tokens of distillation, with the range over layers behind it."""
    rows = [row for row in dig(report, "distill.curve") or [] if _is_positive(row.get("mean_nmse"))]
    if len(rows) < 2:
        return None
    spans = []
    for row in rows:
        each = [v for v in row.get("nmse") or [] if _is_positive(v)] or [row["mean_nmse"]]
        spans.append((row["num_tokens"], min(each), max(each)))
    ends = [end for _, low, high in spans for end in (low, high)]
    y = axis_over("normalised squared error", ends, log=True, name_tick=small)
    x = Axis(label="tokens", low=0, high=max(row["num_tokens"] for row in rows), name_tick=_short_count)
    description = (
        f"Mean error from {small(rows[0]['mean_nmse'])} to {small(rows[-1]['mean_nmse'])} over "
        f"{count(rows[-1]['num_tokens'])} tokens; the band spans the best and the worst layer."
    )

    def draw(size: Size) -> Plot:
        plot = Plot(size, key="curve", title="Error during distillation", description=description, x=x, y=y)
        plot.band([(t, low) for t, low, _ in spans], [(t, high) for t, _, high in spans], "band")
        plot.line([(row["num_tokens"], row["mean_nmse"]) for row in rows], "val")
        for row in rows:
            note = f"{count(row['num_tokens'])} tokens: mean {small(row['mean_nmse'])}"
            plot.dot((row["num_tokens"], row["mean_nmse"]), "val", note, radius=2.5)
        return plot

    return both_sizes(draw)


def comparison_chart(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, x_is_share: bool) -> Markup | None:
    """Several searches: share of the teacher's validation score kept, against layers replaced."""
    if not any(len(points) > 1 for _, points in curves):
        return None
    y = axis_over("share of the teacher's score (%)", [y for _, points in curves for _, y in points])
    high = max(x for _, points in curves for x, _ in points)
    x = Axis(label="layers replaced (%)" if x_is_share else "layers replaced", low=0, high=high or 1, whole=True)
    description = f"Validation curves of {len(curves)} runs, each relative to its own teacher; see the table."

    def draw(size: Size) -> Plot:
        plot = Plot(size, key="compare", title="Runs side by side", description=description, x=x, y=y)
        plot.level(100.0, "teacher")
        for number, (name, points) in enumerate(curves):
            plot.line(points, f"run run{number % 6}{' dashed' if number // 6 % 2 else ''}")
            for point in points:
                note = f"{name}: {point[0]:.4g} replaced, {point[1]:.1f} % kept"
                plot.dot(point, f"rundot{number % 6}", note, radius=2.5)
        return plot

    return both_sizes(draw)


def _is_positive(value: object) -> TypeGuard[float]:
    return is_number(value) and value > 0


def _short_count(value: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
