"""Strategies by name; each is one decorated function in one file, imported by `dtr.selection.strategies`."""

from __future__ import annotations

from collections.abc import Callable

from dtr.registry import Registry
from dtr.selection.state import Search

STRATEGIES: Registry[Callable[[Search], None]] = Registry("search.strategy")
"""Name to the function that makes layers linear by `Search.take`, from the teacher on, until P_min is missed."""

strategy = STRATEGIES.register
