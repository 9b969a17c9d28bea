"""A run folder to a page, a model card and a summary. No torch in here."""

from dtr.reporting.card import render_model_card
from dtr.reporting.comparison import compare
from dtr.reporting.folder import read_report, write_report
from dtr.reporting.page import render_html
from dtr.reporting.terminal import summary_table
from dtr.reporting.verdict import Verdict, verdict

__all__ = [
    "Verdict",
    "compare",
    "read_report",
    "render_html",
    "render_model_card",
    "summary_table",
    "verdict",
    "write_report",
]
