"""Cutting long text into pieces that tokenize as the whole would. No torch in here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def cut_text(text: str, max_chars: int, separators: Sequence[str] = ("\n\n", "\n", " ")) -> Iterator[str]:
    """Pieces of at most `max_chars` characters that join to the text again.

    A cut goes before the last of the first separator that occurs in the second half of a piece, and before all white
    space there, as byte-level tokenizers glue a space to the word after it. Text without any is cut where it must be.
    """
    start = 0
    while len(text) - start > max_chars:
        yield text[start : (end := _cut(text, start, max_chars, separators))]
        start = end
    if start < len(text):
        yield text[start:]


def _cut(text: str, start: int, max_chars: int, separators: Sequence[str]) -> int:
    limit = start + max_chars
    for separator in separators:
        found = text.rfind(separator, start + max_chars // 2, limit + 1)
        while found > start and text[found - 1].isspace():
            found -= 1
        if found > start:
            return found
    return limit
