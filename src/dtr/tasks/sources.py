"""Where rows come from: files in a folder, a single file, or a data set of the `datasets` library. No torch in here."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dtr.corpus.reading import is_plain_text, read_documents
from dtr.errors import DataError
from dtr.json_lines import MAX_ROW_CHARS, named_twice
from dtr.tasks.jsonl import Row, open_text, read_jsonl

HUB_PREFIX = "datasets:"
TABLES = (".parquet", ".csv", ".arrow")
SINGLE = "rows"
"""Name of the split of a single file or an undivided data set."""


class RowSource(Protocol):
    """Named splits of rows."""

    @property
    def name(self) -> str:
        """Short name for reports."""

    def names(self) -> list[str]:
        """Splits that are there."""

    def rows(self, split: str, where: str) -> list[Row]:
        """Rows of a split, never none.

        Args:
            where: recipe field that asked, as `task.test`.

        Raises:
            DataError: no such split (names those that are there), or malformed rows.
        """


class FileRows:
    """One file per split in a folder, or a single file."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.name = short_name(data)

    def names(self) -> list[str]:
        return [SINGLE] if self.data.is_file() else list(self._files())

    def rows(self, split: str, where: str) -> list[Row]:
        return _add_contexts(read_rows(self.find(split, where)))

    def find(self, split: str, where: str) -> Path:
        """The file of a split: NAME.jsonl (or another kind of file) in the folder, or the single file itself.

        Raises:
            DataError: no such split; names those that are there.
        """
        if self.data.is_file():
            if split in (SINGLE, self.name):
                return self.data
            raise DataError(
                where,
                got=f"the split '{split}' of the single file {self.data}",
                expected=f"rows of that file, as '{self.name}[0:250]' or 'rows[0:250]'",
                hint="Give task.validation and task.test ranges that do not overlap, as 'rows[0:250]' and "
                "'rows[250:]', or let task.cut_validation draw them.",
            )
        files = self._files()
        if split not in files:
            there = ", ".join(sorted(path.name for path in files.values())) or "none that can be read"
            raise DataError(
                where,
                got=f"no file {split}.jsonl in {self.data}",
                expected="one file per split",
                hint=f"Files there: {there}. {CUT_HINT}",
            )
        return files[split]

    def _files(self) -> dict[str, Path]:
        return {short_name(path): path for path in sorted(self.data.iterdir(), key=_rank) if _is_rows(path)}


CUT_HINT = "To draw validation rows from another split, say so: task.cut_validation: 0.3."


class DatasetRows:
    """Splits of a data set of the `datasets` library."""

    def __init__(self, name: str, splits: Mapping[str, Any]) -> None:
        self.name, self._label = name.rstrip("/").rsplit("/", 1)[-1], name
        self._splits = splits

    def names(self) -> list[str]:
        return list(self._splits)

    def rows(self, split: str, where: str) -> list[Row]:
        if split not in self._splits:
            raise DataError(
                where,
                got=f"no split '{split}' in {self._label}",
                expected="a split of the data set",
                hint=f"Splits there: {', '.join(map(str, self._splits))}. {CUT_HINT}",
            )
        data = self._splits[split]
        labels = {name: feature.names for name, feature in data.features.items() if hasattr(feature, "int2str")}
        file = Path(self._label, split)
        rows = [Row(file=file, line=n, data=_with_label_text(row, labels)) for n, row in enumerate(data, start=1)]
        if not rows:
            raise DataError(str(file), got="an empty split", expected="rows")
        return rows


