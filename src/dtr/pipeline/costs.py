"""Around the stages of a run: what they take, added up over all processes of it, and advice when memory runs out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dtr.errors import DeviceError, OutputError
from dtr.files import read_json, write_json
from dtr.selection.search import SearchResult

SAVE_SECONDS = 5.0
"""What of its costs a process that is killed may lose."""
SEARCH = "search"
WORK = ("pass_equivalents", "guard_pass_equivalents")


class Costs:
    """Seconds spent in named stages and in all, and passes of the search; with those of the processes before this one.

    They are kept in a file from `open` on, so that a run which was stopped and resumed tells all that it took.
    """

    def __init__(self) -> None:
        self._started = self._saved = time.monotonic()
        self._stages: dict[str, float] = {}
        self._stage, self._began = "", 0.0
        self._search: dict[str, float] = {"seconds": 0.0, **dict.fromkeys(WORK, 0.0)}
        self._path: Path | None = None
        self._before: dict[str, Any] = {"processes": 0, "seconds": {}, "search": {}}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._stage, self._began = stage, time.monotonic()
        yield
        self._stages[stage] = self._spent()
        self._stage = ""
        self.save()

    def open(self, path: Path) -> None:
        """Go on with the costs in a file, if it is there, and keep ours in it.

        Raises:
            OutputError: it is damaged.
        """
        if os.path.exists(path):
            try:
                found = read_json(path)
                self._before = {key: found[key] for key in self._before}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    str(path),
                    got=f"{type(error).__name__}: {error}",
                    expected="what the run took so far",
                    hint="Delete it to go on; the report then tells what the run takes from here on.",
                ) from None
        self._path = path
        self.save()

    def hear(self, event: dict[str, Any]) -> None:
        """Learn from an event how far a search has come, and save now and then."""
        if event["event"] in ("teacher", "candidate") and self._stage == SEARCH:
            self._search["seconds"] = self._spent()
            self._search |= {name: event[name] for name in WORK if name in event}
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        if self._path is not None:
            write_json(self._path, self._added(), sealed=True)
            self._saved = time.monotonic()

    def add_search(self, result: SearchResult) -> SearchResult:
        """The result with what earlier processes spent on the search."""
        self._search = {"seconds": result.seconds, **{name: getattr(result, name) for name in WORK}}
        return replace(result, **self._added()["search"])

    @property
    def num_processes(self) -> int:
        return self._before["processes"] + 1

    def seconds(self) -> dict[str, float]:
        """By stage, and the total."""
        return self._added()["seconds"]

    def _added(self) -> dict[str, Any]:
        running = {self._stage: self._spent()} if self._stage else {}
        own = {**self._stages, **running, "total": time.monotonic() - self._started}
        return {
            "processes": self.num_processes,
            "seconds": _sum(self._before["seconds"], own),
            "search": _sum(self._before["search"], self._search),
        }

    def _spent(self) -> float:
        return time.monotonic() - self._began


def _sum(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    # The total stays last.
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in dict.fromkeys([*other, *one])}


@contextmanager
def memory_advice(knob: str) -> Iterator[None]:
    """Say which setting to change when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch raises a plain RuntimeError.
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        raise DeviceError(
            "memory",
            got=next(iter(str(error).splitlines()), "out of memory"),
            expected="a step that fits",
            hint=f"Lower {knob}, then go on with --resume.",
        ) from error
