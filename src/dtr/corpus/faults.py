"""What could not be read of a text: named, counted, and passed over. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dtr.errors import DataError

MAX_NAMED = 20


class Faults:
    """Collects files and rows that cannot be read, each counted once however often the text is repeated.

    Args:
        on_event: called with {event: text_fault, ...} for the first `MAX_NAMED` of them.
    """

    def __init__(self, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._on_event = on_event or (lambda event: None)
        self._seen: set[str] = set()
        self.named: list[str] = []

    @property
    def count(self) -> int:
        return len(self._seen)

    def add(self, error: DataError) -> None:
        """Take note of one file or row."""
        if error.where in self._seen:
            return
        self._seen.add(error.where)
        if len(self.named) < MAX_NAMED:
            self.named.append(f"{error.where}: {error.got}")
            self._on_event({"event": "text_fault", "where": error.where, "got": error.got, "count": self.count})

    def summary(self) -> str:
        """One clause: how many, and the first by name."""
        return f"{self.count} passed over, the first {self.named[0]}"


def faults_record(by_source: Mapping[str, Faults]) -> dict[str, Any]:
    """For the report: how many in all and by source, and the first by name."""
    return {
        "count": sum(faults.count for faults in by_source.values()),
        "by_source": {source: faults.count for source, faults in by_source.items()},
        "named": [name for faults in by_source.values() for name in faults.named][:MAX_NAMED],
    }
