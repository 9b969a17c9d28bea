"""The part of a text that a user's regular expression finds, in bounded time and memory. No torch in here."""

from __future__ import annotations

import math
import re

import regex

from dtr.errors import DataError, RecipeError

SECONDS = 10.0
"""Of processor time for one text; patterns that do not try the same characters over and over take microseconds."""
MAX_WRITTEN_OUT = 1_000_000
"""Characters of a pattern with its repeats written out, which is how it is held in memory."""
WHERE = "task.options.extract"
_REPEAT = re.compile(r"\{(\d+)")


class Extractor:
    """Finds the last match of a pattern (its first group, if it has one).

    Args:
        pattern: as Python's `re` takes it.

    Raises:
        RecipeError: no regular expression, or one whose repeats multiply to more than memory should hold.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        repeats = [max(1, int(digits[:20])) for digits in _REPEAT.findall(pattern)]
        if len(pattern) * math.prod(repeats) > MAX_WRITTEN_OUT:
            raise RecipeError(
                WHERE,
                got=f"{_shown(pattern)}, whose repeats multiply to {math.prod(repeats):,}",
                expected=f"a pattern of at most {MAX_WRITTEN_OUT:,} characters with its repeats written out",
                hint="Write + or * for long repeats.",
            )
        try:
            self._compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            got = f"{_shown(pattern)} ({error})"
            raise RecipeError(WHERE, got=got, expected="a regular expression") from None

    def last(self, text: str, *, item: str) -> str | None:
        """The last match in a text, None where there is none.

        Args:
            item: what the text belongs to, for the message.

        Raises:
            DataError: the pattern takes longer than `SECONDS` on this text.
        """
        found = None
        try:
            for match in self._compiled.finditer(text, timeout=SECONDS):
                found = match[1] if self._compiled.groups else match[0]
        except TimeoutError:
            raise DataError(
                WHERE,
                got=f"{_shown(self.pattern)}, which is not done after {SECONDS:g} s with {len(text):,} characters of "
                f"item {item}",
                expected="a pattern that is done at once",
                hint="Repeats inside of repeats try the same characters over and over, as (a|aa)+ does: rewrite them.",
            ) from None
        return found


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
