"""The validation and test rows of a task: where they come from, that they are disjoint, and the draw of a sample."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dtr.corpus.reading import is_plain_text, read_documents
from dtr.errors import DataError
from dtr.tasks.base import Item
from dtr.tasks.jsonl import Row, SplitExpression, read_jsonl
from dtr.tasks.spec import TaskSpec

T = TypeVar("T")


def read_splits(spec: TaskSpec) -> dict[str, list[Row]]:
    """Rows of `validation` and `test`, before any draw.

    Raises:
        DataError: a missing or malformed file, or rows that stand in both splits.
        RecipeError: a malformed split expression.
    """
    rows = {split: rows_of(spec, getattr(spec, split), f"task.{split}") for split in ("validation", "test")}
    _check_disjoint(rows["validation"], rows["test"])
    return rows


def rows_of(spec: TaskSpec, text: str, where: str) -> list[Row]:
    """Rows that one split expression means.

    Raises:
        DataError: a missing or malformed file or range.
        RecipeError: a malformed expression.
    """
    expression = SplitExpression.parse(text, where)
    assert spec.data is not None, "built-in tasks have no files"
    path = find_split(spec.data, expression.name, where)
    return _add_contexts(expression.select(read_rows(path), where))


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
            row = replace(row, data={"context": contexts[name], **row.data})
        out.append(row)
    return out


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON Lines file, or the documents of a plain text file as rows with the field `text`."""
    if not is_plain_text(path):
        return read_jsonl(path)
    rows = [Row(file=path, line=n, data={"text": doc}) for n, doc in enumerate(read_documents(path), start=1)]
    if not rows:
        raise DataError(str(path), got="an empty file", expected="text")
    return rows


def find_split(data: Path, name: str, where: str) -> Path:
    """The file of a split: NAME.jsonl (or plain text) in the folder, or the single file itself.

    Raises:
        DataError: no such split; names those that are there.
    """
    if data.is_file():
        if name in ("rows", short_name(data)):
            return data
        raise DataError(
            where,
            got=f"the split '{name}' of the single file {data}",
            expected=f"rows of that file, as '{short_name(data)}[0:250]' or 'rows[0:250]'",
            hint="Give task.validation and task.test ranges that do not overlap, as 'rows[0:250]' and 'rows[250:]'.",
        )
    files = {short_name(path): path for path in sorted(data.iterdir(), key=_rank) if _is_rows(path)}
    if name not in files:
        raise DataError(
            where,
            got=f"no file {name}.jsonl in {data}",
            expected="one file per split",
            hint=f"Files there: {', '.join(sorted(path.name for path in files.values())) or 'none that can be read'}.",
        )
    return files[name]


def short_name(path: Path) -> str:
    """Name without its suffixes, as `test` for test.jsonl and for test.txt.xz."""
    return (path.with_suffix("") if path.suffix in (".xz", ".gz") else path).stem


def is_train_there(spec: TaskSpec) -> bool:
    """Whether the folder has a train split."""
    return spec.data is not None and (spec.data / "train.jsonl").is_file()


def draw_splits(spec: TaskSpec, items: Mapping[str, Sequence[Item]]) -> dict[str, tuple[Item, ...]]:
    """The items to use: `num_validation` and `num_test` of them, drawn by the seed, in their order.

    Raises:
        DataError: fewer items than asked for.
    """
    sizes = {"validation": spec.num_validation, "test": spec.num_test}
    return {split: tuple(_draw(items[split], sizes[split], spec.seed, split)) for split in ("validation", "test")}


def _draw(items: Sequence[T], num_items: int | None, seed: int, split: str) -> list[T]:
    if num_items is None or num_items == len(items):
        return list(items)
    if num_items > len(items):
        raise DataError(
            f"task.num_{split}",
            got=f"{num_items}",
            expected=f"at most the {len(items)} items of the split",
            hint="Lower it, or leave it out to use all.",
        )
    # Only random() is promised to give the same numbers on every Python version.
    rng = random.Random(f"{seed}/{split}")
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(sorted(range(len(items)), key=keys.__getitem__)[:num_items])]


def _rank(path: Path) -> tuple[bool, str]:
    # Later ones win, so that validation.jsonl goes before validation.txt.
    return path.suffix == ".jsonl", path.name


def _is_rows(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".jsonl" or is_plain_text(path))


def _check_disjoint(validation: list[Row], test: list[Row]) -> None:
    if validation[0].file.resolve() == test[0].file.resolve():
        shared = sorted({row.line for row in validation} & {row.line for row in test})
        if shared:
            raise DataError(
                "task.test",
                got=f"{len(shared)} rows that are validation rows as well (lines {shared[0]} to {shared[-1]} of "
                f"{test[0].file})",
                expected="rows that search has not seen",
                hint="Use another split, or ranges that do not overlap, as 'rows[0:250]' and 'rows[250:]'.",
            )
    seen = {_content(row): row for row in validation}
    copies = [(row, seen[_content(row)]) for row in test if _content(row) in seen]
    if not copies:
        return
    first, original = copies[0]
    if len(copies) == len(test):
        raise DataError(
            "task.test",
            got=f"only copies of validation rows, as {first.where} of {original.where}",
            expected="rows that search has not seen",
            hint="Use another split or file.",
        )
    warnings.warn(
        f"{len(copies)} of {len(test)} test rows are copies of validation rows (first: {first.where} of "
        f"{original.where}), so the test score is not wholly unseen.",
        stacklevel=2,
    )


def _content(row: Row) -> str:
    return json.dumps(row.data, sort_keys=True)
