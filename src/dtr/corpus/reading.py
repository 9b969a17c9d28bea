"""Documents from text files, folders and the Python documentation. No torch in here."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dtr.corpus import python_docs
from dtr.corpus.cutting import cut_text
from dtr.errors import DataError
from dtr.files import require_file, suggest_path, user_path
from dtr.json_lines import bounded_lines, parse_object

OnFault = Callable[[DataError], None]
PYTHON_DOCS = "python-docs"
DOCUMENT_LINE = "<|doc|>"
"""A line that holds only this ends a document of a plain text file."""
SECTION_CHARS = 8_000
"""A plain text file without such lines is cut into sections of at most this length."""
MAX_LINE_CHARS = 256_000_000
"""Of one line of text, compressed or not: far more than any book has."""
_PLAIN = (".txt", ".md")
_PACKED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
SUFFIXES = (
    *(suffix + packed for suffix in (*_PLAIN, ".jsonl") for packed in ("", *_PACKED)),
    ".parquet",
)


def find_files(source: str | Sequence[str]) -> list[Path | str]:
    """Files of a source in a fixed order; `python-docs` stands for itself. Folders are searched to the bottom.

    Raises:
        DataError: no such file, an unknown suffix, or a folder without text.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError("text.source", got="an empty list", expected="at least one file, folder or 'python-docs'")
    files: list[Path | str] = []
    for name in sources:
        path = user_path(name)
        if name == PYTHON_DOCS:
            files.append(name)
        elif os.path.isdir(path):
            found = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in SUFFIXES)
            if not found:
                raise DataError(name, got="a folder without text", expected=f"files that end in {', '.join(SUFFIXES)}")
            files += found
        elif not os.path.exists(path):
            raise DataError(
                "text.source",
                got=f"'{name}', which does not exist",
                expected="a file, a folder, hf:NAME or 'python-docs'",
                hint=suggest_path(name, [PYTHON_DOCS]),
            )
        elif _suffix(path) not in SUFFIXES:
            raise DataError(name, got=f"the suffix '{path.suffix}'", expected=f"one of {', '.join(SUFFIXES)}")
        else:
            with _naming(path):
                require_file(path)
            files.append(path)
    # The same file given twice would stand in train and held-out blocks.
    return list(dict.fromkeys(file if isinstance(file, str) else file.resolve() for file in files))


def is_plain_text(path: Path) -> bool:
    """Whether a file is read as plain text."""
    suffix = _suffix(path)
    return any(suffix in (plain, *(plain + packed for packed in _PACKED)) for plain in _PLAIN)


def read_documents(file: Path | str, *, on_fault: OnFault | None = None) -> Iterator[str]:
    """Documents of one file, stripped, without empty ones.

    Args:
        file: from `find_files`.
        on_fault: told of what cannot be read, which is then passed over: a row without text, or the rest of a file.

    Raises:
        DataError: unreadable, damaged or not UTF-8 (names the file), or a row without text (names the line); only
            where there is no `on_fault`.
    """
    if file == PYTHON_DOCS:
        yield from python_docs.read_documents()
        return
    path = Path(file)
    try:
        for document in _documents(path, on_fault):
            if stripped := document.strip():
                yield stripped
    except DataError as error:
        if on_fault is None:
            raise
        on_fault(error)


def _documents(path: Path, on_fault: OnFault | None) -> Iterator[str]:
    if is_plain_text(path):
        return _read_plain(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return _read_jsonl(path, on_fault)


def _read_plain(path: Path) -> Iterator[str]:
    lines: list[str] = []
    has_separators = False
    for line in _lines(path):
        if line.strip() == DOCUMENT_LINE:
            has_separators = True
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    rest = "".join(lines)
    yield from [rest] if has_separators else cut_text(rest, SECTION_CHARS)


def _read_jsonl(path: Path, on_fault: OnFault | None) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield _text_of(line, f"{path}:{number}")
        except DataError as error:
            if on_fault is None:
                raise
            on_fault(error)


def _text_of(line: str, where: str) -> str:
    try:
        row = parse_object(line)
    except ValueError as error:
        raise DataError(where, got=str(error), expected="one JSON object a line") from None
    if not isinstance(row.get("text"), str):
        hint = "The field 'text' must hold text." if "text" in row else ""
        got = f"a row with the fields {', '.join(row) or 'none'}"
        raise DataError(where, got=got, expected="an object with the field 'text'", hint=hint)
    return row["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    # pyarrow comes with datasets; importing it takes a while and most text is not Parquet.
    import pyarrow
    import pyarrow.parquet

    with _naming(path, pyarrow.ArrowException):
        table = pyarrow.parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise DataError(str(path), got=f"the columns {names}", expected="a column 'text'")
        if table.schema_arrow.names.count("text") > 1:
            raise DataError(str(path), got="the column 'text' twice", expected="it once", hint="Rename one of them.")
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for value in batch.column(0).to_pylist():
                if value is not None and not isinstance(value, str):
                    raise DataError(str(path), got=f"a {type(value).__name__} in 'text'", expected="text")
                yield value or ""


def _lines(path: Path) -> Iterator[str]:
    opener: Any = _PACKED.get(path.suffix, open)
    with _naming(path, lzma.LZMAError, zlib.error, EOFError), opener(path, "rb") as raw:
        stream: IO[str] = io.TextIOWrapper(raw, encoding="utf-8-sig")
        yield from bounded_lines(stream, path, MAX_LINE_CHARS)


@contextmanager
def _naming(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """Turn errors of reading into one that names the file."""
    unreadable: tuple[type[Exception], ...] = (OSError, *damage)
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            str(path), got=f"text that is not UTF-8 ({error.reason} at byte {error.start} of a block)", expected="UTF-8"
        ) from None
    except unreadable as error:
        raise DataError(
            str(path),
            got=f"a file that cannot be read ({str(error) or type(error).__name__})",
            expected="a whole, readable file",
            hint="Check that it was copied to the end.",
        ) from None


def _suffix(path: Path) -> str:
    packed = path.suffix if path.suffix in _PACKED else ""
    return path.with_suffix("").suffix + packed if packed else path.suffix
