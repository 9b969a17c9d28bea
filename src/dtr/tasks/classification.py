"""Classification: which of the task's labels is the likeliest after the text?

Rows `{text, label, label_text}`. The labels are those of the train split (where the folder has one) and of the
validation rows, so that nothing is learned from the test split. Metrics `acc` (auto), `acc_norm` and functions, as in
multiple choice.
"""

from __future__ import annotations

from collections.abc import Iterable

from dtr.errors import DataError
from dtr.recipe import Section
from dtr.tasks.base import Item
from dtr.tasks.jsonl import Row
from dtr.tasks.multiple_choice import ChoiceTask, choice_request, make_choice_task
from dtr.tasks.prompts import default_target, fill
from dtr.tasks.spec import TASKS, TaskSpec, read_options
from dtr.tasks.splits import read_splits, rows_of

DEFAULT_PROMPT = "{text}\nCategory:"


class ClassificationOptions(Section):
    """`task.options` of classification: none."""


@TASKS.register("classification")
def load_classification(spec: TaskSpec) -> ChoiceTask:
    """Read a classification task.

    Raises:
        DataError: malformed rows or splits, a label with two texts, or a test label that was never seen before.
        RecipeError: settings that do not fit.
    """
    read_options(ClassificationOptions, spec)
    found = read_splits(spec)
    assert spec.rows is not None, "labels come with rows"
    train = rows_of(spec, "train", "task.train") if "train" in spec.rows.names() else []
    labels = _collect_labels([*train, *found.rows["validation"]])
    items = {split: [_make_item(row, spec, labels) for row in found.rows[split]] for split in found.rows}
    return make_choice_task(spec, items, "acc", found.notes)


def _collect_labels(rows: Iterable[Row]) -> list[str]:
    """Label texts in the order of their labels."""
    texts: dict[int | str, str] = {}
    first: dict[int | str, Row] = {}
    for row in rows:
        label, text = row.require("label"), row.text("label_text")
        if not isinstance(label, int | str):
            raise row.wrong("label", label, "a number or a text")
        if texts.setdefault(label, text) != text:
            raise row.wrong("label_text", text, f"'{texts[label]}', the text of label {label} at {first[label].where}")
        first.setdefault(label, row)
    labels = [texts[label] for label in sorted(texts, key=lambda label: (isinstance(label, str), label))]
    row = next(iter(first.values()))
    if len(set(labels)) < max(len(labels), 2):
        raise DataError(
            str(row.file.parent),
            got=f"labels with the texts {', '.join(labels[:10])}",
            expected="at least two labels, each with its own text",
            hint="Choices are told apart by their text alone.",
        )
    return labels


def _make_item(row: Row, spec: TaskSpec, labels: list[str]) -> Item:
    label_text = row.text("label_text")
    if label_text not in labels:
        raise row.wrong(
            "label_text",
            label_text,
            f"one of the {len(labels)} labels of the train and validation rows",
            "Add a train.jsonl or validation rows with every label.",
        )
    if spec.prompt is None:
        row.text("text")
    context = fill(spec.prompt if spec.prompt is not None else DEFAULT_PROMPT, row, "task.prompt")
    template = spec.target
    if template is None:
        template = default_target("label_text", chat_template=spec.chat_template)
    requests = tuple(
        choice_request(context, fill(template, row, "task.target", {"label_text": text}), row, spec) for text in labels
    )
    return Item(id=row.id, requests=requests, row={"choices": labels, "answer": labels.index(label_text)})
