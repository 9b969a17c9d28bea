"""Errors a user can cause, and the one way in which they are worded.

Every message names the field or file, what came, what was expected and what to do next. The command line prints it on
one line and leaves with exit code 2. Broken invariants of our own are plain asserts, never one of these classes.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class DtrError(ValueError):
    """Base class of everything a user can cause; catch this one to catch them all."""

    exit_code = 2

    def __init__(self, where: str, *, got: str, expected: str, hint: str = "") -> None:
        """`where` is a field path or a file (with line); `hint` is the next step, a full sentence."""
        self.where, self.got, self.expected, self.hint = where, got, expected, hint
        super().__init__(f"{where}: got {got}; expected {expected}." + (f" {hint}" if hint else ""))


class RecipeError(DtrError):
    """A recipe, an option or an argument that cannot be meant."""


class ModelError(DtrError):
    """A teacher or hybrid that cannot be read or is of an unknown family."""


class DataError(DtrError):
    """Text or task data that is missing, malformed or too small."""


class BankError(DtrError):
    """A mixer bank that is damaged or belongs to something else."""


class OutputError(DtrError):
    """A run folder that cannot be written or would be overwritten."""


class DeviceError(DtrError):
    """A device, backend or library that is asked for and not there, or ran out of memory."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C after the state was saved; the message says how to go on (exit code 130)."""


def shown(value: Any) -> str:
    """A value for the `got` of a message: its `repr`, cut where it is long or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    short.maxlist = short.maxdict = 10
    try:
        return short.repr(value)
    except ValueError:
        # Python refuses to write out integers of more than 4,300 digits.
        return "a number of thousands of digits"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known name, or else lists what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."


def with_article(name: str) -> str:
    """The name after "a" or "an", by its first letter: an acc, a perplexity."""
    return f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"
