"""The one-screen summary that a finished run prints. ASCII only: terminals differ."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from dtr.reporting.formats import byte_size, change, count, dig, duration, interval, score, small
from dtr.reporting.verdict import verdict

_STYLES = {"held": "bold green", "not held": "bold red", "within noise": "bold yellow"}


def summary_table(report: dict) -> Table:
    """Teacher, M_opt and M_best side by side, what they cost, and whether the promise held. Fits 100 columns."""
    answer = verdict(report)
    table = Table(
        title=Text(f"{answer.headline}; promise on test: {answer.status}", style=_STYLES.get(answer.status, "bold")),
        caption=Text(answer.sentence),
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in ("teacher", "M_opt", "M_best"):
        table.add_column(name, overflow="fold")
    num_layers = count(report.get("num_layers"))
    models = ("m_opt", "m_best")

    def row(name: str, teacher: str, *hybrids: str) -> None:
        table.add_row(*(Text(cell) for cell in (name, teacher, *hybrids)))

    row("linear layers", "0", *(f"{count(dig(report, f'{m}.num_replaced'))} of {num_layers}" for m in models))
    unit = dig(report, "task.metric") or "score"
    for split, key in (("validation", "val"), ("test", "test")):
        row(f"{split} {unit}", *(score(dig(report, f"{m}.{key}"), "+/-") for m in ("teacher", *models)))
    row("test against teacher", "", *(change(dig(report, f"{m}.relative_test_drop")) for m in models))
    row("paired difference", "", *(interval(dig(report, f"{m}.paired")) for m in models))
    row("promise on test", "", *(verdict(report, m).status for m in models))  # type: ignore[arg-type]
    row(
        f"cache, {count(dig(report, 'm_opt.cache.context_tokens'))} tokens",
        byte_size(dig(report, "m_opt.cache.teacher_bytes")),
        *(byte_size(dig(report, f"{m}.cache.hybrid_bytes")) for m in models),
    )
    if realigned := report.get("realigned"):
        table.add_section()
        state = "kept apart" if realigned["kept"] else "not kept"
        row(
            "realigned M_opt",
            f"{count(realigned['num_tokens'])} tokens",
            f"validation {score(realigned['val'], '+/-')}",
            state,
        )
        row("", "", f"test {score(realigned['test'], '+/-')}", interval(realigned["paired"]))
    table.add_section()
    _add_cost(row, report)
    return table


def _add_cost(row, report: dict) -> None:  # type: ignore[no-untyped-def]
    row(
        "distillation",
        f"{count(dig(report, 'distill.num_tokens'))} tokens",
        duration(dig(report, "distill.seconds")),
        f"mean NMSE {small(dig(report, 'distill.mean_nmse'))}",
    )
    row(
        "search",
        f"{count(dig(report, 'search.candidate_evaluations'))} candidates",
        duration(dig(report, "search.seconds")),
        f"{small(dig(report, 'search.pass_equivalents'))} full passes",
    )
    row(
        "whole run",
        f"peak {byte_size(report.get('peak_rss_bytes'))}",
        duration(dig(report, "seconds.total")),
        str(dig(report, "hardware.device") or "device not measured"),
    )
