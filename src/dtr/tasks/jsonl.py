"""Rows of a task from JSON Lines files: one object a line, in a folder with one file per split or in a single file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dtr.errors import DataError, RecipeError
from dtr.files import require_file
from dtr.json_lines import bounded_lines, parse_object

_EXPRESSION = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row and where it stands."""

    file: Path
    line: int
    """Line of the file, from 1; for plain text the number of the document."""
    data: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def id(self) -> str:
        return f"{self.file.name}:{self.line}"

    def require(self, field: str) -> Any:
        """The value of a field.

        Raises:
            DataError: the row has no such field; names those it has.
        """
        if field not in self.data:
            raise DataError(
                self.where,
                got=f"a row without '{field}'",
                expected=f"the field '{field}'",
                hint=f"Fields of this row: {', '.join(map(str, self.data)) or 'none'}.",
            )
        return self.data[field]

    def text(self, field: str) -> str:
        """The value of a field that must be text.

        Raises:
            DataError: no such field, or not text.
        """
        value = self.require(field)
        if not isinstance(value, str):
            raise self.wrong(field, value, "text")
        return value

    def as_text(self, field: str, value: object) -> str:
        """A value of this row as the text that a model reads: text as it is, and numbers as Python writes them.

        Raises:
            DataError: anything else, as a missing value, NaN, bytes or a list, none of which is meant to be read.
        """
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if not isinstance(value, str) and not is_number:
            raise self.wrong(field, value, "text or a number", "Fill in the row, or leave it out.")
        return str(value)

    def whole_number(self, field: str) -> Any:
        """The value of a field that should be a whole number. In a CSV file, where all is text, digits are one."""
        value = self.require(field)
        if self.file.suffix == ".csv" and isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
            return int(value)
        return value

    def wrong(self, field: str, value: object, expected: str, hint: str = "") -> DataError:
        """The error for a value that cannot be meant."""
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return DataError(self.where, got=f"{shown} in '{field}'", expected=expected, hint=hint)


@dataclass(frozen=True, kw_only=True)
class SplitExpression:
    """A split name with an optional row range, as `test[0:250]`; negative numbers count from the end."""

    name: str
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str, where: str) -> SplitExpression:
        """Read an expression of the recipe.

        Raises:
            RecipeError: not of that form.
        """
        match = _EXPRESSION.fullmatch(text.strip())
        if match is None:
            raise RecipeError(
                where,
                got=f"'{text}'",
                expected="a split name, or rows of a split as 'test[0:250]' or 'train[-100:]'",
                hint="Rows count from 0 and the second number is the first row left out.",
            )
        start, stop = (int(match[part]) if match[part] else None for part in ("start", "stop"))
        return cls(name=match["name"], start=start, stop=stop)

    def select(self, rows: Sequence[Row], where: str) -> list[Row]:
        """The rows that are meant.

        Raises:
            DataError: the range reaches outside of the file, or holds no row.
        """
        got = f"{len(rows)} rows in {rows[0].file}"
        for bound in (self.start, self.stop):
            if bound is not None and not -len(rows) <= bound <= len(rows):
                raise DataError(where, got=got, expected=f"enough rows for the bound {bound}", hint="Shrink the range.")
        chosen = list(rows[self.start : self.stop])
        if not chosen:
            raise DataError(
                where,
                got=f"no row between {self.start} and {self.stop} of {got}",
                expected="at least one row",
                hint="Rows count from 0 and the second number is the first row left out.",
            )
        return chosen


def read_jsonl(path: Path) -> list[Row]:
    """All rows of a file in order; blank lines are skipped.

    Raises:
        DataError: unreadable, not UTF-8, a line that is no JSON object (with its number), or no row at all.
    """
    rows = []
    with open_text(path) as file:
        for number, line in enumerate(bounded_lines(file, path), start=1):
            if line.strip():
                rows.append(Row(file=path, line=number, data=_parse_line(line, f"{path}:{number}")))
    if not rows:
        raise DataError(str(path), got="an empty file", expected="one JSON object a line")
    return rows


@contextmanager
def open_text(path: Path, **options: Any) -> Iterator[IO[str]]:
    """A text file, open for reading; a byte order mark is taken off. `options` are those of `Path.open`.

    Raises:
        DataError: unreadable, or not UTF-8; here or while it is read.
    """
    try:
        require_file(path)
        # UTF-16 without a mark can be valid UTF-8, with a zero byte beside each letter.
        with path.open("rb") as start:
            if b"\0" in start.read(4096):
                raise _not_utf8(path, "zero bytes, as UTF-16 has them")
        with path.open(encoding="utf-8-sig", **options) as file:
            yield file
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"{error.reason} at byte {error.start} of a block") from None
    except OSError as error:
        raise DataError(
            str(path), got=str(error), expected="a readable UTF-8 file", hint="Check the path and its permissions."
        ) from None


def _not_utf8(path: Path, reason: str) -> DataError:
    return DataError(
        str(path),
        got=f"text that is not UTF-8 ({reason})",
        expected="UTF-8",
        hint="Save it as UTF-8; spreadsheets call that 'CSV UTF-8'.",
    )


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        return parse_object(line)
    except ValueError as error:
        raise DataError(
            where,
            got=str(error),
            expected='one JSON object a line with named fields, as {"question": ...}',
            hint="Mend or remove the line.",
        ) from None
