"""Lines of JSON from outside, for tasks and text alike: bounded, each key once, nothing that breaks later on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from dtr.errors import DataError

MAX_ROW_CHARS = 8_000_000
"""Of one row: more than a million tokens of English."""


def bounded_lines(stream: IO[str], path: Path, max_chars: int = MAX_ROW_CHARS) -> Iterator[str]:
    """Lines of a text file; one without an end would otherwise fill the memory before anything can be said.

    Raises:
        DataError: a longer line, with its number.
    """
    number = 0
    while line := stream.readline(max_chars + 1):
        number += 1
        if len(line) > max_chars:
            got = f"a line of more than {max_chars:,} characters"
            raise DataError(f"{path}:{number}", got=got, expected="shorter lines", hint="Divide or remove it.")
        yield line


def parse_object(line: str) -> dict[str, Any]:
    """One JSON object with named fields.

    Raises:
        ValueError: says what came instead, for the `got` of a message.
    """
    try:
        data = json.loads(line, object_pairs_hook=_each_once)
        if "\\u" in line:
            # Half of a surrogate pair is valid JSON and no text: a tokenizer would fail on it.
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("broken JSON (nested too deeply)") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"half a character ({half}, a lone surrogate)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON ({error})") from None
    except ValueError as error:
        # Of `_each_once`, and of numbers with more digits than Python reads.
        raise ValueError(str(error).partition(";")[0].lower()) from None
    if not isinstance(data, dict):
        raise ValueError(f"a JSON {type(data).__name__}")
    return data


def named_twice(names: Sequence[str]) -> str | None:
    """The first name that comes again; None where each comes once."""
    counts = Counter(names)
    return next((name for name in counts if counts[name] > 1), None)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := named_twice([name for name, _ in pairs])) is not None:
        raise ValueError(f"the key '{name}' twice in one object")
    return dict(pairs)
