"""The validation and test rows of a task: where they come from, that they are disjoint, and the draw of a sample."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dtr.errors import DataError
from dtr.tasks.base import Item
from dtr.tasks.fields import map_row
from dtr.tasks.jsonl import Row, SplitExpression
from dtr.tasks.spec import TaskSpec

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """Rows of both splits before any draw, and what a reader must know of them."""

    rows: Mapping[str, list[Row]]
    notes: tuple[str, ...] = ()


def read_splits(spec: TaskSpec) -> SplitRows:
    """Rows of `validation` and `test`.

    Where one of the two is not there and `cut_validation` permits it, the other one is cut in two.

    Raises:
        DataError: a missing or malformed file, or rows that stand in both splits.
        RecipeError: a malformed split expression.
    """
    assert spec.rows is not None, "built-in tasks have no rows"
    there, wanted = spec.rows.names(), {"validation": spec.validation, "test": spec.test}
    missing = [s for s, text in wanted.items() if SplitExpression.parse(text, f"task.{s}").name not in there]
    cut_from = [text for split, text in wanted.items() if split not in missing] if len(missing) == 1 else []
    if wanted == {"validation": "validation", "test": "test"} == {s: s for s in missing} and len(there) == 1:
        cut_from = there
    if spec.cut_validation is not None and cut_from:
        return _cut(spec, cut_from[0], spec.cut_validation)
    rows = {split: rows_of(spec, text, f"task.{split}") for split, text in wanted.items()}
    _check_disjoint(rows["validation"], rows["test"])
    return SplitRows(rows=rows)


def rows_of(spec: TaskSpec, text: str, where: str) -> list[Row]:
    """Rows that one split expression means, with the fields that `task.fields` adds.

    Raises:
        DataError: a missing or malformed file or range.
        RecipeError: a malformed expression, or a mapping that does not fit.
    """
    assert spec.rows is not None, "built-in tasks have no rows"
    expression = SplitExpression.parse(text, where)
    rows = expression.select(spec.rows.rows(expression.name, where), where)
    return [map_row(row, spec.fields) for row in rows] if spec.fields else rows


def _cut(spec: TaskSpec, text: str, share: float) -> SplitRows:
    """One split as two, by a seeded draw."""
    rows = rows_of(spec, text, "task.validation")
    num_validation = round(share * len(rows))
    if not 0 < num_validation < len(rows):
        raise DataError(
            "task.cut_validation",
            got=f"{share:g} of {len(rows)} rows",
            expected="a share that leaves rows on both sides",
            hint="Change the share, or add rows.",
        )
    chosen = {row.line for row in _draw(rows, num_validation, spec.seed, "cut")}
    parts = {
        "validation": [row for row in rows if row.line in chosen],
        "test": [row for row in rows if row.line not in chosen],
    }
    _check_disjoint(parts["validation"], parts["test"])
    note = (
        f"The task has no separate validation and test rows: {num_validation} of the {len(rows)} rows of '{text}' "
        f"were drawn for validation (seed {spec.seed}), the other {len(rows) - num_validation} are the test."
    )
    return SplitRows(rows=parts, notes=(note,))


def group_of(row: Row, spec: TaskSpec) -> str | None:
    """The value of the field that `task.group` names, as text; None where it names none.

    Raises:
        DataError: the row has no such field.
    """
    return None if spec.group is None else str(row.require(spec.group))


def draw_splits(spec: TaskSpec, items: Mapping[str, Sequence[Item]]) -> dict[str, tuple[Item, ...]]:
    """The items to use: `num_validation` and `num_test` of them, drawn by the seed, in their order.

    Raises:
        DataError: fewer items than asked for, or no test item that validation does not hold too.
    """
    _check_unseen(items["validation"], items["test"])
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


def _check_unseen(validation: Sequence[Item], test: Sequence[Item]) -> None:
    """Look for test items that ask what validation items ask: rows may differ in an id or a source all the same."""
    seen = {item.requests: item for item in reversed(validation)}
    copies = [(item, seen[item.requests]) for item in test if item.requests in seen]
    if not copies:
        return
    first, original = copies[0]
    if len(copies) == len(test):
        raise DataError(
            "task.test",
            got=f"only copies of validation rows, as {first.id} of {original.id}",
            expected="rows that search has not seen",
            hint="Use another split or file.",
        )
    warnings.warn(
        f"{len(copies)} of {len(test)} test items ask the same as validation items (first: {first.id} as "
        f"{original.id}), so the test score is not wholly unseen.",
        stacklevel=2,
    )
