"""Write the table of measured results in README.md, and its picture, from the reports in benchmarks/results.

    python docs/make_results.py

Numbers reach the README no other way; `tests/test_docs.py` compares. Reports of whole runs count; other files there,
such as benchmarks of single parts, have pages of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "images"
START, END = "<!-- results: made by docs/make_results.py -->", "<!-- end of results -->"
NONE_YET = "The first GPU results are being measured."
HEAD = (
    "| task | teacher | layers replaced | test, teacher | test, hybrid | distilled on | hardware | whole run |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def results_table() -> str:
    """The table and pictures, or a sentence while there is nothing to show."""
    rows = [_row(path, report) for path, report in _reports()]
    pictures = [
        f"\n![Test and validation score against the number of linear layers](docs/images/{path.stem}.png)"
        for path, report in _reports()
        if _has_test_curve(report)
    ]
    return "\n".join([HEAD, *rows, *pictures]) if rows else NONE_YET


def draw_curves() -> list[Path]:
    """The curves of the runs that scored every step on test."""
    from dtr.reporting import curve_figure

    IMAGES.mkdir(exist_ok=True)
    return [curve_figure(report, IMAGES / f"{path.stem}.png") for path, report in _reports() if _has_test_curve(report)]


def _has_test_curve(report: dict[str, Any]) -> bool:
    return any(step.get("test") for step in report["search"]["steps"])


def _reports() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(report, dict) and {"teacher", "m_opt", "distill", "hardware"} <= report.keys():
            yield path, report


def _row(path: Path, report: dict[str, Any]) -> str:
    cells = (
        f"[{report['task']['name']}](benchmarks/results/{path.name}), {report['teacher']['test']['metric']}",
        Path(report["teacher"]["source"]).name,
        f"{report['m_opt']['num_replaced']} of {report['num_layers']}",
        _score(report["teacher"]["test"]),
        _score(report["m_opt"]["test"]),
        f"{report['distill']['num_tokens'] / 1e6:.2g}M tokens",
        report["hardware"].get("gpu") or f"{report['hardware']['num_cores']} CPU cores",
        _duration(report["seconds"]),
    )
    return f"| {' | '.join(cells)} |"


def _score(score: dict[str, Any]) -> str:
    return f"{score['value']:.3f} ± {score['stderr']:.3f}"


def _duration(seconds: Any) -> str:
    total = seconds["total"] if isinstance(seconds, dict) else seconds
    return f"{total / 60:.1f} min"


def with_table(readme: str) -> str:
    """The README with the table put between its two marks."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    assert after, f"README.md has lost the marks '{START}' and '{END}'"
    return f"{before}{START}\n{results_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(README, *draw_curves())
