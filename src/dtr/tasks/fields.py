"""`task.fields`: which of a data set's own fields are the context, question, choices and answer of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dtr.errors import RecipeError, did_you_mean
from dtr.tasks.jsonl import Row
from dtr.tasks.prompts import fill

FieldMap = Mapping[str, str | list[str]]
KNOWN = ("context", "question", "choices", "labels", "answer", "answers", "prompt", "text", "label", "label_text")


def check_fields(fields: FieldMap) -> None:
    """Refuse a mapping to fields that no kind of task reads.

    Raises:
        RecipeError: names the unknown field.
    """
    for name in fields:
        if name not in KNOWN:
            raise RecipeError(
                f"task.fields.{name}", got=f"'{name}'", expected="a field of tasks", hint=did_you_mean(name, KNOWN)
            )


def map_row(row: Row, fields: FieldMap) -> Row:
    """The row with the mapped fields added to its own.

    A value is the path of a field (`choices.text`), a template (`{premise} because`), or a list of either. An answer
    that is no number is looked up in `labels` where they are given, else among the choices.

    Raises:
        RecipeError: a field that the row does not have.
    """
    found = {name: _value(source, row, f"task.fields.{name}") for name, source in fields.items()}
    if "answer" in fields and isinstance(choices := {**row.data, **found}.get("choices"), list):
        found["answer"] = _index(found["answer"], found.get("labels"), choices)
    return replace(row, data={**row.data, **found})


def _value(source: str | list[str], row: Row, where: str) -> Any:
    if isinstance(source, list):
        return [_value(part, row, where) for part in source]
    if "{" in source:
        return fill(source, row, where)
    value: Any = row.data
    for part in [source] if source in row.data else source.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            there = ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise RecipeError(
                where,
                got=f"'{source}', a field that {row.where} does not have",
                expected=f"fields of the rows: {there}",
                hint=did_you_mean(part, value) if isinstance(value, Mapping) else "Check the path.",
            )
    return value


def _index(answer: Any, labels: Any, choices: list[Any]) -> Any:
    """Position of the right choice; what is no label, choice or number is left for the task to refuse."""
    for names in (labels, choices):
        if isinstance(names, list) and answer in names and not (names is choices and isinstance(answer, int)):
            return names.index(answer)
    return int(answer) if isinstance(answer, str) and answer.isdecimal() else answer
