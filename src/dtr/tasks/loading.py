"""`load_task`: from the task section of a recipe to a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtr.corpus.reading import is_plain_text, suggest_path
from dtr.errors import DataError, RecipeError

# Each of these registers its kind.
from dtr.tasks import classification, generation, multiple_choice, perplexity, recall  # noqa: F401
from dtr.tasks.base import Task
from dtr.tasks.jsonl import SplitExpression, read_jsonl
from dtr.tasks.spec import TASKS, TaskSpec
from dtr.tasks.splits import find_split, short_name

BUILT_IN = "recall"
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
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Task:
    """Make a task.

    Args:
        source: `recall` (built in), a folder with validation.jsonl and test.jsonl, a single file, or the name of a
            kind with the data at `path`.
        kind: multiple_choice, classification, generation, perplexity, recall, or `auto`: by the fields of the first
            validation row.
        metric: `auto` is acc_norm for multiple choice with more than two choices and acc with two, acc for
            classification, exact_match for generation and recall, perplexity for perplexity.
        prompt, target: templates with the row's fields in braces; each kind has defaults.
        chat_template: wrap the prompt as a user turn.
        validation, test: a split, or rows of one as `test[0:250]`; a single file's split is called `rows`.
        num_validation, num_test: use that many items, drawn by the seed; for recall, make that many.
        options: further settings of the kind, see its `...Options` class.

    Raises:
        DataError: missing, malformed or overlapping data; names file and line.
        RecipeError: settings that do not fit the kind or the fields.
    """
    for name, size in (("num_validation", num_validation), ("num_test", num_test)):
        if size is not None and size < 1:
            raise RecipeError(f"task.{name}", got=str(size), expected="at least 1", hint="Leave it out to use all.")
    data = _find_data(source, path)
    kind = _find_kind(source, kind, data, validation)
    spec = TaskSpec(
        name=source if data is None else short_name(data),
        kind=kind,
        data=data,
        metric=metric,
        prompt=prompt,
        target=target,
        chat_template=chat_template,
        validation=validation,
        test=test,
        num_validation=num_validation,
        num_test=num_test,
        options=dict(options or {}),
        seed=seed,
    )
    return TASKS[kind](spec)


def _find_data(source: str, path: str | None) -> Path | None:
    """Folder or file with the rows, None for the built-in task."""
    if source in TASKS and source != BUILT_IN:
        if path is None:
            raise RecipeError(
                "task.path", got="nothing", expected=f"a folder or file for the {source} task", hint="Add task.path."
            )
        data, where = Path(path).expanduser(), "task.path"
    elif path is not None:
        raise RecipeError(
            "task.path",
            got=f"'{path}' next to the source '{source}'",
            expected="one place for the data",
            hint=f"Leave one of them out, or name a kind as source: {', '.join(k for k in TASKS if k != BUILT_IN)}.",
        )
    elif source == BUILT_IN:
        return None
    else:
        data, where = Path(source).expanduser(), "task.source"
    if not data.exists():
        raise DataError(
            where,
            got=f"'{data}', which does not exist",
            expected="a folder or file with rows, or 'recall'",
            hint=suggest_path(str(data), [] if path is not None else list(TASKS)),
        )
    return data


def _find_kind(source: str, kind: str, data: Path | None, validation: str) -> str:
    if source in TASKS:
        if kind not in ("auto", source):
            raise RecipeError("task.kind", got=f"'{kind}'", expected=f"auto or {source}, the kind that is the source")
        return source
    assert data is not None, "only a kind can do without data"
    if kind == BUILT_IN:
        raise RecipeError(
            "task.kind", got=f"'{kind}' for {data}", expected="a kind that reads data", hint="Set task.source: recall."
        )
    return detect_kind(data, validation) if kind == "auto" else kind


def detect_kind(data: Path, validation: str) -> str:
    """The kind whose fields the first validation row has.

    Raises:
        DataError: no kind or several fit; lists the fields that are known.
    """
    file = find_split(data, SplitExpression.parse(validation, "task.validation").name, "task.validation")
    if is_plain_text(file):
        return "perplexity"
    row = read_jsonl(file)[0]
    fields = set(row.data)
    fitting = [kind for kind, sets in FIELDS.items() if any(fields.issuperset(names) for names in sets)]
    answer_fields = {"label", "label_text", "choices", "answer", "answers", "prompt"}
    if "perplexity" in fitting and fields & answer_fields:
        # Text with a label or an answer next to it is hardly meant for its perplexity.
        fitting.remove("perplexity")
    if len(fitting) == 1:
        return fitting[0]
    known = "; ".join(f"{kind}: {' or '.join('{' + ', '.join(s) + '}' for s in FIELDS[kind])}" for kind in FIELDS)
    raise DataError(
        row.where,
        got=f"a row with the fields {', '.join(map(str, row.data)) or 'none'}"
        + (f", which fits {' and '.join(fitting)}" if fitting else ""),
        expected=f"the fields of one kind ({known})",
        hint="Rename the fields, or set task.kind.",
    )
