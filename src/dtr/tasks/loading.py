"""`load_task`: from the task section of a recipe to a task."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtr.errors import DataError, RecipeError
from dtr.files import require_file, suggest_path, user_path

# Each of these registers its kind.
from dtr.tasks import classification, generation, long_context, multiple_choice, perplexity, recall  # noqa: F401
from dtr.tasks.base import Task
from dtr.tasks.fields import FieldMap, check_fields, map_row
from dtr.tasks.harness import load_harness
from dtr.tasks.harness_rows import HARNESS_PREFIX, open_harness
from dtr.tasks.jsonl import SplitExpression
from dtr.tasks.sources import HUB_PREFIX, FileRows, RowSource, is_saved_dataset, open_hub, open_saved
from dtr.tasks.spec import TASKS, TaskSpec

BUILT_IN = ("recall", "needle", "variables")
"""Kinds that make their own items."""
FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "multiple_choice": (("question", "choices", "answer"), ("context", "choices", "answer")),
    "classification": (("text", "label", "label_text"),),
    "generation": (("prompt", "answer"), ("question", "answers")),
    "perplexity": (("text",),),
}
"""Fields by which `kind: auto` knows a task: any one of the sets."""


def load_task(
    source: str,
    *,
    kind: str = "auto",
    path: str | None = None,
    metric: str = "auto",
    prompt: str | None = None,
    target: str | None = None,
    chat_template: bool = False,
    validation: str = "validation",
    test: str = "test",
    num_validation: int | None = None,
    num_test: int | None = None,
    cut_validation: float | None = None,
    subset: str | None = None,
    group: str | None = None,
    fields: FieldMap | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Task:
    """Make a task.

    Args:
        source: `recall`, `needle` or `variables` (built in), a folder with validation.jsonl and test.jsonl, a single
            file (also .parquet, .csv, .arrow), a folder from `save_to_disk`, `datasets:NAME` of the hub,
            `lm_eval:NAME` of lm-evaluation-harness (its own YAML files at `path`), or the name of a kind with the data
            at `path`.
        kind: multiple_choice, classification, generation, perplexity, or `auto`: by the fields of the first
            validation row.
        metric: `auto` is acc_norm for multiple choice with more than two choices and acc with two, acc for
            classification, exact_match for generation and built-in tasks, perplexity for perplexity.
        prompt, target: templates with the row's fields in braces; each kind has defaults.
        chat_template: wrap the prompt as a user turn.
        validation, test: a split, or rows of one as `test[0:250]`; a single file's split is called `rows`.
        num_validation, num_test: use that many items, drawn by the seed; for built-in tasks, make that many.
        cut_validation: permission to draw this share of the only split for validation where one of the two is missing.
        subset: configuration of a hub data set.
        group: a field whose value items of one passage or document share: they err together, so draws and tests of a
            search count them as one. Perplexity groups windows by document by itself.
        fields: the task's fields by the data set's, as `{"question": "goal", "choices": ["sol1", "sol2"]}`.
        options: further settings of the kind, see its `...Options` class.

    Raises:
        DataError: missing, malformed or overlapping data; names file and line.
        RecipeError: settings that do not fit the kind or the fields.
    """
    for name, size in (("num_validation", num_validation), ("num_test", num_test)):
        if size is not None and size < 1:
            raise RecipeError(f"task.{name}", got=str(size), expected="at least 1", hint="Leave it out to use all.")
    check_fields(fields or {})
    rows = _find_rows(source, path, subset)
    kind = "lm_eval" if source.startswith(HARNESS_PREFIX) else _find_kind(source, kind, rows, validation, fields or {})
    spec = TaskSpec(
        name=source if rows is None else rows.name,
        kind=kind,
        rows=rows,
        metric=metric,
        prompt=prompt,
        target=target,
        chat_template=chat_template,
        validation=validation,
        test=test,
        num_validation=num_validation,
        num_test=num_test,
        cut_validation=cut_validation,
        group=group,
        fields=dict(fields or {}),
        options=dict(options or {}),
        seed=seed,
    )
    return load_harness(spec) if kind == "lm_eval" else TASKS[kind](spec)


def _find_rows(source: str, path: str | None, subset: str | None) -> RowSource | None:
    """Where the rows are, None for the built-in tasks."""
    if source.startswith(HARNESS_PREFIX):
        return open_harness(source.removeprefix(HARNESS_PREFIX), path)
    is_hub = source.startswith(HUB_PREFIX)
    if subset is not None and not is_hub:
        raise RecipeError(
            "task.subset",
            got=f"'{subset}' for {source}",
            expected=f"a source of the hub, as {HUB_PREFIX}allenai/ai2_arc",
            hint="Leave task.subset out.",
        )
    if is_hub and path is None:
        return open_hub(source.removeprefix(HUB_PREFIX), subset)
    data = _find_data(source, path)
    if data is None:
        return None
    return open_saved(data) if data.is_dir() and is_saved_dataset(data) else FileRows(data)


def _find_data(source: str, path: str | None) -> Path | None:
    """Folder or file with the rows, None for the built-in tasks."""
    if source in TASKS and source not in BUILT_IN:
        if path is None:
            raise RecipeError(
                "task.path", got="nothing", expected=f"a folder or file for the {source} task", hint="Add task.path."
            )
        data, where = user_path(path), "task.path"
    elif path is not None:
        raise RecipeError(
            "task.path",
            got=f"'{path}' next to the source '{source}'",
            expected="one place for the data",
            hint=f"Leave one of them out, or name a kind as source: {', '.join(sorted(set(TASKS) - set(BUILT_IN)))}.",
        )
    elif source in BUILT_IN:
        return None
    else:
        data, where = user_path(source), "task.source"
    if not os.path.exists(data):
        raise DataError(
            where,
            got=f"'{data}', which does not exist",
            expected=f"a folder or file with rows, {HUB_PREFIX}NAME, {HARNESS_PREFIX}NAME or 'recall'",
            hint=suggest_path(str(data), [] if path is not None else list(TASKS)),
        )
    if not data.is_dir():
        try:
            require_file(data)
        except OSError as error:
            raise DataError(where, got=f"'{data}', {error.strerror}", expected="a folder or file with rows") from None
    return data


def _find_kind(source: str, kind: str, rows: RowSource | None, validation: str, fields: FieldMap) -> str:
    if source in TASKS:
        if kind not in ("auto", source):
            raise RecipeError("task.kind", got=f"'{kind}'", expected=f"auto or {source}, the kind that is the source")
        return source
    assert rows is not None, "only a kind can do without data"
    if kind in BUILT_IN:
        raise RecipeError(
            "task.kind",
            got=f"'{kind}' for {source}",
            expected="a kind that reads data",
            hint=f"Set task.source: {kind}.",
        )
    return detect_kind(rows, validation, fields) if kind == "auto" else kind


def detect_kind(source: RowSource, validation: str, fields: FieldMap) -> str:
    """The kind whose fields the first validation row has.

    Raises:
        DataError: no kind or several fit; lists the fields that are known.
    """
    there, split = source.names(), SplitExpression.parse(validation, "task.validation").name
    if split not in there:
        # Validation may yet be cut from another split, which then shows the fields; else `read_splits` says what lacks.
        split = next((name for name in ("test", "rows", "train") if name in there), split)
    row = source.rows(split, "task.validation")[0]
    fields_there = map_row(row, fields).data.keys()
    fitting = [kind for kind, sets in FIELDS.items() if any(fields_there >= set(names) for names in sets)]
    answer_fields = {"label", "label_text", "choices", "answer", "answers", "prompt"}
    if "perplexity" in fitting and fields_there & answer_fields:
        # Text with a label or an answer next to it is hardly meant for its perplexity.
        fitting.remove("perplexity")
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{kind}: {' or '.join('{' + ', '.join(s) + '}' for s in FIELDS[kind])}" for kind in FIELDS)
    raise DataError(
        row.where,
        got=f"a row with the fields {', '.join(map(str, fields_there)) or 'none'}"
        + (f", which fits {' and '.join(fitting)}" if fitting else ""),
        expected=f"the fields of one kind ({known})",
        hint="Rename the fields, map them with task.fields, or set task.kind.",
    )
