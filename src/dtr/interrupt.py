"""Ctrl-C that waits for a safe moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Set once the user has pressed Ctrl-C."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_at_safe_point() -> Iterator[Stop]:
    """While open, the first Ctrl-C only sets a flag that loops look at between steps; the second interrupts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; elsewhere an interrupt arrives as usual.
        yield stop
        return

    def request(_signum: int, _frame: Any) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
