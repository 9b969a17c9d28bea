"""Several runs on one page: one chart, one table, each run relative to its own teacher."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dtr.errors import DataError
from dtr.reporting.charts import comparison_chart
from dtr.reporting.curve import validation_curve
from dtr.reporting.folder import read_report
from dtr.reporting.formats import dig
from dtr.reporting.page import environment, without_nulls
from dtr.reporting.verdict import verdict


def compare(folders: Iterable[str | Path]) -> str:
    """An HTML page that overlays the validation curves of several run folders.

    Raises:
        OutputError, DataError: a folder holds no report, or no folder is given.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise DataError("compare", got="no run folder", expected="one or more", hint="As in dtr report --compare A B.")
    return _render([(str(path), read_report(path)) for path in paths])


def _render(runs: list[tuple[str, dict]]) -> str:
    layers, tasks = ({dig(report, key) for _, report in runs} for key in ("num_layers", "task.fingerprint"))
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=[{"name": name, "report": without_nulls(report), "verdict": verdict(report)} for name, report in runs],
            chart=comparison_chart(
                [(name, _relative_curve(report, as_share=len(layers) > 1)) for name, report in runs],
                x_is_share=len(layers) > 1,
            ),
            same_task=len(tasks) == 1 and None not in tasks,
        )
    )


def _relative_curve(report: dict, *, as_share: bool) -> list[tuple[float, float]]:
    """Layers replaced (number, or percent of all) and percent of the teacher's validation score kept."""
    points, num_layers = validation_curve(report), report.get("num_layers") or 1
    if not points or points[0].num_replaced or points[0].value <= 0:
        return []
    base, higher = points[0].value, dig(report, "teacher.val.higher_is_better") is not False
    scale = 100 / num_layers if as_share else 1.0
    return [
        (p.num_replaced * scale, 100 * (p.value / base if higher else base / p.value))
        for p in points
        if higher or p.value > 0
    ]
