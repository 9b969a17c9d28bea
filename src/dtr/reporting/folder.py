"""`report.json` and `report.html` of a run folder: written whole or not at all, read back with a check."""

from __future__ import annotations

import os
from pathlib import Path

from dtr.errors import DataError, OutputError
from dtr.files import read_json, write_json, write_text
from dtr.reporting.page import render_html

FORMAT = 1
JSON_NAME, HTML_NAME = "report.json", "report.html"


def write_report(folder: str | Path, report: dict) -> Path:
    """Write `report.json` and `report.html` into a run folder and return the path of the page.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    # The page first: if drawing it fails, the folder keeps a pair of files that belong together.
    page = render_html(report)
    write_json(folder / JSON_NAME, report, sealed=True)
    write_text(folder / HTML_NAME, page)
    return folder / HTML_NAME


def read_report(folder: str | Path) -> dict:
    """Read `report.json` of a run folder (or that file itself).

    Raises:
        OutputError: there is no report.
        DataError: the file is damaged, or not a report of this tool, or of a later version.
    """
    path = Path(folder)
    path = path if path.suffix == ".json" else path / JSON_NAME
    try:
        report = read_json(path)
    except OSError:
        hint = "Check the path; a run writes its report at the end."
        if os.path.isfile(path.parent / "recipe.yaml"):
            hint = "The run is not finished: start it again with the same command and --resume."
        raise OutputError(
            str(path), got="no readable report", expected="the folder of a finished run", hint=hint
        ) from None
    except ValueError as error:
        raise DataError(
            str(path),
            got=str(error),
            expected="the report as it was written",
            hint="Run again with --resume to write it anew.",
        ) from None
    if not isinstance(report, dict) or "format" not in report or "dtr_version" not in report:
        raise DataError(str(path), got="another kind of JSON", expected="a report with 'format' and 'dtr_version'")
    if report["format"] != FORMAT:
        raise DataError(
            str(path),
            got=f"format {report['format']!r} of dtr {report['dtr_version']}",
            expected=f"format {FORMAT}",
            hint="Read it with the version of dtr that wrote it.",
        )
    return report
