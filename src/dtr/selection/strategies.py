"""Every strategy there is; a new one is a file with one decorated function, imported here."""

from __future__ import annotations

from dtr.selection import auto, baselines, exact
from dtr.selection.registry import STRATEGIES

__all__ = ["STRATEGIES", "auto", "baselines", "exact"]
