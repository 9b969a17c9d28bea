"""Ctrl-C, and the signals of a batch system or a closed terminal, that wait for a safe moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What asks a process to end; there is no SIGHUP on Windows."""


class Stop:
    """Set once the process was asked to end."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_at_safe_point() -> Iterator[Stop]:
    """While open, the first Ctrl-C, SIGTERM or SIGHUP only sets a flag that loops look at between steps; the second
    interrupts at once."""
    stop = Stop()

    def request(_signum: int, _frame: Any) -> None:
        stop.requested = True
        for number, handler in before.items():
            signal.signal(number, handler)

    before = _handle(request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_as_ctrl_c() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that all end in one way."""

    def interrupt(_signum: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = _handle(interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(handler: Any) -> dict[int, Any]:
    """Set the handler of each of SIGNALS that is not ignored, as nohup has SIGHUP; returns those before it."""
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; elsewhere an interrupt arrives as usual.
        return {}
    before = {}
    for number in SIGNALS:
        with suppress(ValueError, OSError):
            if (now := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                signal.signal(number, handler)
                before[number] = now
    return before