def open_hub(name: str, subset: str | None) -> DatasetRows:
    """A data set of the hub, or of the library's cache when there is no network.

    Raises:
        DataError: not found, not reachable, or a configuration that must be named.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, subset)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise DataError(
            f"task.source {HUB_PREFIX}{name}",
            got=f"{type(error).__name__}: {first}",
            expected="a data set of the hub, or of the cache from an earlier use",
            hint="A hub data set needs the network once. Without it, give a folder with parquet, CSV or JSONL files "
            "or one from save_to_disk. Data sets with several configurations need task.subset.",
        ) from error
    return DatasetRows(name if subset is None else f"{name}/{subset}", found)


def is_saved_dataset(data: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((data / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_saved(data: Path) -> DatasetRows:
    """A data set that `save_to_disk` wrote.

    Raises:
        DataError: damaged.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(data))
    except Exception as error:
        raise DataError(
            str(data), got=f"{type(error).__name__}: {error}", expected="a data set from save_to_disk"
        ) from error
    return DatasetRows(str(data), found if isinstance(found, dict) else {SINGLE: found})


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON Lines file or a table, or the documents of a plain text file as rows with the field `text`.

    Raises:
        DataError: unreadable, malformed or empty.
    """
    if path.suffix == ".csv":
        found: Sequence[dict[str, Any]] = _read_csv(path)
    elif path.suffix in TABLES:
        found = _read_table(path)
    elif is_plain_text(path):
        found = [{"text": document} for document in read_documents(path)]
    else:
        return read_jsonl(path)
    for number, data in enumerate(found, start=1):
        for field, value in data.items():
            if isinstance(value, str) and len(value) > MAX_ROW_CHARS:
                got = f"{len(value):,} characters in '{field}'"
                raise DataError(f"{path}:{number}", got=got, expected=f"at most {MAX_ROW_CHARS:,}")
    rows = [Row(file=path, line=n, data=data) for n, data in enumerate(found, start=1)]
    if not rows:
        raise DataError(str(path), got="an empty file", expected="text" if is_plain_text(path) else "rows")
    return rows


def short_name(path: Path) -> str:
    """Name without its suffixes, as `test` for test.jsonl and for test.txt.xz."""
    return (path.with_suffix("") if path.suffix in (".xz", ".gz") else path).stem


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file with every cell as the text that it is: a postcode keeps its zeros, a price its cents."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_CHARS))
    with open_text(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            _check_columns(names, path)
            rows: list[dict[str, Any]] = []
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{path}:{len(rows) + 1}",
                        got=f"{len(cells)} cells",
                        expected=f"{len(names)}, one for each column ({', '.join(names)})",
                        hint="A cell with a comma or a line break stands in double quotes.",
                    )
                rows.append(dict(zip(names, cells)))
        except csv.Error as error:
            raise DataError(
                str(path), got=f"broken CSV at line {reader.line_num} ({error})", expected="a whole CSV file"
            ) from None
    return rows


def _read_table(path: Path) -> list[dict[str, Any]]:
    # pyarrow comes with datasets; most tasks are JSON Lines and need not wait for it.
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            # Not `read_table`, which takes folders of the path for columns and stumbles over repeated names.
            with pyarrow.parquet.ParquetFile(path) as parquet:
                return _rows_of_table(parquet.read(), path)
        with path.open("rb") as file:
            # `datasets` writes streams, other tools mostly files.
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            return _rows_of_table(reader.read_all(), path)
    except DataError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        first = next(iter(str(error).splitlines()), "")
        raise DataError(
            str(path), got=f"a file that cannot be read ({first})", expected=f"a whole {path.suffix[1:]} file"
        ) from None


def _rows_of_table(table: Any, path: Path) -> list[dict[str, Any]]:
    _check_columns(table.column_names, path)
    return table.to_pylist()


def _check_columns(names: Sequence[str], path: Path) -> None:
    """Refuse a column that is there twice, of which rows would keep the last."""
    if (name := named_twice(names)) is not None:
        raise DataError(
            str(path),
            got=f"the column '{name}' twice",
            expected="each column once",
            hint="Rename or remove one of them.",
        )


def _with_label_text(row: dict[str, Any], labels: Mapping[str, list[str]]) -> dict[str, Any]:
    """The row with the name of its class beside the number, where the data set knows it."""
    if "label" in labels and "label_text" not in row and isinstance(row.get("label"), int) and row["label"] >= 0:
        return {**row, "label_text": labels["label"][row["label"]]}
    return row


def _add_contexts(rows: list[Row]) -> list[Row]:
    """Rows with a `context_id` instead of a context get it from docs_SPLIT.jsonl next to their file.

    Raises:
        DataError: no such file, or no such context in it.
    """
    if not any("context_id" in row.data and "context" not in row.data for row in rows):
        return rows
    documents = rows[0].file.with_name(f"docs_{rows[0].file.name}")
    contexts = {row.require("context_id"): row.text("context") for row in read_jsonl(documents)}
    out = []
    for row in rows:
        name = row.data.get("context_id")
        if name is not None and "context" not in row.data:
            if name not in contexts:
                raise row.wrong("context_id", name, f"a context_id of {documents}")
            row = Row(file=row.file, line=row.line, data={"context": contexts[name], **row.data})
        out.append(row)
    return out


def _rank(path: Path) -> tuple[bool, str]:
    # Later ones win, so that validation.jsonl goes before validation.txt.
    return path.suffix == ".jsonl", path.name


def _is_rows(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".jsonl", *TABLES) or is_plain_text(path))
