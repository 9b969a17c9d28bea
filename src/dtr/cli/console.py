"""What verbs write to the screen while they work and when they are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dtr.errors import Interrupted
from dtr.interrupt import ending_as_ctrl_c


class Stopped(Exception):
    """Ctrl-C with the state saved; typer would end a KeyboardInterrupt without a word."""


@contextmanager
def watched(log: str, board: Path | None = None) -> Iterator[Any]:
    from transformers.utils import logging

    from dtr.cli.board import open_board
    from dtr.cli.display import open_display

    # Bars of the library would run across our own, and between the lines of a JSON log.
    logging.disable_progress_bar()
    try:
        with ending_as_ctrl_c(), open_display(log) as show, open_board(board) if board else nullcontext() as draw:
            yield show if draw is None else lambda event: (show(event), draw(event))
    except KeyboardInterrupt as error:
        text = str(error) if isinstance(error, Interrupted) else "Stopped. Every finished candidate is saved."
        raise Stopped(text) from None


def conclude(record: dict[str, Any], out: Path, log: str) -> None:
    if log != "rich" or not record:
        return
    from dtr.reporting import summary_table

    show_table(summary_table(record))
    if sample := record.get("sample"):
        say(f"The hybrid writes: {sample['prompt']} {' '.join(sample['hybrid'].split())}")
    say(f"Report: {(out / 'report.html').resolve()}")


def show_table(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    # Piped output has no width of its own; 100 columns keep tables whole.
    (console if console.is_terminal else Console(width=100)).print(renderable)


def say(text: str) -> None:
    print(text, flush=True)
