"""Rows of a task from JSON Lines files: one object a line, in a folder with one file per split or in a single file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    try:
        # utf-8-sig also takes files that an editor began with a byte order mark.
        require_file(path)
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(bounded_lines(file, path), start=1):
                if line.strip():
                    rows.append(Row(file=path, line=number, data=_parse_line(line, f"{path}:{number}")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            str(path), got=str(error), expected="a readable UTF-8 file", hint="Check the path and the encoding."
        ) from None
    if not rows:
        raise DataError(str(path), got="an empty file", expected="one JSON object a line")
    return rows


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
