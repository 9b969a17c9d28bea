"""The search curve as a picture for a README or a paper, drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path

from dtr.errors import OutputError
from dtr.reporting.curve import test_curve, validation_curve
from dtr.reporting.formats import dig, is_number
from dtr.reporting.verdict import p_min_on_validation

# Okabe and Ito's colours, told apart by every kind of colour vision, and by marker here as well.
_BLUE, _ORANGE, _GREY, _RED = "#0072B2", "#E69F00", "#6b7280", "#D55E00"


def curve_figure(report: dict, path: str | Path) -> Path:
    """Write score against number of replaced layers; the file's ending (.png, .svg, .pdf) decides the format.

    Raises:
        OutputError: the ending is unknown or the file cannot be written.
    """
    # Half a second of import that no other part of a report needs.
    from matplotlib.figure import Figure

    path = Path(path)
    points, tests, p_min = validation_curve(report), test_curve(report), p_min_on_validation(report)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    if points:
        axes.axhline(points[0].value, color=_GREY, linewidth=1, linestyle="--", label="teacher (validation)")
        axes.errorbar(
            [p.num_replaced for p in points],
            [p.value for p in points],
            yerr=[p.stderr for p in points],
            color=_BLUE,
            marker="o",
            markersize=4,
            elinewidth=0.8,
            label="validation, 1 standard error",
        )
    if is_number(p_min):
        axes.axhline(p_min, color=_RED, linewidth=1, linestyle=":", label="P_min (validation)")
    if tests:
        x, y = [p.num_replaced for p in tests], [p.value for p in tests]
        axes.plot(x, y, "D", color=_ORANGE, markersize=4, label="test")
    opt, best = (dig(report, f"{which}.num_replaced") for which in ("m_opt", "m_best"))
    for row, (k, name) in enumerate([(opt, "M_opt = M_best")] if opt == best else [(opt, "M_opt"), (best, "M_best")]):
        if is_number(k) and points:
            axes.axvline(k, color="black", linewidth=0.8, linestyle=":", zorder=0)
            # Towards the middle, so that no name leaves the picture.
            inwards = -1 if k > points[-1].num_replaced / 2 else 1
            axes.annotate(
                name,
                (k, 0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(4 * inwards, 4 + 12 * row),
                textcoords="offset points",
                ha="left" if inwards > 0 else "right",
                weight="bold",
                fontsize=9,
            )
    lower = dig(report, "teacher.val.higher_is_better") is False
    axes.set_ylabel(f"{dig(report, 'task.metric') or 'score'}{' (lower is better)' if lower else ''}")
    axes.set_xlabel(f"layers replaced, of {report.get('num_layers', 'an unknown number')}")
    axes.spines[["top", "right"]].set_visible(False)
    if points or tests:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=200)
    except (OSError, ValueError) as error:
        raise OutputError(
            str(path), got=str(error), expected="a writable .png, .svg or .pdf file", hint="Check folder and ending."
        ) from None
    return path
